from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons.registry import load_surgeon, make_surgeon, save_surgeon
from agents.surgeons.search import FILE, Approach
from tests.training_runs import ToyOperations, small_env

every_search = pytest.mark.parametrize("name", ["cma_es", "es"])
BEST = np.array([0.6, -0.3])


class Valley(ToyOperations):
    """Ends with a score that is higher the nearer the coefficients are to BEST, plus noise."""

    def __init__(self, n_rows: int, noise: float = 0.0) -> None:
        super().__init__(0.0, 0.0, n_rows=n_rows)
        self.config.step_size, self.config.max_coefficient = 0.5, 1.0
        self.reached = np.zeros((n_rows, 2))
        self.paid = np.zeros(n_rows)
        self.noise = noise
        self.rng = np.random.default_rng(1)
        self.seeds: list[Any] = []
        self.starts: list[np.ndarray] = []

    def reset(self, **keywords: Any) -> Any:
        self.seeds.append(keywords.get("seed"))
        self.reached[:], self.paid[:] = 0.0, -np.square(BEST).sum()
        return super().reset(**keywords)

    def step(self, actions: np.ndarray) -> Any:
        if not self.reached.any():
            self.starts.append(actions.copy())
        self.reached = np.clip(self.reached + 0.5 * actions, -1, 1)
        score = -np.square(self.reached - BEST).sum(1)
        if self.noise:
            score = self.noise * self.rng.normal(size=len(score))
        for env, reward in zip(self.envs, score - self.paid, strict=True):
            env.rewards = (float(reward),) * len(env.rewards)
        self.paid = score
        return super().step(actions)


def make(name: str, env: Any, seed: int = 0, **options: Any) -> Any:
    return make_surgeon(name, env, seed, options)


def ending(surgeon: Any) -> np.ndarray:
    """Return where the surgeon's own operation ends."""
    reached, observations = np.zeros((1, 2)), np.zeros((1, 3), np.float32)
    for step in range(2):
        actions = surgeon.act(observations, np.array([step == 0]))
        reached = np.clip(reached + 0.5 * actions, -1, 1)
    return reached[0]


@every_search
@pytest.mark.parametrize("n_rows", [1, 5, 16])
def test_it_starts_at_nothing_and_finds_the_best_constant_operation(name: str, n_rows: int) -> None:
    options = {"learning_rate": 0.05} if name == "es" else {}
    surgeon = make(name, Valley(n_rows), **options)
    assert not ending(surgeon).any()
    surgeon.operate(600 // n_rows)
    np.testing.assert_allclose(ending(surgeon), BEST, atol=0.12)


@every_search
def test_a_generation_is_tried_whole_and_on_the_same_prompts(name: str) -> None:
    env = Valley(3)
    surgeon = make(name, env)
    n_tried = len(surgeon.operate(1))
    assert n_tried > 3
    assert n_tried % 6 == 0  # pairs, on whole rounds
    assert len({seed for row in env.seeds for seed in row}) == 1
    assert len(surgeon.operate(n_tried // 3 + 1)) == 2 * n_tried
    assert len({seed for row in env.seeds for seed in row}) == 3
    assert surgeon.stats() == {"surgeon/generations": 3.0}
    assert surgeon.operate(0) == []


def test_the_way_to_a_goal_is_the_shortest_and_then_it_holds_still() -> None:
    approach = Approach(np.array([[0.7, -0.2]]), step_size=0.5, reach=1.0)
    observations = np.zeros((1, 3), np.float32)
    taken = [approach(observations, np.array([step == 0])) for step in range(4)]
    np.testing.assert_allclose(taken[0], [[1.0, -0.4]], atol=1e-6)
    np.testing.assert_allclose(taken[1], [[0.4, 0.0]], atol=1e-6)
    assert not taken[1][0, 1]
    assert not np.concatenate(taken[2:]).any()
    assert np.array_equal(approach(observations, np.array([True])), taken[0])


@every_search
def test_a_candidate_that_flatlines_is_paid_its_first_return(name: str, tmp_path: Path) -> None:
    env = Valley(2)
    surgeon = make(name, env)
    env.envs[1].rewards = (0.0,)

    def pays(actions: np.ndarray) -> Any:
        env.envs[0].rewards, env.envs[1].rewards = (1.0, 2.0), (-1.0,)
        return ToyOperations.step(env, actions)

    env.step = pays  # type: ignore[method-assign]
    records = surgeon.operate(1)
    assert [(r.row, r.total) for r in records[:2]] == [(1, -1.0), (0, 3.0)]
    surgeon.save(tmp_path)
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert content["generations"][0][:2] == [3.0, -1.0]


@every_search
def test_loading_repeats_the_search_exactly(name: str, tmp_path: Path) -> None:
    env, other = Valley(6), Valley(6)
    surgeon = make(name, env)
    surgeon.operate(12)
    surgeon.save(tmp_path)
    loaded = make(name, other)
    loaded.operate(4)  # is forgotten
    loaded.load(tmp_path)
    assert ending(loaded).tolist() == ending(surgeon).tolist()
    left, right = ([r.total for r in each.operate(4)] for each in (surgeon, loaded))
    assert left == right
    assert env.seeds[-2:] == other.seeds[-2:]
    assert ending(loaded).tolist() == ending(surgeon).tolist()


@every_search
@pytest.mark.parametrize(
    ("rows", "seed", "options", "message"),
    [
        (32, 0, {}, "population .*16.*32"),
        (16, 7, {}, "seed .*0.*7"),
        (16, 0, {"sigma": 0.05}, r"sigma .*0\.05"),
        (None, 0, {}, "coefficients .*2.*4"),
    ],
)
def test_what_was_made_otherwise_cannot_be_loaded(
    name: str, rows: int | None, seed: int, options: dict[str, float], message: str, tmp_path: Path
) -> None:
    surgeon = make(name, Valley(16))
    surgeon.operate(1)
    surgeon.save(tmp_path)
    env = small_env(n_rows=16) if rows is None else Valley(rows)  # of four coefficients
    with pytest.raises(ValueError, match=message):
        make(name, env, seed, **options).load(tmp_path)


@every_search
def test_a_stored_search_that_leads_elsewhere_now_is_refused(name: str, tmp_path: Path) -> None:
    env: Any = Valley(16)
    surgeon = make(name, env)
    surgeon.operate(3)
    save_surgeon(surgeon, tmp_path, name, 0)
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    content["generations"][1].reverse()  # as if other candidates had returned these
    (tmp_path / FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"surgeon .*another version"):
        load_surgeon(tmp_path, env)


def test_candidates_of_an_evolution_strategy_are_antithetic_pairs() -> None:
    env = Valley(8)
    make("es", env, learning_rate=0.0).operate(1)
    (actions,) = env.starts
    np.testing.assert_allclose(actions[0::2], -actions[1::2], atol=1e-6)
    assert len(np.unique(actions[:, 0])) == 8


def test_an_evolution_strategys_steps_over_noise_are_as_long_as_it_says() -> None:
    # learning_rate * sqrt(2 A / P) = 0.2 * sqrt(2 * 2 / 64) = 0.05
    lengths = []
    for seed in range(20):
        surgeon = make("es", Valley(64, noise=1.0), seed)
        surgeon.operate(1)
        lengths.append(np.square(ending(surgeon)).sum())
    assert np.sqrt(np.mean(lengths)) == pytest.approx(0.05, rel=0.3)
