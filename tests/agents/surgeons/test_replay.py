from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons.episodes import ReplaySurgeon
from agents.surgeons.registry import load_surgeon, make_surgeon, save_surgeon
from tests.training_runs import ScriptedSurgeon, ToyOperations, first_actions, small_env


class Counting(ScriptedSurgeon):
    """No two of its actions are the same: step, row and operation can be read off."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.n = 0
        self.begins: list[list[bool]] = []

    def act(self, observations: np.ndarray, begins: np.ndarray) -> np.ndarray:
        self.begins.append(begins.tolist())
        self.n += 1
        # a step sees the number of those before it.
        values = observations[:, 0] / 10 + self.n / 1000 + np.arange(len(observations)) / 10_000
        return np.stack([values, -values], axis=1).astype(np.float32)


class Watched(ToyOperations):
    """Remembers what was done."""

    def __init__(self, *rewards: float) -> None:
        super().__init__(*rewards, n_rows=4)
        self.taken: list[np.ndarray] = []

    def step(self, actions: np.ndarray) -> Any:
        self.taken.append(actions.copy())
        return super().step(actions)


def replay(n_operations: int = 1, seed: int = 0, *rewards: float) -> tuple[Any, Counting, Watched]:
    env = Watched(*(rewards or (0.1, 0.2)))
    source = Counting(env)
    surgeon = ReplaySurgeon(env, seed, source=source, n_operations=n_operations)  # type: ignore[arg-type]
    return surgeon, source, env


def rows(actions: np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(row) for row in actions.tolist()]


def test_every_step_is_dealt_once_among_the_rows_and_keeps_its_place() -> None:
    surgeon, source, env = replay()
    assert len(surgeon.operate(1)) == 4
    assert source.begins == [[True] * 4, [False] * 4]
    first, second, *replayed = env.taken  # two that were watched, two of its own
    orders = []
    for seen, done in zip((first, second), replayed, strict=True):
        assert len(set(rows(seen))) == 4
        assert sorted(rows(done)) == sorted(rows(seen))
        orders.append([rows(seen).index(row) for row in rows(done)])
    assert orders[0] != orders[1]  # the steps of an operation come from different ones


def test_an_operation_in_a_fixed_order_is_replayed_as_it_is() -> None:
    # The source does the same on every row: blind, it loses nothing by not looking.
    surgeon, source, env = replay()
    script = {True: [1.0, -0.5], False: [-0.25, 0.75]}
    source.act = lambda o, begins: np.array([script[b] for b in begins.tolist()], np.float32)  # type: ignore[method-assign]
    surgeon.operate(2)
    expected = [[script[True]] * 4, [script[False]] * 4] * 3
    assert [actions.tolist() for actions in env.taken] == expected


def test_actions_come_from_all_the_operations_that_were_watched() -> None:
    surgeon, _, env = replay(n_operations=3)
    surgeon.operate(2)
    watched, replayed = env.taken[:6], env.taken[6:]
    for k in range(2):
        seen = [row for actions in watched[k::2] for row in rows(actions)]
        done = [row for actions in replayed[k::2] for row in rows(actions)]
        assert set(done) <= set(seen)
        assert not set(done) <= set(rows(watched[k]))


def test_the_trained_surgeon_is_watched_anew_in_every_round() -> None:
    surgeon, source, env = replay()
    assert source.n == 0  # as yet nobody has operated
    surgeon.operate(1)
    assert source.n == 2
    surgeon.operate(3)
    assert source.n == 4
    assert set(rows(env.taken[-1])) <= set(rows(env.taken[5]))


def test_who_only_acts_watches_once_and_leaves_no_trace() -> None:
    env = small_env()
    source = make_surgeon("zero", env, 0)
    surgeon = ReplaySurgeon(env, 0, source=source)
    observations, _ = env.reset(seed=3)
    env.step(np.full((2, 4), 0.2, np.float32))  # the operation under way
    before = env.get_state()
    first_actions(surgeon, observations)
    seen = surgeon._seen
    assert [actions.shape for actions in seen] == [(2, 4)] * 2
    first_actions(surgeon, observations)
    assert surgeon._seen is seen
    after = env.get_state()
    assert [rng.bit_generator.state for rng in after["rngs"]] == [
        rng.bit_generator.state for rng in before["rngs"]
    ]
    assert [e.coefficients.tolist() for e in after["episodes"]] == [[pytest.approx(0.1)] * 4] * 2
    # A round begins with the prompts that it would have begun with.
    other = ReplaySurgeon(small_env(), 0, source=source)
    first_actions(surgeon, observations)
    left, right = surgeon.operate(1), other.operate(1)
    assert [r.baseline_terms for r in left] == [r.baseline_terms for r in right]


def test_where_a_patient_died_its_row_begins_at_the_first_step() -> None:
    surgeon, _, env = replay(1, 0, 0.1, 0.2, 0.3)
    env.envs[1].rewards = (-1.0, 0.2)  # its operations have two steps
    surgeon.operate(1)
    numbers = [[round(row[0], 1) for row in rows(actions)] for actions in env.taken]
    assert [seen.shape[0] for seen in surgeon._seen] == [5, 4, 3]
    assert numbers == [[0.0] * 4, [0.1] * 4, [0.2, 0.0, 0.2, 0.2]] * 2


def test_later_steps_than_were_seen_are_the_last_that_were() -> None:
    surgeon, _, env = replay()
    for toy in env.envs:
        toy.rewards = (-1.0,)  # nobody lives to see the second
    surgeon.operate(1)
    assert len(surgeon._seen) == 1
    for toy in env.envs:
        toy.rewards = (0.1, 0.2)
    observations = np.zeros((4, 3), np.float32)
    for begins in (np.ones(4, np.bool_), np.zeros(4, np.bool_)):
        assert set(rows(surgeon.act(observations, begins))) <= set(rows(surgeon._seen[0]))


def test_the_seed_decides_the_order() -> None:
    def taken(seed: int) -> list[list[list[float]]]:
        surgeon, _, env = replay(seed=seed)
        surgeon.operate(3)
        return [actions.tolist() for actions in env.taken]

    assert taken(1) == taken(1)
    assert taken(1) != taken(2)


def test_fewer_actions_than_rows_are_dealt_again() -> None:
    surgeon, _, _ = replay()
    actions = first_actions(surgeon, np.zeros((10, 3), np.float32))
    counts = [rows(actions).count(row) for row in set(rows(actions))]
    assert sorted(counts) == [2, 2, 3, 3]


def test_watching_leaves_no_record() -> None:
    surgeon, _, _ = replay()
    assert [len(surgeon.operate(n)) for n in (0, 2)] == [0, 8]


@pytest.mark.parametrize("n_operations", [0, -1, 1.5, "2", True, None])
def test_there_must_be_something_to_watch(n_operations: Any) -> None:
    with pytest.raises(ValueError, match=r"^n_operations must be an integer of at least 1, got "):
        replay(n_operations)


def test_a_saved_replay_needs_nobody_elses_folder(tmp_path: Path) -> None:
    env = small_env()
    trained = make_surgeon("es", env, 4, {"sigma": 0.5})
    trained.operate(1)
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for folder in (theirs, mine):
        folder.mkdir()
    save_surgeon(trained, theirs, "es", 4, {"sigma": 0.5})
    options = {"source": str(theirs)}
    save_surgeon(make_surgeon("replay", env, 0, options), mine, "replay", 0, options)
    shutil.rmtree(theirs)
    loaded = load_surgeon(mine, env)
    observations, _ = env.reset(seed=0)
    expected = first_actions(trained, observations)
    assert expected.any()
    assert first_actions(loaded, observations).tolist() == expected.tolist()


def test_a_folder_may_be_called_by_a_number(tmp_path: Path, monkeypatch: Any) -> None:
    env = small_env()
    (tmp_path / "2024").mkdir()
    save_surgeon(make_surgeon("zero", env, 0), tmp_path / "2024", "zero", 0)
    monkeypatch.chdir(tmp_path)
    assert len(make_surgeon("replay", env, 0, {"source": 2024}).operate(1)) == 2
