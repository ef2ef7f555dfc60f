"""The question every run answers: does the surgeon help, and by how much?

The deterministic surgeon performs whole operations; its final coefficients, those of a random
surgeon, and zero are then scored on fresh *validation* prompts that nobody has seen, all on the
same ones. The independent unit is the operation, so intervals are over operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.judgement import Gains, measure_gains
from agents.surgeons import Surgeon
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.episode import incised
from avatarl_env.scoring import Interval, interval

N_OPERATIONS = 8
N_PROMPTS = 256  # over all operations
RANDOM = "random"
POLICIES = ("surgeon", RANDOM, "zero")
UNIT = "nats/char"


class Effect(NamedTuple):
    """What each policy was worth after a phase, mean per operation with 95 % intervals."""

    after: str
    """Name of the phase."""
    kl_ref_gain: dict[str, Interval]
    heldout_loss_fall: dict[str, Interval]
    kl_ref_over_random: Interval
    """The surgeon's gain minus the random one's, paired."""
    n_operations: int
    n_prompts: int
    n_practised: int = 0
    """Operations that the surgeon had performed in the run by then."""

    def as_summary(self) -> dict[str, Any]:
        """Return a JSON-able record."""
        return {
            "after": self.after,
            "kl_ref_gain": {name: gain._asdict() for name, gain in self.kl_ref_gain.items()},
            "heldout_loss_fall": {
                name: fall._asdict() for name, fall in self.heldout_loss_fall.items()
            },
            "kl_ref_over_random": self.kl_ref_over_random._asdict(),
            "n_operations": self.n_operations,
            "n_prompts": self.n_prompts,
            "n_practised": self.n_practised,
        }


def measure_effect(
    surgeon: Surgeon, env: AttentionSurgeryEnv, after: str, rng: np.random.Generator
) -> Effect:
    """Score the surgeon, a random one and none on fresh validation prompts.

    Args:
        surgeon: asked for deterministic actions; learns nothing here.
        env: where it operates; left in need of a reset, its patient's compute as it was.
        after: name of the phase just finished.
        rng: draws prompts and random operations.
    """
    gains: dict[str, list[Gains]] = {name: [] for name in POLICIES}
    with env.patient.uncounted():
        for _ in range(N_OPERATIONS):
            operations = [
                final_operation(surgeon, env, int(rng.integers(2**31))).coefficients,
                random_coefficients(env, rng),
                np.zeros(env.action_space.shape or ()),
            ]
            measured = measure_gains(
                env.patient,
                env.operator,
                operations,
                env.config,
                split="validation",
                n_each=N_PROMPTS // N_OPERATIONS,
                rng=rng,
            )
            for name, gain in zip(POLICIES, measured, strict=True):
                gains[name].append(gain)
    kl = {name: np.array([g.kl_ref_gain.mean() for g in gains[name]]) for name in POLICIES}
    loss = {name: np.array([g.heldout_loss_fall.mean() for g in gains[name]]) for name in POLICIES}
    return Effect(
        after,
        {name: interval(kl[name]) for name in POLICIES},
        {name: interval(loss[name]) for name in POLICIES},
        interval(kl["surgeon"] - kl[RANDOM]),
        N_OPERATIONS,
        N_PROMPTS,
    )


class Ending(NamedTuple):
    """How an operation ended."""

    coefficients: NDArray[np.float64]
    """(A,)."""
    flatline: str | None
    """What the patient died of, or None."""


def final_operation(surgeon: Surgeon, env: AttentionSurgeryEnv, seed: int) -> Ending:
    """Let the surgeon perform one deterministic operation; return how it ends."""
    observation, info = env.reset(seed=seed)
    is_over = False
    while not is_over:
        observation, _, is_over, _, info = env.step(surgeon.act(observation))
    return Ending(np.asarray(info["coefficients"]), info.get("flatline"))


def random_coefficients(env: AttentionSurgeryEnv, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return where uniformly random incisions end, (A,); nothing they see stops or steers them."""
    coefficients = np.zeros(env.action_space.shape or ())
    for _ in range(env.config.n_incisions):
        action = rng.uniform(-1.0, 1.0, coefficients.shape)
        coefficients = incised(coefficients, action, env.config.step_size)
    return coefficients


def verdict(effects: Sequence[Effect], surgeon: str) -> str:
    """Say in words what the surgeon was worth."""
    if not effects:
        return "No surgeon operated in this run, so there is nothing to say of one."
    return " ".join([_headline(effects[-1]), *(_sentence(e, surgeon) for e in effects)])


def _headline(effect: Effect) -> str:
    """Sum up the last measurement: to help takes both quantities, to harm takes one."""
    score, loss = effect.kl_ref_gain["surgeon"], effect.heldout_loss_fall["surgeon"]
    if not np.isfinite([*score, *loss]).all():
        return "The surgeon broke the model: what it then wrote could not be scored."
    if score.high < 0 or loss.high < 0:
        return "The surgeon did harm."
    if score.low > 0 and loss.low > 0:
        return "The surgeon helped."
    if score.low > 0:
        return "The surgeon raised its score, without a better prediction of real text."
    if loss.low > 0:
        return "The surgeon improved the prediction of real text, without a rise of its score."
    return "The surgeon made no difference that could be measured."


def _sentence(effect: Effect, surgeon: str) -> str:
    gain = _phrase(effect.kl_ref_gain["surgeon"], "its score (kl_ref)", "raised", "lowered")
    loss = _phrase(effect.heldout_loss_fall["surgeon"], "the held-out loss", "lowered", "raised")
    over = effect.kl_ref_over_random
    against = "no different from"
    if over.low > 0 or over.high < 0:
        against = "better than" if over.low > 0 else "worse than"
    practice = f" and {effect.n_practised} operations" if effect.n_practised else ""
    comparison = f"; in score they were {against} random operations (difference {_range(over)})"
    return (
        f"After {effect.after}{practice}, {surgeon}'s operations {gain} and {loss} "
        f"({effect.n_operations} operations on {effect.n_prompts} unseen prompts, 95 % intervals)"
        f"{'' if surgeon == RANDOM else comparison}."
    )


def _phrase(gain: Interval, what: str, good: str, bad: str) -> str:
    """Put one interval in words; ``gain`` is positive where the operation did good."""
    if gain.low == gain.high == 0:
        return f"left {what} exactly as it was"
    if gain.low > 0:
        size, low, high = map(_number, (gain.mean, gain.low, gain.high))
        return f"{good} {what} by {size} {UNIT} [{low}, {high}]"
    if gain.high < 0:
        size, low, high = map(_number, (-gain.mean, -gain.high, -gain.low))
        return f"{bad} {what} by {size} {UNIT} [{low}, {high}]"
    largest = f"{_number(max(-gain.low, gain.high))} {UNIT}"
    return f"had no effect on {what} that could be told from zero (none larger than {largest})"


def _number(value: float) -> str:
    """Four decimals, or as many as it takes to show two figures."""
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def _range(gain: Interval) -> str:
    return f"{gain.mean:+.4f} {UNIT} [{gain.low:+.4f}, {gain.high:+.4f}]"
