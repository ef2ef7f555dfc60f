from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
import pytest
from cmaes import CMA

from agents.surgeons.search import FILE, CMAESSurgeon, EvolutionStrategySurgeon, SearchSurgeon
from tests.training_runs import ToyOperations, first_actions, small_env

KINDS = [CMAESSurgeon, EvolutionStrategySurgeon]
every_kind = pytest.mark.parametrize("kind", KINDS)
BEST = np.array([0.6, -0.3])


class Valley(ToyOperations):
    """Ends with a score that is higher the nearer the coefficients are to BEST."""

    def __init__(self, n_rows: int, episode_length: int = 2) -> None:
        super().__init__(*[0.0] * episode_length, n_rows=n_rows)
        self.config.step_size, self.config.max_coefficient = 0.5, 1.0
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


SLOW: dict[Any, dict[str, float]] = {EvolutionStrategySurgeon: {"learning_rate": 0.05}}
"""Options with which a search comes to rest."""


def ending(surgeon: SearchSurgeon, episode_length: int = 2) -> np.ndarray:
    """Return where the surgeon's own operation ends."""
    reached, observations = np.zeros((1, 2)), np.zeros((1, 3), np.float32)
    for step in range(episode_length):
        actions = surgeon.act(observations, np.array([step == 0]))
        reached = np.clip(reached + 0.5 * actions, -1, 1)
    return reached[0]


@every_kind
@pytest.mark.parametrize("n_rows", [1, 5, 16])
def test_it_finds_the_best_constant_operation(kind: type[SearchSurgeon], n_rows: int) -> None:
    surgeon = make(kind, Valley(n_rows), **SLOW.get(kind, {}))
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
    rounds = surgeon._population // 3
    surgeon.operate(3 * rounds)
    for start in range(0, len(env.seeds), rounds):
        generation = env.seeds[start : start + rounds]
        assert len({seed for row in generation for seed in row}) == 1
    assert len({row[0] for row in env.seeds}) == 3


def test_the_way_to_a_goal_is_the_shortest_and_then_it_holds_still() -> None:
    surgeon = make(EvolutionStrategySurgeon, Valley(1, episode_length=4))
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
    assert surgeon._generations[0][:2] == [3.0, -1.0]
    assert not env.taken[1][1].any()


@every_kind
def test_a_round_is_whole_generations(kind: type[SearchSurgeon]) -> None:
    surgeon = make(kind, Valley(3))
    rounds = surgeon._population // 3
    assert rounds > 1
    for n_operations, n_generations in ((1, 1), (rounds, 1), (rounds + 1, 2), (0, 0)):
        before = surgeon.stats()["surgeon/generations"]
        assert len(surgeon.operate(n_operations)) == n_generations * surgeon._population
        assert surgeon.stats()["surgeon/generations"] == before + n_generations


@every_kind
def test_loading_goes_through_the_search_anew_exactly(
    kind: type[SearchSurgeon], tmp_path: Path
) -> None:
    env, other = Valley(6), Valley(6)
    surgeon = make(kind, env)
    surgeon.operate(12)
    surgeon.save(tmp_path)
    loaded = make(kind, other)
    loaded.operate(4)  # is forgotten
    loaded.load(tmp_path)
    assert ending(loaded).tolist() == ending(surgeon).tolist()
    left, right = ([r.total for r in each.operate(4)] for each in (surgeon, loaded))
    assert left == right
    assert env.seeds[-2:] == other.seeds[-2:]  # which the valley does not look at
    assert ending(loaded).tolist() == ending(surgeon).tolist()


