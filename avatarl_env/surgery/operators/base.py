"""What an operator is, and the reading of coefficients.

Shapes: A coefficients, N operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from avatarl_env.errors import shown
from avatarl_env.surgery.theater import SurgicalTheater


class Operator(Protocol):
    """Turns coefficients into weight edits.

    Coefficients are a vector c of A numbers, nominally in [-1, 1], 0 meaning "untouched". An
    operator writes `factor(c) * W` or `W + delta(c)` with W the *unoperated* weights, so
    applying one twice is applying it once, and is the exact identity, bit for bit, at c = 0.

    One that also has `row_edits` (`avatarl_env.surgery.overlay.Overlayable`) can perform
    many operations in one forward; without it they are performed one after the other.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """One name for each coefficient; their number is A."""

    def parameters(self) -> Iterable[Tensor]:
        """Return what the operator may edit; what a theater has to save for it."""

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that `coefficients` (A,) stand for."""


def as_coefficients(coefficients: ArrayLike, count: int) -> Tensor:
    """Return one operation's coefficients as float64 (A,), checked.

    Raises:
        ValueError: if the shape is not (A,) or a number is not finite.
    """
    array = np.asarray(coefficients, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"coefficients must have shape ({count},), got {array.shape}")
    return _finite(array)


def as_coefficient_rows(coefficients: ArrayLike, count: int) -> Tensor:
    """Return N operations' coefficients as float64 (N, A), checked.

    Raises:
        ValueError: if the shape is not (N, A) with N >= 1 or a number is not finite.
    """
    array = np.asarray(coefficients, dtype=np.float64)
    if array.ndim != 2 or len(array) < 1 or array.shape[1] != count:
        raise ValueError(f"coefficients must have shape (N, {count}), got {array.shape}")
    return _finite(array)


def check_scale(scale: float) -> None:
    """Raise a ValueError unless `scale` is positive and finite."""
    is_number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not is_number or not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {shown(scale)}")


def _finite(array: np.ndarray) -> Tensor:
    if not np.isfinite(array).all():
        raise ValueError(f"coefficients must be finite, got {array.tolist()}")
    return torch.from_numpy(array.copy())
