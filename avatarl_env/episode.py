"""One operation as a Markov decision process: its arithmetic, and nothing of Gymnasium.

Shapes: A coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatarl_env.errors import as_numbers, check_choice, check_integer, check_number, shown
from avatarl_env.patient import Evaluation, Prompts
from avatarl_env.scoring import Score
from avatarl_env.text.corpus import SPLITS

ENTROPY_RANGE = (0.5, 1.5)  # times the unoperated model's; outside it the patient flatlines
COLLISION_MARGIN = 5.0  # above the unoperated model's
NON_FINITE = "non-finite logits"


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """The rules of an operation.

    Raises:
        ValueError: if a number is out of range.
    """

    episode_length: int = 4
    """Steps of an episode; 1 makes it a bandit."""
    step_size: float = 0.5
    """Largest change of a coefficient in one step; times episode_length at least
    max_coefficient."""
    max_coefficient: float = 1.0
    """Largest coefficient, in (0, 1]; a cautious surgeon has a smaller one."""
    n_prompts: int = 32
    """Texts written per evaluation, at least 2."""
    prompt_length: int = 32
    """Tokens of real text in each prompt, at least 2."""
    n_new: int = 64
    """Tokens written after each prompt, at least 4."""
    split: str = "surgeon"
    """Split that prompts come from: train, surgeon or validation."""
    injury: float | tuple[float, ...] = 0.0
    """Half-width of each operation's hidden random injury, or the injury itself; 0 for none."""
    flatline_penalty: float = 1.0
    """An operation that flatlines returns `min(-flatline_penalty, improvement)`; one with
    non-finite logits, whose text cannot be scored, returns `-flatline_penalty`."""

    def __post_init__(self) -> None:
        least = {"episode_length": 1, "n_prompts": 2, "prompt_length": 2, "n_new": 4}
        for name, bound in least.items():
            self._set(name, check_integer(name, getattr(self, name), bound))
        for name in ("step_size", "flatline_penalty"):
            self._set(name, check_number(name, getattr(self, name), 0))
        self._set("max_coefficient", check_number("max_coefficient", self.max_coefficient, 0, 1))
        if self.max_coefficient == 0:
            raise ValueError("max_coefficient must be in (0, 1], got 0")
        if not self.episode_length * self.step_size >= self.max_coefficient:
            raise ValueError(
                f"episode_length * step_size must be at least {self.max_coefficient:g} "
                "(max_coefficient), or coefficients are out of reach, "
                f"got {self.episode_length} * {self.step_size}"
            )
        check_choice("split", self.split, SPLITS)
        self._set("injury", _as_injury(self.injury))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def injures(self) -> bool:
        """Whether operations begin with an injury."""
        return any(self.injury) if isinstance(self.injury, tuple) else self.injury > 0

    def check_context(self, context: int) -> None:
        """Raise a ValueError unless prompt and new text fit a model's context."""
        if self.prompt_length + self.n_new > context:
            raise ValueError(
                f"prompt_length + n_new must fit the model's context of {context}, "
                f"got {self.prompt_length} + {self.n_new}"
            )


def _as_injury(value: Any) -> float | tuple[float, ...]:
    """Return a number as a half-width, and a list, tuple or array of them as a tuple, checked."""
    rule = (
        "injury must be a half-width in [0, 1] or a sequence of numbers in [-1, 1], "
        f"got {shown(value)}"
    )
    parts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(part, bool) for part in parts):
        raise ValueError(rule)
    try:
        numbers = as_numbers("injury", value)
    except ValueError as error:
        raise ValueError(rule) from error
    least = 0 if numbers.ndim == 0 else -1
    is_row = numbers.ndim < 2 and numbers.size
    if not is_row or not ((least <= numbers) & (numbers <= 1)).all():
        raise ValueError(rule)
    return tuple(numbers.tolist()) if numbers.ndim else float(numbers)


def step_coefficients(
    coefficients: NDArray[np.float64],
    action: NDArray[np.floating],
    step_size: float,
    max_coefficient: float = 1.0,
) -> NDArray[np.float64]:
    """Return the coefficients after a step.

    `clip(c + step_size * clip(action, -1, 1), -max_coefficient, max_coefficient)`.
    """
    step = step_size * np.clip(np.asarray(action, dtype=np.float64), -1, 1)
    return np.clip(coefficients + step, -max_coefficient, max_coefficient)


class Outcome(NamedTuple):
    """Result of a step."""

    reward: float
    terminated: bool
    info: dict[str, Any]


