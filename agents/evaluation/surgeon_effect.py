"""The question every run answers: does the surgeon help, and by how much?

The deterministic surgeon performs whole operations; its final coefficients, those of a random
surgeon, and zero are then scored on fresh *validation* prompts that nobody has seen, all on the
same ones. The independent unit is the operation, so intervals are over operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from agents.evaluation.paired import PairedEvaluation
from agents.surgeons.base import row_info
from agents.surgeons.registry import Surgeon
from avatarl_env.episode import step_coefficients
from avatarl_env.scoring import Interval, interval
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

N_OPERATIONS = 8
N_PROMPTS = 256  # over all operations
RANDOM = "random"
POLICIES = ("surgeon", RANDOM, "zero")
UNIT = "nats/char"
KL_REF = "kl_ref"
SMALLEST = 0.002  # of a difference that a headline names; attention has hundredths to give


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
    heldout_loss_over_random: Interval | None = None
    """The surgeon's fall in loss minus the random one's, paired."""
    score: str = KL_REF
    """What the surgeon was paid for, in words."""
    score_gain: dict[str, Interval] | None = None
    """Rise of that, where it is not `kl_ref` alone."""

    @property
    def kl_ref_name(self) -> str:
        """What `kl_ref` is called where the score is, or is not, that."""
        return KL_REF if self.score_gain is not None else "its score"

    def as_summary(self) -> dict[str, Any]:
        """Return a JSON-able record."""
        return {name: _record(value) for name, value in self._asdict().items()}

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Effect:
        """Rebuild one from its record."""
        return cls(**{name: _rebuilt(value) for name, value in summary.items()})


def _record(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    return {name: _record(x) for name, x in value.items()} if isinstance(value, dict) else value


def _rebuilt(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() != set(Interval._fields):
        return {name: _rebuilt(x) for name, x in value.items()}
    numbers: dict[str, Any] = {name: math.nan if x is None else x for name, x in value.items()}
    return Interval(**numbers)


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
        eval_env = PairedEvaluation(
            env.patient,
            env.config,
            split="validation",
            n_operations=n,
            n_each=N_PROMPTS // n,
            rng=rng,
            score=env.task.score,
        )
        gains = {name: eval_env.gains(env.operator, operations[name]) for name in POLICIES}
    kl = {name: gains[name].kl_ref_gain.mean(axis=1) for name in POLICIES}
    loss = {name: gains[name].heldout_loss_fall.mean(axis=1) for name in POLICIES}
    weights = env.task.score.weights
    own = None
    if weights.keys() != {KL_REF} or weights[KL_REF] <= 0:
        own = {name: interval(gains[name].score_gain) for name in POLICIES}
    return Effect(
        after,
        {name: interval(kl[name]) for name in POLICIES},
        {name: interval(loss[name]) for name in POLICIES},
        interval(kl["surgeon"] - kl[RANDOM]),
        n,
        N_PROMPTS // n * n,
        heldout_loss_over_random=interval(loss["surgeon"] - loss[RANDOM]),
        score=" + ".join(name if w == 1 else f"{w:g} {name}" for name, w in weights.items()),
        score_gain=own,
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
        seed: of row 0's prompts, row i's is `seed + i`.

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
    """Return where uniformly random steps end, (A,); nothing they see stops or steers them."""
    coefficients = np.zeros(len(env.operator.labels))
    for _ in range(env.config.episode_length):
        action = rng.uniform(-1.0, 1.0, coefficients.shape)
        coefficients = step_coefficients(
            coefficients, action, env.config.step_size, env.config.max_coefficient
        )
    return coefficients


def verdict(effects: Sequence[Effect], surgeon: str) -> str:
    """Say in words what the surgeon was worth."""
    if not effects:
        return "No surgeon operated in this run, so there is nothing to say of one."
    return " ".join([_headline(effects[-1]), *(_sentence(e, surgeon) for e in effects)])


def _headline(effect: Effect) -> str:
    """Sum up the last measurement: to help takes both quantities, to harm takes one.

    What an interval does not tell from zero may be as large as the interval's farther end.
    """
    score, loss = effect.kl_ref_gain["surgeon"], effect.heldout_loss_fall["surgeon"]
    name = effect.kl_ref_name
    if not np.isfinite([score.mean, loss.mean]).all():
        return "The surgeon broke the model: what it then wrote could not be scored."
    if not _is_known(score) or not _is_known(loss):
        return "There were too few operations to tell what the surgeon was worth."
    if _is_nothing(score) and _is_nothing(loss):
        return "The surgeon changed nothing."
    headlines = {
        (1, 1): "The surgeon helped.",
        (1, -1): f"The surgeon raised {name} at the cost of predicting real text worse.",
        (-1, 1): f"The surgeon lowered {name}, though it improved the prediction of real text.",
        (1, 0): f"The surgeon raised {name}, with {_unseen(loss)} in the prediction of real text.",
        (0, 1): f"The surgeon improved the prediction of real text, with {_unseen(score)} in "
        f"{name}.",
        (0, 0): f"The surgeon made {_unseen(score, loss)}.",
    }
    return headlines.get((_sign(score), _sign(loss)), "The surgeon did harm.")


def _sign(gain: Interval) -> int:
    """Return 1 for good, -1 for bad, 0 for what may be nothing or is surely too small to name."""
    if gain.low <= 0 <= gain.high or _farther(gain) < SMALLEST:
        return 0
    return 1 if gain.low > 0 else -1


def _farther(gain: Interval) -> float:
    """Return how far from zero the interval reaches: no larger effect is left out by it."""
    return max(abs(gain.low), abs(gain.high))


def _unseen(*gains: Interval) -> str:
    largest = max(map(_farther, gains))
    return f"no difference larger than {_rounded_up(largest)} {UNIT}" if largest else "no change"


def _is_known(gain: Interval) -> bool:
    return bool(np.isfinite([gain.mean, gain.low, gain.high]).all())


def _is_nothing(gain: Interval) -> bool:
    return gain.low == gain.high == 0


def _sentence(effect: Effect, surgeon: str) -> str:
    name = effect.kl_ref_name
    what = "its score (kl_ref)" if effect.score_gain is None else name
    parts = _both(effect.kl_ref_gain["surgeon"], effect.heldout_loss_fall["surgeon"], what)
    if effect.score_gain is not None:
        own = f"its own score ({effect.score})"
        parts.insert(0, _phrase(effect.score_gain["surgeon"], own, higher_is_better=True, unit=""))
    practice = f" and {effect.n_practised} operations" if effect.n_practised else ""
    over = _both(effect.kl_ref_over_random, effect.heldout_loss_over_random, name)
    comparison = f"; compared with random operations they {_listed(over)}"
    return (
        f"After {effect.after}{practice}, {surgeon}'s operations {_listed(parts)} "
        f"({effect.n_operations} operations on {effect.n_prompts} unseen prompts, 95 % intervals)"
        f"{'' if surgeon == RANDOM else comparison}."
    )


def _both(score: Interval, loss: Interval | None, name: str) -> list[str]:
    """Put a gain in score and a fall in loss in words, one never without the other."""
    parts = [_phrase(score, name, higher_is_better=True)]
    if loss is not None:
        parts.append(_phrase(loss, "the held-out loss", higher_is_better=False))
    return parts


def _listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _phrase(gain: Interval, what: str, *, higher_is_better: bool, unit: str = UNIT) -> str:
    """Put one interval in words; `gain` is positive where the operation did good."""
    sign = 1 if higher_is_better else -1
    mean, low, high = (sign * x for x in (gain.mean, *(gain.low, gain.high)[::sign]))
    if not _is_known(gain):
        return f"had an effect on {what} that could not be measured"
    if low == high == 0:
        return f"left {what} exactly as it was"
    unit = f" {unit}" if unit else ""
    if low <= 0 <= high:
        shown = f"{_number(mean, '+')}{unit} [{_number(low, '+')}, {_number(high, '+')}]"
        return f"had no effect on {what} that could be told from zero ({shown})"
    verb = "raised" if low > 0 else "lowered"
    size, near, far = (_number(abs(x)) for x in (mean, *(low, high)[:: 1 if low > 0 else -1]))
    return f"{verb} {what} by {size}{unit} [{near}, {far}]"


def _number(value: float, sign: str = "") -> str:
    """Four decimals, or as many as it takes to show two figures."""
    return f"{value:{sign}.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:{sign}.2g}"


def _rounded_up(value: float) -> str:
    """Write a positive bound as `_number` would, but never below what it is."""
    step = 1e-4 if value >= 0.001 else 10.0 ** (math.floor(math.log10(value)) - 1)
    return _number(math.ceil(value / step - 1e-6) * step)
