"""Numbers that are none: whatever they come from, nothing is learned from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from agents.errors import DivergedError
from agents.grpo.estimators import ESTIMATORS
from agents.grpo.learner import GRPOConfig, GRPOLearner
from agents.training.loop import RunSummary, train
from avatarl_env.scoring import BOUND, TERMS, Generations
from tests.agents.training.broken_runs import (
    QUICK,
    assert_same_run,
    config,
    rows,
    surgeon_parameters,
)
from tests.training_runs import everything, fresh_model, make_learner, same


def assert_finite(run: RunSummary) -> None:
    """Check that a run's model and surgeon hold numbers and nothing else."""
    weights = load_file(run.folder / "checkpoints" / "final" / "model.safetensors")
    for tensor in (*weights.values(), *surgeon_parameters(run.folder).values()):
        assert tensor.isfinite().all()
    assert np.isfinite(run.summary["validation"]["loss"])


def poisoned(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool]) -> None:
    """Let the loss of some updates be no number."""
    read = GRPOLearner._read_positions

    def poison(self: GRPOLearner, *arguments: Any) -> Any:
        reading = read(self, *arguments)
        return reading._replace(loss=reading.loss * float("nan")) if at(self.n_done) else reading

    monkeypatch.setattr(GRPOLearner, "_read_positions", poison)


def test_an_update_that_is_no_number_is_skipped_and_counted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, lambda n: n in (2, 4))
    run = train(config(text, tmp_path / "run"), quiet=True)
    assert run.summary["skipped_updates"] == 2
    assert_finite(run)


@pytest.fixture
def few_bad_updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("agents.training.curriculum.MOST_BAD_UPDATES", 3)
    return


@pytest.mark.usefixtures("few_bad_updates")
def test_a_run_that_diverges_goes_back_once_and_goes_on_if_that_helps(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def once(n: int) -> bool:
        seen.append(n)
        return n >= 3 and seen.count(3) == 1

    poisoned(monkeypatch, once)
    run = train(config(text, tmp_path / "run"), quiet=True)
    assert seen[:9] == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert_same_run(run.folder, whole.folder)


@pytest.mark.usefixtures("few_bad_updates")
def test_a_run_that_diverges_again_ends_with_a_clear_error(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, lambda n: n >= 3)
    with pytest.raises(DivergedError, match=r"^3 updates in a row had a loss or gradient that"):
        train(config(text, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "summary.json").exists()


def spoil_rewards(
    monkeypatch: pytest.MonkeyPatch, name: str, value: float, at: Callable[[int], bool]
) -> None:
    """Let one of an estimator's rewards be `value` in some updates."""
    estimator, n_calls = ESTIMATORS[name], iter(range(10_000))
    sampling = estimator.sampled
    assert sampling is not None

    def spoilt(*arguments: Tensor) -> Tensor:
        rewards: Tensor = sampling.reward(*arguments)
        if at(next(n_calls)):
            rewards[0, 0] = value
        return rewards

    spoilt_row = estimator._replace(sampled=sampling._replace(reward=spoilt))
    monkeypatch.setitem(ESTIMATORS, name, spoilt_row)


NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("estimator", ["proper_maxrl", "brier", "grpo", "rloo"])
def test_a_reward_that_is_no_number_moves_nothing(
    estimator: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(0, 16, 200)
    learner = make_learner(fresh_model(), tokens, estimator=estimator)
    learner.update()
    with monkeypatch.context() as patch:
        spoil_rewards(patch, estimator, value, lambda _: True)
        before = everything(learner)
        stats = learner.update()
    assert not np.isfinite(stats.loss)
    assert same(everything(learner), before)
    assert (learner.n_done, learner.n_skipped, learner.n_bad_in_a_row) == (2, 1, 1)
    assert np.isfinite(learner.update().loss)
    assert not same(everything(learner), before)
    assert all(tensor.isfinite().all() for tensor in everything(learner))
    assert (learner.n_skipped, learner.n_bad_in_a_row) == (1, 0)


@pytest.mark.parametrize(
    ("estimator", "value"), [("brier", NO_NUMBERS[0]), ("grpo", NO_NUMBERS[1])]
)
def test_a_run_skips_and_counts_updates_with_such_a_reward(
    estimator: str, value: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_rewards(monkeypatch, estimator, value, lambda n: n in (1, 4))
    learning = GRPOConfig(batch_size=4, group_size=4, warmup_updates=2, estimator=estimator)
    run = train(config(text, tmp_path / "run", grpo=learning), quiet=True)
    assert run.summary["skipped_updates"] == 2
    assert [row["grpo/skipped"] for row in rows(run.folder) if row["kind"] == "grpo"] == [0, 2, 2]
    spoilt = [row for row in rows(run.folder) if row["kind"] == "grpo" and row["update"] == 5]
    assert [row["grpo/loss"] for row in spoilt] == [None]
    assert_finite(run)


def spoil_term(monkeypatch: pytest.MonkeyPatch, value: float) -> list[int]:
    """Let the score be `value` on one text of every third measurement; return the counter."""
    term, n_calls = TERMS["kl_ref"], [0, 0]

    def spoilt(writing: Generations, reference: Any) -> Any:
        values = np.array(term.measure(writing, reference))
        n_calls[0] += 1
        if n_calls[0] % 3 == 0:
            n_calls[1] += 1
            values[0] = value
        return values

    monkeypatch.setitem(TERMS, "kl_ref", term._replace(measure=spoilt))
    return n_calls


@pytest.mark.parametrize(
    ("surgeon", "value"),
    [*(("sac", value) for value in NO_NUMBERS), ("ppo", NO_NUMBERS[0]), ("es", NO_NUMBERS[0])],
)
def test_a_surgeon_is_paid_in_numbers_whatever_the_score_is(
    surgeon: str, value: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_calls = spoil_term(monkeypatch, value)
    options = QUICK if surgeon == "sac" else {}
    asked = config(text, tmp_path / "run", surgeon=surgeon, surgeon_options=options)
    run = train(asked, quiet=True)
    assert n_calls[1] > 3
    terms = [
        row[name]
        for row in rows(run.folder)
        for name in ("score/kl_ref", "baseline/kl_ref", "surgeon/return")
        if row["kind"] == "operation"
    ]
    # The whole term is at the bad end, or where it was clipped: that is documented, and finite.
    assert BOUND * (1 if value > 0 else -1) in terms
    assert np.abs(np.array(terms, dtype=np.float64)).max() <= 2 * BOUND
    if surgeon == "es":
        saved = (run.folder / "checkpoints" / "final" / "surgeon_search.json").read_text()
        assert "NaN" not in saved
        assert "Infinity" not in saved
    else:
        assert_finite(run)


@pytest.mark.parametrize("surgeon", ["sac", "td3", "ppo"])
def test_a_surgeon_that_diverges_ends_the_run_with_a_clear_error(
    surgeon: str, text: Path, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e30, **(QUICK if surgeon in ("sac", "td3") else {})}
    asked = config(text, tmp_path / "run", surgeon=surgeon, surgeon_options=options)
    with pytest.raises(
        DivergedError, match=r"^the surgeon's \S+ must be numbers of at most 1e\+06"
    ):
        train(asked, quiet=True)
    assert not (tmp_path / "run" / "summary.json").exists()
