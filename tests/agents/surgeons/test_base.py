from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from agents.surgeons.base import EpisodeRecord, EpisodeRecorder, row_info
from tests.training_runs import ToyOperations, small_env, small_eval_env

ACTION = np.array([0.5, -1.0], np.float32)


def record(env: VectorEnv[Any, Any, Any]) -> EpisodeRecorder:
    return EpisodeRecorder(env)  # type: ignore[arg-type] # toys will do


def perform(recorder: EpisodeRecorder, n_steps: int, scale: float = 1.0) -> None:
    recorder.reset()
    for _ in range(n_steps):
        recorder.step(np.tile(scale * ACTION, (recorder.num_envs, 1)))


def test_an_operation_that_ends_leaves_one_record() -> None:
    recorder = record(ToyOperations(0.5, -0.25, 1.0))
    perform(recorder, 3)
    (found,) = recorder.collect()
    assert found.coefficients.tolist() == [0.3, 0.3]
    assert found._replace(coefficients=None) == EpisodeRecord(  # type: ignore[arg-type]
        total=1.25,
        length=3,
        mean_abs_action=0.75,  # (|0.5| + |-1|) / 2
        coefficients=None,  # type: ignore[arg-type]
        flatline=None,
        terms={"kl_ref": 2.0},
        baseline_terms={"kl_ref": -1.0},
        lost_score=0.25,
    )
    assert type(found.total) is type(found.mean_abs_action) is type(found.lost_score) is float


def test_every_action_counts_in_the_mean() -> None:
    recorder = record(ToyOperations(0.0, 0.0))
    recorder.reset()
    recorder.step(ACTION[None])
    recorder.step(np.zeros((1, 2), np.float32))
    assert recorder.collect()[0].mean_abs_action == pytest.approx(0.375)


def test_rows_are_recorded_each_for_itself_and_as_they_end() -> None:
    toys = ToyOperations(1.0, 2.0, 4.0, n_rows=3)
    toys.envs[1].rewards = (-1.0,)  # this patient dies at once, again and again
    toys.envs[1].flatline = "entropy"
    recorder = record(toys)
    recorder.reset()
    actions = np.array([[0.25, 0.25], [0.5, -1.0], [0.0, 0.0]], np.float32)
    for _ in range(3):
        recorder.step(actions)
    found = [(r.total, r.length, r.mean_abs_action, r.flatline) for r in recorder.collect()]
    death = (-1.0, 1, 0.75, "entropy")
    assert found == [death, death, (7.0, 3, 0.25, None), death, (7.0, 3, 0.0, None)]


def test_the_cause_of_a_flatline_is_kept() -> None:
    toys = ToyOperations(-1.0)
    toys.envs[0].flatline = "non-finite logits"
    recorder = record(toys)
    perform(recorder, 1)
    assert recorder.collect()[0].flatline == "non-finite logits"


def test_collecting_empties_the_recorder() -> None:
    recorder = record(ToyOperations(1.0))
    perform(recorder, 1)
    perform(recorder, 1)
    assert len(recorder.collect()) == 2
    assert recorder.collect() == []


def test_operations_that_were_broken_off_leave_nothing() -> None:
    recorder = record(ToyOperations(5.0, 1.0, n_rows=2))
    perform(recorder, 1)
    assert recorder.collect() == []
    perform(recorder, 2, scale=0.0)
    found = [(r.total, r.length, r.mean_abs_action) for r in recorder.collect()]
    assert found == [(6.0, 2, 0.0)] * 2


def test_operations_that_a_time_limit_ends_are_recorded() -> None:
    recorder = record(small_env(episode_length=4, max_episode_steps=3))
    recorder.reset(seed=0)
    for _ in range(3):
        recorder.step(np.zeros((2, 4), np.float32))
    found = [(r.total, r.length, r.lost_score, r.flatline) for r in recorder.collect()]
    assert found == [(0.0, 3, 0.0, None)] * 2


