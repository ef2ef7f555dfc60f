"""Means of independent differences with confidence intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """A mean of independent differences with its 95 % confidence intervals (Student's t)."""

    mean: float
    low: float
    """Lower end of the two-sided interval."""
    high: float
    """Upper end of it."""
    lower_bound: float
    """One-sided lower bound."""
    n: int
    """Differences."""

    @property
    def is_finite(self) -> bool:
        """Whether mean and two-sided interval are finite."""
        return all(map(math.isfinite, (self.mean, self.low, self.high)))

    @property
    def is_zero(self) -> bool:
        """Whether all differences are exactly 0."""
        return self.low == self.high == 0

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies above or below zero, 0 if it includes zero."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def largest(self) -> float:
        """Largest magnitude of an effect within the interval."""
        return max(abs(self.low), abs(self.high))


def interval(differences: NDArray[np.floating]) -> Interval:
    """Return the mean of paired differences with its 95 % confidence intervals.

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
