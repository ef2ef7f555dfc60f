"""The interface of operators, and checks of arguments.

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

    Coefficients are a vector c of A numbers, nominally in [-1, 1]. An operator writes
    `factor(c) * W` or `W + delta(c)` with W the *unoperated* weights. So applying it twice is the
    same as applying it once, and c = 0 is the exact identity, bit for bit.

    An operator with `row_edits` (`avatarl_env.surgery.overlay.Overlayable`) can perform many
    operations in one forward; others perform them one after the other.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the A coefficients."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters that the operator may edit, which a theater has to save."""

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that `coefficients` (A,) stand for.

        Raises:
            ValueError: if the coefficients have another shape or are not finite.
        """


def as_coefficients(coefficients: ArrayLike, count: int, *, rows: bool = False) -> Tensor:
    """Return one operation's coefficients as float64 (A,), or those of N operations (N, A).

    Raises:
        ValueError: if the shape is not (A,), or with `rows` (N, A) with N >= 1, or a number is not
            finite.
    """
    array = np.asarray(coefficients, dtype=np.float64)
    expected = f"(N, {count})" if rows else f"({count},)"
    if array.ndim != 1 + rows or array.shape[-1] != count or len(array) < rows:
        raise ValueError(f"coefficients must have shape {expected}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"coefficients must be finite, got {array.tolist()}")
    return torch.from_numpy(array.copy())


def check_scale(scale: float) -> None:
    """Raise a ValueError unless `scale` is positive and finite."""
    is_number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not is_number or not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {shown(scale)}")
