from __future__ import annotations

from typing import Any

import numpy as np

from agents.surgeons.replay import ReplaySurgeon
from tests.training_runs import ScriptedSurgeon, ToyOperations


class Counting(ScriptedSurgeon):
    """No two of its actions are the same."""

    def act(self, observations: np.ndarray, begins: np.ndarray) -> np.ndarray:
        self.begins = [*getattr(self, "begins", []), begins.tolist()]
        self.n = getattr(self, "n", 0) + 1
        values = self.n / 100 + np.arange(len(observations)) / 1000
        return np.stack([values, -values], axis=1).astype(np.float32)


def replay(n_operations: int = 3, seed: int = 0) -> tuple[ReplaySurgeon, Counting]:
    env: Any = ToyOperations(0.1, 0.2, n_rows=4)
    source = Counting(env)
    return ReplaySurgeon(env, seed, source=source, n_operations=n_operations), source


def rows(surgeon: ReplaySurgeon, n_steps: int) -> list[tuple[float, ...]]:
    observations, begins = np.zeros((4, 3), np.float32), np.zeros(4, np.bool_)
    return [
        tuple(row) for _ in range(n_steps) for row in surgeon.act(observations, begins).tolist()
    ]


def test_every_action_of_the_trained_surgeon_comes_once_in_another_order() -> None:
    surgeon, source = replay()
    assert source.n == 6
    assert source.begins == [[True] * 4, [False] * 4] * 3
    drawn = rows(surgeon, 6)
    expected = sorted(tuple(row) for row in surgeon._actions.tolist())
    assert len(set(expected)) == 24
    assert sorted(drawn) == expected
    assert drawn != [tuple(row) for row in surgeon._actions.tolist()]
    again = rows(surgeon, 6)
    assert sorted(again) == expected
    assert again != drawn


def test_the_seed_decides_the_order() -> None:
    assert rows(replay(seed=1)[0], 6) == rows(replay(seed=1)[0], 6)
    assert rows(replay(seed=1)[0], 6) != rows(replay(seed=2)[0], 6)


def test_fewer_actions_than_rows_are_drawn_again() -> None:
    surgeon, _ = replay(n_operations=1)
    observations = np.zeros((50, 3), np.float32)
    assert surgeon.act(observations, np.ones(50, np.bool_)).shape == (50, 2)


def test_watching_leaves_no_record() -> None:
    surgeon, _ = replay()
    assert [len(surgeon.operate(n)) for n in (0, 2)] == [0, 8]
