"""Scores of what a model wrote: named terms and their weighted sum.

Nats are per character, whatever the tokens. A loss on real text is divided by the characters of
that text. A statistic of the model's own text is divided by the characters that as many tokens of
the training text stand for, a constant of the reference: an operation chooses the tokens it writes,
and dividing by their characters would pay it for long ones. With one token per character both are
the mean over tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatarl_env.scoring.generations import Generations
from avatarl_env.scoring.reference import TextReference
from avatarl_env.scoring.score import BOUND, DEFAULT_WEIGHTS, Score, measure_many
from avatarl_env.scoring.terms import TERMS, Term, kl_ref

__all__ = [
    "BOUND",
    "DEFAULT_WEIGHTS",
    "TERMS",
    "Generations",
    "Interval",
    "Score",
    "Term",
    "TextReference",
    "interval",
    "kl_ref",
    "measure_many",
]


class Interval(NamedTuple):
    """A mean of independent differences and how sure it is (Student's t)."""

    mean: float
    low: float
    """Lower end of the two-sided 95 % interval."""
    high: float
    """Upper end of it."""
    lower_bound: float
    """One-sided 95 % lower bound."""
    n: int
    """Differences."""


def interval(differences: NDArray[np.floating]) -> Interval:
    """Return the mean of paired differences with its 95 % intervals.

    Args:
        differences: (n,) independent, n >= 2.

    Raises:
        ValueError: if there are fewer than two.
    """
    from scipy.special import stdtrit

    n = len(differences)
    if n < 2:
        raise ValueError(f"differences must be at least two, got {n}")
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    two_sided, one_sided = (float(stdtrit(n - 1, level)) * error for level in (0.975, 0.95))
    return Interval(mean, mean - two_sided, mean + two_sided, mean - one_sided, n)