def test_records_are_not_changed_by_what_comes_later() -> None:
    recorder = record(small_env())
    recorder.reset(seed=0)
    for _ in range(2):
        recorder.step(np.full((2, 4), 0.1, np.float32))
    first, second = recorder.collect()
    before = (first.coefficients.tolist(), dict(first.terms), second.coefficients.tolist())
    second.coefficients[:] = 9.0
    second.terms["kl_ref"] = 9.0
    for _ in range(2):
        recorder.step(np.full((2, 4), -0.3, np.float32))
    assert (first.coefficients.tolist(), first.terms) == before[:2]
    assert before[2] == pytest.approx([0.1] * 4)
    assert [r.coefficients.tolist() for r in recorder.collect()] == [pytest.approx([-0.3] * 4)] * 2


def test_what_the_environment_says_is_passed_on_untouched() -> None:
    toys = ToyOperations(0.5, 1.0, n_rows=2)
    recorder = record(toys)
    observations, _ = recorder.reset(seed=3)
    assert [env.np_random_seed for env in toys.envs] == [3, 4]
    assert observations.tolist() == [[0.0] * 3] * 2
    observations, rewards, terminated, truncated, infos = recorder.step(np.tile(ACTION, (2, 1)))
    assert observations.tolist() == [[1.0] * 3] * 2
    assert rewards.tolist() == [0.5, 0.5]
    assert terminated.tolist() == truncated.tolist() == [False, False]
    assert infos["score_terms"]["kl_ref"].tolist() == [0.0, 0.0]
    assert recorder.action_space is toys.action_space


# One row's part of the infos.


def test_a_row_has_what_its_masks_say() -> None:
    infos = {
        "score": np.array([0.5, 0.0]),
        "_score": np.array([True, False]),
        "terms": {"a": np.array([1, 2]), "_a": np.array([False, True])},
        "_terms": np.array([True, True]),
        "nothing": {},
        "_nothing": np.array([False, True]),
    }
    assert row_info(infos, 0) == {"score": 0.5, "terms": {}}
    assert row_info(infos, 1) == {"terms": {"a": 2}, "nothing": {}}


def test_a_row_is_of_plain_values_and_its_own() -> None:
    arrays = np.arange(4.0).reshape(2, 2)
    texts = np.array(["x", None], dtype=object)
    infos: dict[str, Any] = {
        "flag": np.array([True, False]),
        "count": np.array([3, 4]),
        "number": np.array([0.5, 0.25], np.float32),
        "array": arrays,
        "text": texts,
        "final_obs": np.array([np.zeros(2), None], dtype=object),
    }
    infos |= {f"_{name}": np.array([True, False]) for name in list(infos)}
    info = row_info(infos, 0)
    assert {name: type(value) for name, value in info.items()} == {
        "flag": bool,
        "count": int,
        "number": float,
        "array": np.ndarray,
        "text": str,
        "final_obs": np.ndarray,
    }
    arrays[0], infos["final_obs"][0][:] = 7.0, 7.0
    assert info["array"].tolist() == [0.0, 1.0]
    assert info["final_obs"].tolist() == [0.0, 0.0]


def test_what_has_no_mask_is_everybodys() -> None:
    # As in gymnasium's own RecordEpisodeStatistics.
    infos = {"episode": {"r": np.array([1.0, 2.0])}, "_episode": np.array([False, True])}
    assert row_info(infos, 0) == {}
    assert row_info(infos, 1) == {"episode": {"r": 2.0}}


def test_an_environment_that_is_practised_on_goes_on_in_the_same_step() -> None:
    env = small_eval_env()
    assert env.autoreset_mode != AutoresetMode.SAME_STEP
    EpisodeRecorder(env).reset(seed=0)
    assert env.autoreset_mode == AutoresetMode.SAME_STEP


def test_an_environment_that_cannot_be_switched_is_refused() -> None:
    recorder = EpisodeRecorder(VectorWrapper(small_eval_env()))
    with pytest.raises(ValueError, match=r"^autoreset_mode must be SAME_STEP to practise, got "):
        recorder.reset(seed=0)
