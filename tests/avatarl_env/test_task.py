"""Tests of avatarl_env/task.py beyond what both environments show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from avatarl_env.episode import Episode, EpisodeConfig
from avatarl_env.patient import Patient
from avatarl_env.task import SurgeryTask
from tests.patients import actions, tiny_patient

RULES: dict[str, Any] = {"n_prompts": 4, "prompt_length": 8, "n_new": 4}


@pytest.fixture
def patient() -> Patient:
    return tiny_patient()


def task_on(patient: Patient, injury: float = 0.0, **keywords: Any) -> SurgeryTask:
    return SurgeryTask(patient, EpisodeConfig(**RULES, injury=injury), **keywords)


def begin(task: SurgeryTask, *seeds: int) -> list[Episode]:
    return task.begin([task.draw(np.random.default_rng(seed)) for seed in seeds])


def moves(n: int, n_coefficients: int = 4) -> np.ndarray:
    return 0.3 * actions(n, n_coefficients)


def versions(patient: Patient) -> list[int]:
    """Return how often each weight was written."""
    return [p._version for p in patient.model.parameters()]


def test_one_operation_is_performed_in_place_and_several_side_by_side(patient: Patient) -> None:
    """Baselines are evaluated as steps are, so that the rounding is the same."""
    task = task_on(patient)
    for n in (1, 2, 3):
        before = versions(patient)
        episodes = begin(task, *range(n))
        after_baselines = versions(patient)
        task.step(episodes, moves(n))
        assert (after_baselines != before) is (n == 1)
        assert (versions(patient) != after_baselines) is (n == 1)


def test_what_is_evaluated_is_injury_plus_coefficients(patient: Patient) -> None:
    task = task_on(patient, injury=0.5)
    (episode,) = begin(task, 0)
    prompts = episode.prompts
    assert episode.healthy_terms == patient.evaluate(prompts).terms
    expected = patient.evaluate_operated(task.operator, episode.injury, prompts)
    assert episode.baseline.terms == expected.terms != episode.healthy_terms
    task.step([episode], moves(1))
    at = episode.injury + episode.coefficients
    expected = patient.evaluate_operated(task.operator, at, prompts)
    assert episode.present.terms == expected.terms