@every_kind
@pytest.mark.parametrize(
    ("rows", "seed", "options", "message"),
    [
        (32, 0, {}, "population must be 16, .*, got 32"),
        (16, 7, {}, "seed must be 0, .*, got 7"),
        (16, 0, {"sigma": 0.05}, "sigma must be 0.[23], .*, got 0.05"),
    ],
)
def test_what_was_made_otherwise_cannot_be_loaded(
    kind: type[SearchSurgeon],
    rows: int,
    seed: int,
    options: dict[str, float],
    message: str,
    tmp_path: Path,
) -> None:
    surgeon = make(kind, Valley(16))
    surgeon.operate(1)
    surgeon.save(tmp_path)
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(kind, Valley(rows), seed, **options).load(tmp_path)
    env = small_env(n_rows=16)  # of four coefficients
    with pytest.raises(ValueError, match=r"^coefficients must be 2, as when .*, got 4$"):
        make(kind, env).load(tmp_path)


@every_kind
def test_a_search_that_leads_elsewhere_now_is_refused(
    kind: type[SearchSurgeon], tmp_path: Path
) -> None:
    surgeon = make(kind, Valley(16))
    surgeon.operate(3)
    surgeon.save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    content["generations"][1].reverse()  # as if other candidates had returned these
    (tmp_path / FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="must lead where it led when it was saved"):
        make(kind, Valley(16)).load(tmp_path)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), None, "abc", True])
def test_numbers_that_a_search_cannot_use_are_refused(value: Any) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"^sigma must be a positive finite number, got "):
            make(kind, Valley(16), sigma=value)
    with pytest.raises(ValueError, match=r"^learning_rate must be a positive finite number, got "):
        make(EvolutionStrategySurgeon, Valley(16), learning_rate=value)


def test_an_evolution_strategy_steps_along_the_trials_that_were_made() -> None:
    surgeon = make(EvolutionStrategySurgeon, Valley(8), sigma=0.2, learning_rate=0.5)
    surgeon._centre = np.array([0.9, 0.0])
    # Of 1.1 the first trial has kept 1: e is (1 - 0.7) / 0.4 = 0.75 in the first coefficient.
    pair = np.array([[1.0, 0.1], [0.7, -0.1]])
    surgeon._tell(pair, np.array([1.0, 3.0]))
    np.testing.assert_allclose(surgeon._best(), [0.9 - 0.5 * 0.75, -0.5 * 0.5], atol=1e-12)


def test_the_trials_of_an_evolution_strategy_are_antithetic_pairs_side_by_side() -> None:
    trials = make(EvolutionStrategySurgeon, Valley(8))._ask(8)
    np.testing.assert_allclose(trials[0::2], -trials[1::2], atol=1e-12)
    assert len(np.unique(trials[:, 0])) == 8


def test_an_evolution_strategys_steps_over_noise_are_as_long_as_it_says() -> None:
    # learning_rate * sqrt(2 A / P) = 0.2 * sqrt(2 * 2 / 64) = 0.05
    lengths = []
    for seed in range(50):
        surgeon = make(EvolutionStrategySurgeon, Valley(64), seed)
        surgeon._tell(surgeon._ask(64), np.random.default_rng(seed + 9).normal(size=64))
        lengths.append(np.square(surgeon._best()).sum())
    assert np.sqrt(np.mean(lengths)) == pytest.approx(0.05, rel=0.2)


def test_the_covariance_search_learns_slowly_where_returns_are_noise() -> None:
    def strayed(n_rows: int = 16) -> float:
        surgeon, noise = make(CMAESSurgeon, Valley(n_rows)), np.random.default_rng(1)
        for _ in range(40):
            surgeon._tell(surgeon._ask(n_rows), noise.normal(size=n_rows))
        return float(np.linalg.norm(surgeon._best()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmaes, "CMA", lambda **given: CMA(**{**given, "lr_adapt": False}))
        without = strayed()
    assert strayed() < without / 3


@every_kind
def test_one_coefficient_is_enough(kind: type[SearchSurgeon]) -> None:
    env = small_env(operator="output_temperature")
    assert len(env.operator.labels) == 1
    assert len(make(kind, env).operate(4)) >= 4
