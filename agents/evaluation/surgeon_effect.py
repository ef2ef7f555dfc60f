"""Measure the surgeon's effect, and state it in words.

The deterministic surgeon performs whole operations. Its final coefficients, those of a random
surgeon, and zero are then scored on the same fresh *validation* prompts. Operations are the
independent units, so confidence intervals are over operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.paired import PairedEvaluation
from agents.evaluation.statistics import Interval, interval
from agents.surgeons.episodes import EpisodeRecord, play
from agents.surgeons.registry import Surgeon
from avatarl_env.episode import step_coefficients
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

N_OPERATIONS = 8
N_PROMPTS = 256  # over all operations
RANDOM = "random"
POLICIES = ("surgeon", RANDOM, "zero")
UNIT = "nats/char"
KL_REF = "kl_ref"
SMALLEST = 0.002  # smallest effect in a headline; surgery on attention gains hundredths at most


class Effect(NamedTuple):
    """The effect of each policy's operations after a phase: means over operations."""

    after: str
    """Name of the phase."""
    kl_ref_gain: dict[str, Interval]
    """Rise of `kl_ref`, by policy."""
    heldout_loss_fall: dict[str, Interval]
    kl_ref_over_random: Interval
    """The surgeon's gain minus the random surgeon's, paired."""
    heldout_loss_over_random: Interval
    """The surgeon's fall in loss minus the random surgeon's, paired."""
    n_operations: int
    n_prompts: int
    n_practised: int = 0
    """Operations that the surgeon had performed in the run before."""
    score: str = KL_REF
    """The surgeon's score: its terms and their weights."""
    score_gain: dict[str, Interval] | None = None
    """Rise of the score, by policy; None if the score is `kl_ref` alone."""

    def as_summary(self) -> dict[str, Any]:
        """Return the effect as JSON."""
        return {name: _to_json(value) for name, value in self._asdict().items()}

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Effect:
        """Rebuild the effect from `as_summary`; null means NaN."""
        return cls(**{name: _from_json(value) for name, value in summary.items()})


