"""Tests of avatarl_env/task.py beyond what both environments show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from avatarl_env.episode import Episode, EpisodeConfig
from avatarl_env.patient import Patient
from avatarl_env.task import SurgeryTask
from tests.patients import actions, assert_same_reading, tiny_patient

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


@pytest.mark.parametrize("injury", [0.0, 0.5])
@pytest.mark.parametrize("name", ["head_gain", "low_rank_seed"])
def test_side_by_side_is_one_by_one(name: str, injury: float, patient: Patient) -> None:
    task = task_on(patient, injury, operator=name)
    n_coefficients = len(task.operator.labels)
    together = begin(task, 0, 1, 2)
    alone = [episode for seed in range(3) for episode in begin(task, seed)]
    for step in range(4):
        acts = 0.3 * actions(3, n_coefficients, seed=step)
        found = task.step(together, acts)
        expected = [task.step([e], a[None])[0] for e, a in zip(alone, acts, strict=True)]
        for one, other, outcome, twin in zip(together, alone, found, expected, strict=True):
            assert_same_reading(one.present, other.present, other.prompts.uniforms)
            assert one.coefficients.tolist() == other.coefficients.tolist()
            assert outcome.reward == pytest.approx(twin.reward, abs=1e-4)
            assert outcome.terminated == twin.terminated == (step == 3)
            assert task.observe(one) == pytest.approx(task.observe(other), abs=1e-4)


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


def test_no_operations_are_no_error(patient: Patient) -> None:
    for injury in (0.0, 0.5):
        task = task_on(patient, injury)
        assert task.begin([]) == []
        assert task.step([], np.zeros((0, 4))) == []
    assert patient.forward_tokens == 0


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3)),
        np.zeros((1, 4)),
        np.zeros((2, 4, 1)),
        np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]),
    ],
)
def test_bad_actions_touch_no_operation(bad: np.ndarray, patient: Patient) -> None:
    task = task_on(patient)
    episodes = begin(task, 0, 1)
    spent = patient.forward_tokens
    with pytest.raises(ValueError, match=r"action must be \(4,\) finite numbers|zip\(\) argument"):
        task.step(episodes, bad)
    assert patient.forward_tokens == spent
    assert all(episode.n_done == 0 and not episode.coefficients.any() for episode in episodes)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([1], [1]),
        ("blocks.1.attn", [1]),
        ([1, "*.1.attn", -1], [1]),
        (None, [0, 1]),
        (["*"], [0, 1]),
        (range(1, -1, -1), [0, 1]),
        (0, [0]),
    ],
)
def test_only_the_chosen_layers_are_operated_on(
    layers: Any, expected: list[int], patient: Patient
) -> None:
    """And all are observed."""
    task = task_on(patient, layers=layers, operator_options={"tied": False})
    assert [target.layer for target in task.operator.targets] == expected
    assert task.action_space().shape == (4 * len(expected),)
    assert task.observation_space().shape == (32 + 4 * len(expected),)
    (episode,) = begin(task, 0)
    task.step([episode], moves(1, 4 * len(expected)))
    rise = episode.present.vitals.query_log_rms - episode.baseline.vitals.query_log_rms
    assert rise[:2].any() == (0 in expected)
    assert rise[2:].any()
