from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents.surgeons.episodes import EpisodeRecord, EpisodeRecorder, play, row_info
from tests.training_runs import ScriptedSurgeon, ToyOperations, small_env

ACTION = np.array([0.5, -1.0], np.float32)


def perform(recorder: EpisodeRecorder, n_steps: int) -> None:
    recorder.reset()
    for _ in range(n_steps):
        recorder.step(np.tile(ACTION, (recorder.num_envs, 1)))


def test_an_operation_that_ends_leaves_one_record() -> None:
    recorder = EpisodeRecorder(ToyOperations(0.5, -0.25, 1.0))
    recorder.reset()
    for scale in (1.0, 0.0, 0.5):
        recorder.step(scale * ACTION[None])
    (found,) = recorder.collect()
    assert found.coefficients.tolist() == [0.3, 0.3]
    expected: dict[str, Any] = {
        "total": 1.25,
        "length": 3,
        "mean_abs_action": 0.375,  # (0.75 + 0 + 0.375) / 3
        "coefficients": found.coefficients,
        "flatline": None,
        "terms": {"kl_ref": 2.0},
        "baseline_terms": {"kl_ref": -1.0},
        "lost_score": 0.25,
        "row": 0,
    }
    assert found == EpisodeRecord(**expected)
    assert type(found.total) is type(found.mean_abs_action) is float
    assert recorder.collect() == []


def test_rows_are_recorded_in_the_order_in_which_they_end() -> None:
    toys = ToyOperations(1.0, 2.0, 4.0, n_rows=3)
    toys.envs[1].rewards = (-1.0,)  # flatlines at once, again and again
    toys.envs[1].flatline = "entropy"
    actions = np.array([[0.25, 0.25], [0.5, -1.0], [0.0, 0.0]], np.float32)
    found = play(toys, lambda *_: actions, seed=0, n_steps=3)
    death = (1, -1.0, 1, 0.75, "entropy")
    survivors = [(0, 7.0, 3, 0.25, None), (2, 7.0, 3, 0.0, None)]
    shown = [(r.row, r.total, r.length, r.mean_abs_action, r.flatline) for r in found]
    assert shown == [death, death, survivors[0], death, survivors[1]]
    once = play(toys, lambda *_: actions, seed=0)
    shown = [(r.row, r.total, r.length, r.mean_abs_action, r.flatline) for r in once]
    assert shown == [death, *survivors]


def test_the_policy_is_told_where_operations_begin() -> None:
    toys = ToyOperations(1.0, 2.0, n_rows=2)
    toys.envs[1].rewards = (-1.0,)
    begins: list[list[bool]] = []

    def act(observations: np.ndarray, mask: np.ndarray) -> np.ndarray:
        begins.append(mask.tolist())
        return np.zeros((2, 2), np.float32)

    play(toys, act, seed=7, n_steps=3)
    assert begins == [[True, True], [False, True], [True, True]]
    assert [env.np_random_seed for env in toys.envs] == [7, 8]


def test_operations_that_were_broken_off_leave_nothing() -> None:
    recorder = EpisodeRecorder(ToyOperations(5.0, 1.0, n_rows=2))
    perform(recorder, 1)
    assert recorder.collect() == []
    perform(recorder, 2)
    assert [(r.total, r.length) for r in recorder.collect()] == [(6.0, 2)] * 2


@pytest.mark.parametrize("limit", [None, 3])
def test_records_are_the_same_in_both_autoreset_modes(limit: int | None) -> None:
    """NEXT_STEP spends a step on every reset, which does not count."""
    steps = {AutoresetMode.SAME_STEP: 6, AutoresetMode.NEXT_STEP: 7}
    found = {}
    for mode, n_steps in steps.items():
        env = small_env(episode_length=3 if limit is None else 5, max_episode_steps=limit)
        env.autoreset_mode = mode
        found[mode] = play(env, ScriptedSurgeon(env, 0.1).act, seed=0, n_steps=n_steps)
    left, right = found.values()
    assert len(left) == len(right) == 4
    for one, other in zip(left, right, strict=True):
        assert (one.length, one.total) == (other.length, other.total)
        assert one.mean_abs_action == other.mean_abs_action == pytest.approx(0.1)


def test_one_rows_infos_are_plain_values_and_copies() -> None:
    arrays = np.arange(4.0).reshape(2, 2)
    infos: dict[str, Any] = {
        "flag": np.array([True, False]),
        "number": np.array([0.5, 0.25], np.float32),
        "array": arrays,
        "text": np.array(["x", None], dtype=object),
        "terms": {"a": np.array([1, 2]), "_a": np.array([False, True])},
        "unmasked": {"r": np.array([1.0, 2.0])},
    }
    infos |= {f"_{name}": np.array([True, name == "terms"]) for name in list(infos)[:-1]}
    first = row_info(infos, 0)
    assert first.pop("array").tolist() == [0.0, 1.0]
    assert first == {"flag": True, "number": 0.5, "text": "x", "terms": {}, "unmasked": {"r": 1.0}}
    assert row_info(infos, 1) == {"terms": {"a": 2}, "unmasked": {"r": 2.0}}
    copied = row_info(infos, 0)["array"]
    arrays[0] = 7.0
    assert copied.tolist() == [0.0, 1.0]
    assert {type(first["flag"]), type(first["number"])} == {bool, float}
