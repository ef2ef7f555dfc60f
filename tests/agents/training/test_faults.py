"""Numbers that are not finite: nothing is learned from them, and a run that diverges says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from agents.errors import DivergedError
from agents.grpo.config import GRPOConfig
from agents.grpo.estimators import ESTIMATORS
from agents.training.curriculum import MOST_BAD_UPDATES
from avatarl_env.scoring import BOUND, TERMS, Generations
from tests.agents.training.broken_runs import QUICK, assert_same_run, surgeon_parameters
from tests.training_runs import (
    SmallRun,
    final_weights,
    rows_of,
    small_curriculum,
)

NAN, INF = float("nan"), float("inf")
LONG: dict[str, Any] = {
    "surgeon": "none",
    "checkpoint_seconds": 0.0,
    "curriculum": small_curriculum(bootstrap_updates=MOST_BAD_UPDATES + 6, joint_rounds=0),
}
"""A run with updates enough to diverge."""


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a function that makes some updates of an estimator pay a reward of `value`."""

    def poison(
        at: Callable[[int], bool], *, value: float = NAN, name: str = "proper_maxrl"
    ) -> list[int]:
        estimator, calls = ESTIMATORS[name], [0]
        assert estimator.sampled is not None
        honest = estimator.sampled.reward

        def reward(*arguments: Tensor) -> Tensor:
            rewards = honest(*arguments)
            if at(calls[0]):
                rewards[0, 0] = value
            calls[0] += 1
            return rewards

        poisoned = estimator._replace(sampled=estimator.sampled._replace(reward=reward))
        monkeypatch.setitem(ESTIMATORS, name, poisoned)
        return calls

    return poison


@pytest.mark.parametrize(("estimator", "value"), [("proper_maxrl", NAN), ("grpo", -INF)])
def test_a_run_skips_and_counts_updates_with_such_a_reward(
    estimator: str, value: float, small_run: SmallRun, poison: Callable[..., list[int]]
) -> None:
    poison(lambda n: n in (1, 4), value=value, name=estimator)
    grpo = GRPOConfig(estimator=estimator, batch_size=2, group_size=4)
    run = small_run(surgeon="none", grpo=grpo)
    assert run.summary["skipped_updates"] == 2
    found = {row["update"]: row for row in rows_of(run, "grpo")}
    assert {n: row["grpo/skipped"] for n, row in found.items()} == {1: 0, 5: 2, 10: 2}
    assert found[5]["grpo/loss"] is None
    assert all(weight.isfinite().all() for weight in final_weights(run).values())


def test_a_run_that_diverges_goes_back_to_its_last_checkpoint_once(
    small_run: SmallRun, poison: Callable[..., list[int]]
) -> None:
    expected = small_run("expected", **LONG)
    calls = poison(lambda n: 3 <= n < 3 + MOST_BAD_UPDATES)
    run = small_run(**LONG)
    assert calls == [MOST_BAD_UPDATES + LONG["curriculum"].n_updates]
    assert_same_run(run.folder, expected.folder)


@pytest.mark.parametrize(("seconds", "attempts"), [(0.0, 2), (60.0, 1)])
def test_a_run_that_diverges_again_or_without_a_checkpoint_ends_with_an_error(
    seconds: float,
    attempts: int,
    small_run: SmallRun,
    tmp_path: Path,
    poison: Callable[..., list[int]],
) -> None:
    calls = poison(lambda n: n >= 3)
    last = 3 + MOST_BAD_UPDATES
    with pytest.raises(DivergedError, match=f"{MOST_BAD_UPDATES} updates .* up to update {last}$"):
        small_run(**{**LONG, "checkpoint_seconds": seconds})
    assert calls == [3 + attempts * MOST_BAD_UPDATES]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_surgeon_is_paid_finite_rewards_whatever_the_score(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    term, calls = TERMS["kl_ref"], itertools.count()
    values = itertools.cycle([NAN, INF, -INF])

    def measure(generations: Generations, reference: Any) -> Any:
        scores = np.array(term.measure(generations, reference))
        if next(calls) % 3 == 2:
            scores[0] = next(values)
        return scores

    monkeypatch.setitem(TERMS, "kl_ref", term._replace(measure=measure))
    run = small_run(surgeon_options=QUICK)
    names = ("score/kl_ref", "baseline/kl_ref", "surgeon/return")
    paid = np.array([[row[name] for name in names] for row in rows_of(run, "operation")])
    assert BOUND <= np.abs(paid).max() <= 2 * BOUND  # clipped, as documented
    for tensor in (*final_weights(run).values(), *surgeon_parameters(run.folder).values()):
        assert tensor.isfinite().all()


def test_a_surgeon_that_diverges_ends_the_run_with_an_error(
    small_run: SmallRun, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"^the surgeon's \S+ must be numbers of at most"):
        small_run(surgeon_options={**QUICK, "learning_rate": 1e30})
    assert not (tmp_path / "run" / "summary.json").exists()