def _to_json(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    return {name: _to_json(x) for name, x in value.items()} if isinstance(value, dict) else value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() != set(Interval._fields):
        return {name: _from_json(x) for name, x in value.items()}
    numbers: dict[str, Any] = {name: math.nan if x is None else x for name, x in value.items()}
    return Interval(**numbers)


def measure_effect(
    surgeon: Surgeon,
    env: AttentionSurgeryVectorEnv,
    after: str,
    rng: np.random.Generator,
    n_prompts: int = N_PROMPTS,
) -> Effect:
    """Score the surgeon's operations, random ones and none on fresh validation prompts.

    The patient's count of forward tokens does not change.

    Args:
        surgeon: only its deterministic actions are used.
        env: of one operation on each row, at least two; see `final_operations`.
        after: name of the phase just finished.
        rng: draws prompts and random operations.
        n_prompts: prompts over all operations, and as many windows; rounded down to a multiple of
            the rows.
    """
    n, operator = env.num_envs, env.operator
    with env.patient.uncounted():
        records = final_operations(surgeon, env, int(rng.integers(2**31)))
        operations = {
            "surgeon": np.stack([record.coefficients for record in records]),
            RANDOM: np.stack([random_coefficients(env, rng) for _ in range(n)]),
            "zero": np.zeros((n, len(operator.labels))),
        }
        evaluation = PairedEvaluation(
            env.patient,
            env.config,
            split="validation",
            n_operations=n,
            n_each=n_prompts // n,
            rng=rng,
            score=env.task.score,
        )
        gains = {name: evaluation.gains(operator, operations[name]) for name in POLICIES}
    kl = {name: gains[name].kl_ref_gain.mean(axis=1) for name in POLICIES}
    loss = {name: gains[name].heldout_loss_fall.mean(axis=1) for name in POLICIES}
    weights = env.task.score.weights
    is_kl_ref = weights.keys() == {KL_REF} and weights[KL_REF] > 0
    return Effect(
        after,
        {name: interval(kl[name]) for name in POLICIES},
        {name: interval(loss[name]) for name in POLICIES},
        interval(kl["surgeon"] - kl[RANDOM]),
        interval(loss["surgeon"] - loss[RANDOM]),
        n,
        n_prompts // n * n,
        score=" + ".join(name if w == 1 else f"{w:g} {name}" for name, w in weights.items()),
        score_gain=None if is_kl_ref else {p: interval(gains[p].score_gain) for p in POLICIES},
    )


def final_operations(
    surgeon: Surgeon, env: AttentionSurgeryVectorEnv, seed: int
) -> list[EpisodeRecord]:
    """Let the surgeon perform one deterministic operation on every row.

    Args:
        surgeon: only its deterministic actions are used.
        env: preferably in autoreset mode NEXT_STEP, which saves the evaluation of new baselines.
        seed: of row 0's prompts; that of row i is `seed + i`.

    Returns:
        A record for each row, in the order of the rows.
    """
    return sorted(play(env, surgeon.act, seed), key=lambda record: record.row)


def random_coefficients(
    env: AttentionSurgeryVectorEnv, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the final coefficients (A,) of a random operation without a flatline."""
    coefficients = np.zeros(len(env.operator.labels))
    for _ in range(env.config.episode_length):
        action = rng.uniform(-1.0, 1.0, coefficients.shape)
        coefficients = step_coefficients(
            coefficients, action, env.config.step_size, env.config.max_coefficient
        )
    return coefficients


def verdict(effects: Sequence[Effect], surgeon: str) -> str:
    """State the surgeon's effect in words.

    A headline about the last phase, then a sentence for each phase with text quality (`kl_ref`) and
    prediction (held-out loss), each with its interval.

    Args:
        effects: of the phases, in order.
        surgeon: its name.
    """
    if not effects:
        return "No surgeon operated in this run."
    return " ".join([_headline(effects[-1]), *(_sentence(e, surgeon) for e in effects)])


def _headline(effect: Effect) -> str:
    """Summarise an effect: "helped" needs both measures to rise, "did harm" needs one to fall.

    If an interval includes zero, the headline names the largest effect within it.
    """
    score, loss = effect.kl_ref_gain["surgeon"], effect.heldout_loss_fall["surgeon"]
    name = "its score" if effect.score_gain is None else KL_REF
    if not np.isfinite([score.mean, loss.mean]).all():
        return "The surgeon broke the model: its texts could not be scored."
    if not (score.is_finite and loss.is_finite):
        return "There were too few operations to measure the surgeon's effect."
    if score.is_zero and loss.is_zero:
        return "The surgeon changed nothing."
    headlines = {
        (1, 1): "helped",
        (1, -1): f"raised {name} at the cost of predicting real text worse",
        (-1, 1): f"lowered {name}, but improved the prediction of real text",
        (1, 0): f"raised {name}, with {_bound(loss)} in the prediction of real text",
        (0, 1): f"improved the prediction of real text, with {_bound(score)} in {name}",
        (0, 0): f"made {_bound(score, loss)}",
    }
    signs = [0 if gain.largest < SMALLEST else gain.sign for gain in (score, loss)]
    return f"The surgeon {headlines.get((signs[0], signs[1]), 'did harm')}."


def _bound(*gains: Interval) -> str:
    """Name the largest effect within the intervals, rounded up."""
    largest = max(gain.largest for gain in gains)
    if largest == 0:
        return "no change"
    step = 1e-4 if largest >= 0.001 else 10.0 ** (math.floor(math.log10(largest)) - 1)
    rounded = math.ceil(largest / step - 1e-6) * step
    return f"no difference larger than {_number(rounded)} {UNIT}"


def _sentence(effect: Effect, surgeon: str) -> str:
    is_kl_ref = effect.score_gain is None
    what, short = ("its score (kl_ref)", "its score") if is_kl_ref else (KL_REF, KL_REF)
    parts = [
        _phrase(effect.kl_ref_gain["surgeon"], what),
        _phrase(effect.heldout_loss_fall["surgeon"], "the held-out loss", sign=-1),
    ]
    if effect.score_gain is not None:
        own = _phrase(effect.score_gain["surgeon"], f"its own score ({effect.score})", unit="")
        parts.insert(0, own)
    over_random = (
        f"; compared with random operations they {_phrase(effect.kl_ref_over_random, short)} and "
        + _phrase(effect.heldout_loss_over_random, "the held-out loss", sign=-1)
    )
    practice = f" and {effect.n_practised} operations" if effect.n_practised else ""
    return (
        f"After {effect.after}{practice}, {surgeon}'s operations {', '.join(parts[:-1])} and "
        f"{parts[-1]} ({effect.n_operations} operations on {effect.n_prompts} unseen prompts, 95 % "
        f"intervals){'' if surgeon == RANDOM else over_random}."
    )


def _phrase(gain: Interval, what: str, *, sign: int = 1, unit: str = f" {UNIT}") -> str:
    """Describe the change of a measure; `sign` is -1 if the gain is a fall, like that of a loss."""
    if not gain.is_finite:
        return f"had an effect on {what} that could not be measured"
    if gain.is_zero:
        return f"left {what} exactly as it was"
    mean, low, high = sign * gain.mean, *sorted((sign * gain.low, sign * gain.high))
    if gain.sign == 0:
        ends = f"[{_number(low, '+')}, {_number(high, '+')}]"
        shown = f"{_number(mean, '+')}{unit} {ends}"
        return f"had no effect on {what} distinguishable from zero ({shown})"
    near, far = sorted((abs(low), abs(high)))
    verb = "raised" if mean > 0 else "lowered"
    return f"{verb} {what} by {_number(abs(mean))}{unit} [{_number(near)}, {_number(far)}]"


def _number(value: float, sign: str = "") -> str:
    """Format with four decimals, or with two significant digits if the value is small."""
    return f"{value:{sign}.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:{sign}.2g}"
