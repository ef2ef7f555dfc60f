"""The question every run answers: does the surgeon help, and by how much?

The deterministic surgeon performs whole operations; its final coefficients, those of a random
surgeon, and zero are then scored on fresh *validation* prompts that nobody has seen, all on the
same ones. The independent unit is the operation, so intervals are over operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from agents.judgement import Exam
from agents.surgeons import Surgeon
from agents.surgeons.base import row_info
from avatarl_env.episode import incised
from avatarl_env.scoring import Interval, interval
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

N_OPERATIONS = 8
N_PROMPTS = 256  # over all operations
RANDOM = "random"
POLICIES = ("surgeon", RANDOM, "zero")
UNIT = "nats/char"
SMALLEST = 0.002  # of a difference that a headline names; attention has hundredths to give
# By what became of the score and of the prediction of real text: better, worse or neither.
HEADLINES = {
    (1, 1): "The surgeon helped.",
    (1, -1): "The surgeon raised its score at the cost of predicting real text worse.",
    (1, 0): "The surgeon raised its score, without a better prediction of real text.",
    (0, 1): "The surgeon improved the prediction of real text, without a rise of its score.",
    (0, 0): f"The surgeon made no difference of {SMALLEST} {UNIT} or more that could be measured.",
}


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

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Effect:
        """Rebuild one from its record."""
        parts = dict(summary)
        for name in ("kl_ref_gain", "heldout_loss_fall"):
            parts[name] = {policy: Interval(**gain) for policy, gain in parts[name].items()}
        return cls(**{**parts, "kl_ref_over_random": Interval(**parts["kl_ref_over_random"])})


def measure_effect(
    surgeon: Surgeon, env: AttentionSurgeryVectorEnv, after: str, rng: np.random.Generator
) -> Effect:
    """Score the surgeon, a random one and none on fresh validation prompts.

    Args:
        surgeon: asked for deterministic actions; learns nothing here.
        env: where it operates, once on each row, at least two, in mode NEXT_STEP; left at the end
            of these operations, its patient's compute as it was.
        after: name of the phase just finished.
        rng: draws prompts and random operations.
    """
    n = env.num_envs
    with env.patient.uncounted():
        endings = final_operations(surgeon, env, int(rng.integers(2**31)))
        operations = {
            "surgeon": np.stack([ending.coefficients for ending in endings]),
            RANDOM: np.stack([random_coefficients(env, rng) for _ in range(n)]),
            "zero": np.zeros((n, len(env.operator.labels))),
        }
        exam = Exam(
            env.patient,
            env.config,
            split="validation",
            n_operations=n,
            n_each=N_PROMPTS // n,
            rng=rng,
        )
        gains = {name: exam.gains(env.operator, operations[name]) for name in POLICIES}
    kl = {name: gains[name].kl_ref_gain.mean(axis=1) for name in POLICIES}
    loss = {name: gains[name].heldout_loss_fall.mean(axis=1) for name in POLICIES}
    return Effect(
        after,
        {name: interval(kl[name]) for name in POLICIES},
        {name: interval(loss[name]) for name in POLICIES},
        interval(kl["surgeon"] - kl[RANDOM]),
        n,
        N_PROMPTS // n * n,
    )


class Ending(NamedTuple):
    """How an operation ended."""

    coefficients: NDArray[np.float64]
    """(A,)."""
    total: float
    """Return."""
    lost_score: float
    """What the injury had cost; 0 without one."""
    flatline: str | None
    """What the patient died of, or None."""


def final_operations(surgeon: Surgeon, env: AttentionSurgeryVectorEnv, seed: int) -> list[Ending]:
    """Let the surgeon perform one deterministic operation on every row; return how they end.

    Args:
        surgeon: learns nothing here.
        env: its autoreset mode must be NEXT_STEP, which begins none when the last has ended.
        seed: of row 0's prompts, row i's is ``seed + i``.

    Raises:
        ValueError: if the autoreset mode is another.
    """
    if env.autoreset_mode != AutoresetMode.NEXT_STEP:
        raise ValueError(f"autoreset_mode must be NEXT_STEP, got {env.autoreset_mode}")
    observations, _ = env.reset(seed=seed)
    totals = np.zeros(env.num_envs)
    begins = np.ones(env.num_envs, dtype=np.bool_)
    endings: dict[int, Ending] = {}
    while len(endings) < env.num_envs:
        actions = surgeon.act(observations, begins)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        totals += rewards
        begins = terminated | truncated  # where one ended, others may begin: nobody looks at them
        for row in np.flatnonzero(begins).tolist():
            info = row_info(infos, row)
            ending = Ending(
                info["coefficients"],
                float(totals[row]),
                info["lost_score"],
                info["flatline"] or None,
            )
            endings.setdefault(row, ending)  # a row that ended early has begun another
    return [endings[row] for row in range(env.num_envs)]


def random_coefficients(
    env: AttentionSurgeryVectorEnv, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return where uniformly random incisions end, (A,); nothing they see stops or steers them."""
    coefficients = np.zeros(len(env.operator.labels))
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
    return HEADLINES.get((_sign(score), _sign(loss)), "The surgeon did harm.")


def _sign(gain: Interval) -> int:
    """Return 1 for good, -1 for bad, 0 for what is not sure or too small to be named."""
    if abs(gain.mean) < SMALLEST or gain.low <= 0 <= gain.high:
        return 0
    return 1 if gain.mean > 0 else -1


def _sentence(effect: Effect, surgeon: str) -> str:
    gain = _phrase(effect.kl_ref_gain["surgeon"], "its score (kl_ref)", "raised", "lowered")
    loss = _phrase(effect.heldout_loss_fall["surgeon"], "the held-out loss", "lowered", "raised")
    over = effect.kl_ref_over_random
    against = "not to be told from"
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
