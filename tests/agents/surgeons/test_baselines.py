from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons.baselines import RandomSurgeon, ReplaySurgeon, ZeroSurgeon
from agents.surgeons.registry import load_surgeon, make_surgeon, save_surgeon
from tests.training_runs import ScriptedSurgeon, ToyOperations, first_actions, small_env


def test_the_zero_surgeon_is_paid_exactly_nothing() -> None:
    for record in ZeroSurgeon(small_env(n_rows=3), 0).operate(2):
        assert (record.total, record.mean_abs_action) == (0.0, 0.0)
        assert not record.coefficients.any()
        assert record.terms == record.baseline_terms


def test_a_round_draws_new_prompts_and_continues_the_generators() -> None:
    def losses(*rounds: int) -> list[float]:
        surgeon = ZeroSurgeon(small_env(n_rows=1), 5)
        records = [record for n in rounds for record in surgeon.operate(n)]
        return [record.baseline_terms["heldout_loss"] for record in records]

    whole = losses(4)
    assert len(set(whole)) == 4
    # A round has drawn the prompts of one more operation, which is broken off.
    assert losses(1, 2) == [whole[0], whole[2], whole[3]]


def test_random_actions_are_uniform_and_independent_of_the_prompts() -> None:
    env: Any = ToyOperations(1.0, n_rows=4)
    surgeon = RandomSurgeon(env, 11)
    surgeon.operate(1)  # seeds the rows
    numbers = [row.np_random.uniform(-1.0, 1.0, 200).astype(np.float32) for row in env.envs]
    drawn = first_actions(surgeon, np.zeros((2000, 3), np.float32))
    assert (drawn.shape, drawn.dtype) == ((2000, 2), np.float32)
    # Uniform on [-1, 1]: mean 0, standard deviation 0.577, of the mean of 2000 0.013.
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.06)
    np.testing.assert_allclose(drawn.std(0), 3**-0.5, atol=0.03)
    assert 0.95 < np.abs(drawn).max() <= 1.0
    assert len(set(drawn.ravel().tolist())) > 3990
    assert set(np.concatenate(numbers).tolist()).isdisjoint(drawn.ravel().tolist())


# Replay.


class Counting(ScriptedSurgeon):
    """No two of its actions are the same; the first digits tell the step."""

    n = 0

    def act(self, observations: np.ndarray, begins: np.ndarray) -> np.ndarray:
        self.n += 1
        values = observations[:, 0] / 10 + self.n / 1000 + np.arange(len(observations)) / 10_000
        return np.stack([values, -values], axis=1).astype(np.float32)


class Watched(ToyOperations):
    """Remembers the actions."""

    def __init__(self, *rewards: float) -> None:
        super().__init__(*rewards, n_rows=4)
        self.taken: list[np.ndarray] = []

    def step(self, actions: np.ndarray) -> Any:
        self.taken.append(actions.copy())
        return super().step(actions)


def replay(
    n_operations: int = 1, seed: int = 0, rewards: tuple[float, ...] = (0.1, 0.2)
) -> tuple[ReplaySurgeon, Counting, Watched]:
    env: Any = Watched(*rewards)
    source = Counting(env)
    return ReplaySurgeon(env, seed, source=source, n_operations=n_operations), source, env


def rows(actions: np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(row) for row in actions.tolist()]


def test_every_step_is_dealt_once_among_the_rows_and_keeps_its_place() -> None:
    surgeon, source, env = replay()
    assert len(surgeon.operate(1)) == 4  # watching leaves no record
    first, second, *replayed = env.taken
    orders = []
    for seen, done in zip((first, second), replayed, strict=True):
        assert sorted(rows(done)) == sorted(rows(seen))
        orders.append([rows(seen).index(row) for row in rows(done)])
    assert orders[0] != orders[1]  # the steps of an operation come from different ones
    surgeon.operate(1)
    assert source.n == 4  # watched anew
    assert set(rows(env.taken[-1])) == set(rows(env.taken[5]))


def test_actions_come_from_all_the_operations_that_were_watched_in_the_order_of_the_seed() -> None:
    def taken(seed: int) -> list[np.ndarray]:
        surgeon, _, env = replay(3, seed)
        surgeon.operate(2)
        return env.taken

    found = taken(1)
    for k in range(2):
        seen = [row for actions in found[k:6:2] for row in rows(actions)]
        done = [row for actions in found[6 + k :: 2] for row in rows(actions)]
        assert set(done) <= set(seen)
        assert not set(done) <= set(rows(found[k]))
    assert np.array_equal(found, taken(1))
    assert not np.array_equal(found, taken(2))


def test_a_saved_replay_does_not_need_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = small_env()
    trained = make_surgeon("es", env, 4, {"sigma": 0.5})
    trained.operate(1)
    monkeypatch.chdir(tmp_path)
    for folder in ("2024", "mine"):
        Path(folder).mkdir()
    save_surgeon(trained, "2024", "es", 4, {"sigma": 0.5})
    options = {"source": 2024}  # as a command line reads the name of a folder
    save_surgeon(make_surgeon("replay", env, 0, options), "mine", "replay", 0, options)
    shutil.rmtree("2024")
    loaded = load_surgeon("mine", env)
    observations, _ = env.reset(seed=0)
    expected = first_actions(trained, observations)
    assert expected.any()
    assert first_actions(loaded, observations).tolist() == expected.tolist()