@dataclass
class Episode:
    """The state of one operation. A step replaces attributes and changes none in place."""

    config: EpisodeConfig
    prompts: Prompts
    injury: NDArray[np.float64]
    """(A,) hidden; every evaluation is at injury + coefficients."""
    baseline: Evaluation
    """Of the unoperated (but injured) model."""
    healthy_terms: dict[str, float]
    """Terms of the model without operation and injury."""
    model_version: int
    """The patient's `n_changes` when the operation began."""
    coefficients: NDArray[np.float64]
    """(A,) in [-max_coefficient, max_coefficient]."""
    present: Evaluation
    """Of the model at the present coefficients."""
    scores: tuple[float, ...]
    """Of the baseline, and after each step."""
    flatline: str = ""
    """Cause of the flatline; empty while the patient lives."""

    @classmethod
    def begin(
        cls,
        config: EpisodeConfig,
        prompts: Prompts,
        injury: NDArray[np.float64],
        baseline: Evaluation,
        healthy_terms: dict[str, float],
        score: Score,
        model_version: int = 0,
    ) -> Episode:
        """Start at c = 0."""
        return cls(
            config,
            prompts,
            injury,
            baseline,
            healthy_terms,
            model_version,
            coefficients=np.zeros_like(injury),
            present=baseline,
            scores=(score(baseline.terms),),
        )

    @property
    def n_done(self) -> int:
        """Number of steps made."""
        return len(self.scores) - 1

    @property
    def time_left(self) -> float:
        """Fraction of the steps left, in [0, 1]."""
        return 1.0 - self.n_done / self.config.episode_length

    @property
    def is_over(self) -> bool:
        """Whether the operation has ended."""
        return bool(self.flatline) or self.n_done == self.config.episode_length

    @property
    def improvement(self) -> float:
        """Score now minus the baseline's."""
        return self.scores[-1] - self.scores[0]

    @property
    def total_reward(self) -> float:
        """Return so far, the improvement; for a flatline see `EpisodeConfig.flatline_penalty`."""
        if self.flatline == NON_FINITE:
            return -self.config.flatline_penalty
        if self.flatline:
            return min(-self.config.flatline_penalty, self.improvement)
        return self.improvement

    def next_coefficients(self, action: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the coefficients after a step, (A,); the episode is not changed.

        Args:
            action: (A,), clipped to [-1, 1].
        """
        rules = self.config
        return step_coefficients(self.coefficients, action, rules.step_size, rules.max_coefficient)

    def conclude(
        self, coefficients: NDArray[np.float64], evaluation: Evaluation, score: Score
    ) -> Outcome:
        """Make a step: record its evaluation and return its reward.

        The reward is the change of `total_reward`: without a flatline the increase of the score.
        A flatline never pays more than the operation's effect on the text.

        Args:
            coefficients: (A,), from `next_coefficients`.
            evaluation: of the model at injury plus coefficients.
            score: the environment's.
        """
        # All that can fail comes before the first assignment, so no step is made in part.
        present, before = score(evaluation.terms), self.total_reward
        flatline = self._flatline_cause(coefficients, evaluation)
        self.coefficients, self.present, self.flatline = coefficients, evaluation, flatline
        self.scores = (*self.scores, present)
        # Without a flatline this is the rise of the score, exactly: see `GRID`.
        return Outcome(self.total_reward - before, self.is_over, self.info(score))

    def info(self, score: Score) -> dict[str, Any]:
        """Return the step's info: fresh, finite, and with the same keys at every step."""
        return {
            "score": self.scores[-1],
            "improvement": self.improvement,
            "score_terms": dict(self.present.terms),
            "baseline_terms": dict(self.baseline.terms),
            "coefficients": self.coefficients.copy(),
            "flatline": self.flatline,
            "is_success": self.is_over and not self.flatline and self.improvement > 0,
            "lost_score": score(self.healthy_terms) - self.scores[0],
        }

    def _flatline_cause(self, coefficients: NDArray[np.float64], evaluation: Evaluation) -> str:
        """Return why the patient flatlines, or ""."""
        if not coefficients.any():
            return ""
        if evaluation.generations.has_nan:
            return NON_FINITE
        # An operation that heals an injury must not be punished for leaving the injured range.
        references = (self.baseline.terms, self.healthy_terms)
        entropies = [terms["entropy"] for terms in references]
        low, high = ENTROPY_RANGE[0] * min(entropies), ENTROPY_RANGE[1] * max(entropies)
        value = evaluation.terms["entropy"]
        if not low <= value <= high:
            return f"entropy {value:.3f} outside [{low:.3f}, {high:.3f}] nats"
        limit = max(terms["collision_l2"] for terms in references) + COLLISION_MARGIN
        value = evaluation.terms["collision_l2"]
        return f"collision_l2 {value:.2f} above {limit:.2f}" if value > limit else ""
