from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons.search import FILE, CMAESSurgeon, HillClimbSurgeon, SearchSurgeon
from tests.training_runs import ToyOperations, first_actions, small_env

KINDS = [CMAESSurgeon, HillClimbSurgeon]
every_kind = pytest.mark.parametrize("kind", KINDS)
BEST = np.array([0.6, -0.3])


class Valley(ToyOperations):
    """Ends with a score that is higher the nearer the coefficients are to BEST."""

    def __init__(self, n_rows: int, n_incisions: int = 2) -> None:
        super().__init__(*[0.0] * n_incisions, n_rows=n_rows)
        self.config.step_size = 0.5
        self.reached = np.zeros((n_rows, 2))
        self.paid = np.zeros(n_rows)
        self.taken: list[np.ndarray] = []
        self.seeds: list[Any] = []

    def reset(self, **keywords: Any) -> Any:
        self.seeds.append(keywords.get("seed"))
        self.reached[:], self.paid[:] = 0.0, -np.square(BEST).sum()
        return super().reset(**keywords)

    def step(self, actions: np.ndarray) -> Any:
        self.taken.append(actions.copy())
        self.reached = np.clip(self.reached + 0.5 * actions, -1, 1)
        score = -np.square(self.reached - BEST).sum(1)
        for env, reward in zip(self.envs, score - self.paid, strict=True):
            env.rewards = (float(reward),) * len(env.rewards)
        self.paid = score
        return super().step(actions)


def make(kind: type[SearchSurgeon], env: Any, seed: int = 0, **options: Any) -> Any:
    return kind(env, seed, **options)  # type: ignore[arg-type]


def ending(surgeon: SearchSurgeon, n_incisions: int = 2) -> np.ndarray:
    """Return where the surgeon's own operation ends."""
    reached, observations = np.zeros((1, 2)), np.zeros((1, 3), np.float32)
    for step in range(n_incisions):
        actions = surgeon.act(observations, np.array([step == 0]))
        reached = np.clip(reached + 0.5 * actions, -1, 1)
    return reached[0]


@every_kind
@pytest.mark.parametrize("n_rows", [1, 5, 16])
def test_it_finds_the_best_constant_operation(kind: type[SearchSurgeon], n_rows: int) -> None:
    surgeon = make(kind, Valley(n_rows))
    surgeon.operate(600 // n_rows)
    np.testing.assert_allclose(ending(surgeon), BEST, atol=0.12)


@every_kind
def test_it_begins_at_doing_nothing(kind: type[SearchSurgeon]) -> None:
    surgeon = make(kind, Valley(4))
    assert not first_actions(surgeon, np.zeros((3, 3), np.float32)).any()


@every_kind
def test_a_generation_is_tried_on_the_same_prompts(kind: type[SearchSurgeon]) -> None:
    env = Valley(3)
    surgeon = make(kind, env)
    surgeon.operate(3 * surgeon._population // 3)
    rounds = surgeon._population // 3
    for start in range(0, len(env.seeds), rounds):
        generation = env.seeds[start : start + rounds]
        assert len({seed for row in generation for seed in row}) == 1
    assert len({row[0] for row in env.seeds}) == 3


def test_the_way_to_a_goal_is_the_shortest_and_then_it_holds_still() -> None:
    surgeon = make(HillClimbSurgeon, Valley(1, n_incisions=4))
    surgeon._centre = np.array([0.7, -0.2])
    observations = np.zeros((1, 3), np.float32)
    taken = [surgeon.act(observations, np.array([step == 0])) for step in range(4)]
    np.testing.assert_allclose(taken[0], [[1.0, -0.4]], atol=1e-6)
    np.testing.assert_allclose(taken[1], [[0.4, 0.0]], atol=1e-6)
    assert not taken[1][0, 1]
    assert not np.concatenate(taken[2:]).any()


@every_kind
def test_a_row_that_dies_is_paid_what_it_earned_and_moves_no_more(
    kind: type[SearchSurgeon],
) -> None:
    env = Valley(2)
    surgeon = make(kind, env)
    env.envs[1].rewards = (0.0,)  # dies at once

    def pays(actions: np.ndarray) -> Any:
        env.taken.append(actions.copy())
        env.envs[0].rewards, env.envs[1].rewards = (1.0, 2.0), (-1.0,)
        return ToyOperations.step(env, actions)

    env.step = pays  # type: ignore[method-assign]
    surgeon.operate(1)
    assert surgeon._returns == [3.0, -1.0] or surgeon._generations[0][:2] == [3.0, -1.0]
    assert not env.taken[1][1].any()


@every_kind
def test_loading_goes_through_the_search_anew_exactly(
    kind: type[SearchSurgeon], tmp_path: Path
) -> None:
    surgeon = make(kind, Valley(6))
    surgeon.operate(12)
    surgeon.save(tmp_path)
    loaded = make(kind, Valley(6))
    loaded.load(tmp_path)
    assert ending(loaded).tolist() == ending(surgeon).tolist()
    left, right = ([r.total for r in each.operate(4)] for each in (surgeon, loaded))
    assert left == right
    assert ending(loaded).tolist() == ending(surgeon).tolist()


@every_kind
def test_what_does_not_fit_cannot_be_loaded(kind: type[SearchSurgeon], tmp_path: Path) -> None:
    surgeon = make(kind, Valley(16))
    surgeon.operate(1)
    surgeon.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["population"] == 16
    with pytest.raises(ValueError, match=r"^rows must make generations of 16, .*, got 32$"):
        make(kind, Valley(32)).load(tmp_path)
    with pytest.raises(ValueError, match=r"^surgeon must be new"):
        surgeon.load(tmp_path)


@every_kind
def test_one_coefficient_is_enough(kind: type[SearchSurgeon]) -> None:
    env = small_env(operator="output_temperature")
    assert len(env.operator.labels) == 1
    assert len(make(kind, env).operate(4)) >= 4
