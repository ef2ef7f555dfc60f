from __future__ import annotations

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from agents.surgeons.base import OperationRecord, OperationRecorder
from tests.training_runs import ToyOperation

ACTION = np.array([0.5, -1.0], np.float32)


def perform(recorder: OperationRecorder, n_steps: int, scale: float = 1.0) -> None:
    recorder.reset()
    for _ in range(n_steps):
        recorder.step(scale * ACTION)


def test_an_operation_that_ends_leaves_one_record() -> None:
    recorder = OperationRecorder(ToyOperation(0.5, -0.25, 1.0))
    perform(recorder, 3)
    (record,) = recorder.collect()
    coefficients = record.coefficients
    assert coefficients.tolist() == [0.3, 0.3]
    assert record._replace(coefficients=None) == OperationRecord(  # type: ignore[arg-type]
        total=1.25,
        length=3,
        mean_abs_action=0.75,  # (|0.5| + |-1|) / 2
        coefficients=None,  # type: ignore[arg-type]
        flatline=None,
        terms={"kl_ref": 2.0},
        baseline_terms={"kl_ref": -1.0},
        lost_score=0.25,
    )


def test_every_action_counts_in_the_mean() -> None:
    recorder = OperationRecorder(ToyOperation(0.0, 0.0))
    recorder.reset()
    recorder.step(ACTION)
    recorder.step(np.zeros(2, np.float32))
    assert recorder.collect()[0].mean_abs_action == pytest.approx(0.375)


def test_the_cause_of_a_flatline_is_kept() -> None:
    env = ToyOperation(-1.0)
    env.flatline = "non-finite logits"
    recorder = OperationRecorder(env)
    perform(recorder, 1)
    assert recorder.collect()[0].flatline == "non-finite logits"


def test_collecting_empties_the_recorder() -> None:
    recorder = OperationRecorder(ToyOperation(1.0))
    perform(recorder, 1)
    perform(recorder, 1)
    assert len(recorder.collect()) == 2
    assert recorder.collect() == []


def test_an_operation_that_was_broken_off_leaves_nothing() -> None:
    recorder = OperationRecorder(ToyOperation(5.0, 1.0))
    perform(recorder, 1)
    assert recorder.collect() == []
    perform(recorder, 2, scale=0.0)
    (record,) = recorder.collect()
    assert (record.total, record.length, record.mean_abs_action) == (6.0, 2, 0.0)


def test_an_operation_that_a_time_limit_ends_is_recorded() -> None:
    recorder = OperationRecorder(TimeLimit(ToyOperation(5.0, 1.0, 1.0), 2))
    perform(recorder, 2)
    (record,) = recorder.collect()
    assert (record.total, record.length, record.lost_score) == (6.0, 2, 0.0)


def test_what_the_environment_says_is_passed_on_untouched() -> None:
    env = ToyOperation(0.5, 1.0)
    recorder = OperationRecorder(env)
    observation, _ = recorder.reset(seed=3)
    assert env.np_random_seed == 3
    assert observation.tolist() == [0.0] * 3
    observation, reward, terminated, truncated, info = recorder.step(ACTION)
    assert (observation.tolist(), reward, terminated, truncated) == ([1.0] * 3, 0.5, False, False)
    assert info["score_terms"] == {"kl_ref": 0.0}
    assert recorder.action_space is env.action_space
