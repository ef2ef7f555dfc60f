"""Operators on the singular values of the attention projections.

Shapes: A coefficients, N operations, r singular values, b bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avatarl_env.surgery.operators.factored import FactoredOperator
from avatarl_env.surgery.projections import AttentionTarget


class SpectralBands(FactoredOperator):
    """Scales bands of singular values and keeps their sum.

    The singular values s, largest first, are cut into bands of equal size. Band b is multiplied by
    `m_b = exp(scale * c_b)`, then all are rescaled to keep their sum: `s' = s * m * sum(s) /
    sum(s * m)`, and `W' = W + U diag(s' - s) V`. SVF (Transformer-squared, arXiv 2501.06252)
    scales every single value. Equal coefficients in all bands are the identity up to rounding.
    """

    def __init__(
        self,
        targets: Sequence[AttentionTarget],
        *,
        projections: str | Sequence[str] = ("query", "output"),
        n_bands: int = 4,
        tied: bool = True,
        scale: float = 1.0,
    ) -> None:
        """Choose the coefficients: one for each band of each projection.

        Args:
            targets: the layers to operate on.
            projections: of `query`, `key`, `value`, `output`.
            n_bands: at least 2 and at most the number of singular values.
            tied: whether all layers share coefficients (A = n_bands * projections) or each has its
                own (that times L).
            scale: log-gain at c = 1, nats, > 0.

        Raises:
            ValueError: if an argument is out of range.
        """
        super().__init__(targets, projections, scale)
        rank = min(min(shape) for shape in self._shapes())
        if not isinstance(n_bands, int | np.integer) or not 2 <= n_bands <= rank:
            raise ValueError(f"n_bands must be in [2, {rank}], got {n_bands}")
        self.n_bands = n_bands
        self._lay_out([f"log-gain band {band}" for band in range(n_bands)], tied=tied)

    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the change of the singular values, (N, r)."""
        band = torch.arange(len(values)) * self.n_bands // len(values)  # (r,)
        gains = (self.scale * coefficients).exp()[:, band].to(values)  # (N, r)
        mass = (values * gains).sum(1, keepdim=True)
        # Summed in the same order, so that the quotient is exactly 1 if all gains are.
        whole = (values * torch.ones_like(gains)).sum(1, keepdim=True)
        ratio = torch.where(mass > 0, whole / mass, 1.0)
        return values * (gains * ratio - 1)


class LayerTruncation(FactoredOperator):
    """Rank reduction: the smallest singular values are set to zero.

    `|c|` times `scale` is the fraction of the singular values that is removed, rounded to whole
    values; the sign is ignored. This is LASER (arXiv 2312.13558), which searches for one matrix and
    its fraction.
    """

    def __init__(
        self,
        targets: Sequence[AttentionTarget],
        *,
        projections: str | Sequence[str] = ("output",),
        tied: bool = False,
        scale: float = 0.9,
    ) -> None:
        """Choose the coefficients: one for each projection.

        Args:
            targets: the layers to operate on.
            projections: of `query`, `key`, `value`, `output`.
            tied: whether all layers share coefficients or each has its own (A = projections * L).
            scale: fraction of the singular values removed at abs(c) = 1, in (0, 1].

        Raises:
            ValueError: if an argument is out of range.
        """
        super().__init__(targets, projections, scale)
        if scale > 1:
            raise ValueError(f"scale must be at most 1, the whole spectrum, got {scale}")
        self._lay_out(["cut"], tied=tied)

    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return minus the removed values, (N, r)."""
        share = (self.scale * coefficients.abs()).clamp(max=1)  # (N, 1)
        n_kept = len(values) - (share * len(values)).round()
        is_removed = torch.arange(len(values)) >= n_kept  # (N, r)
        return -values * is_removed.to(values)


class SeedRankOne(FactoredOperator):
    """Moves each matrix towards rank one, a destructive control.

    The project that this one grew from *replaced* a projection by `(1 + u) (1 + v) a b`, with a, b
    its first singular vectors: the singular value was dropped, and even u = v = 0 destroyed the
    matrix. Here `W' = W + |c| ((1 + scale * c) a b - W)`, which is the identity at c = 0 and the
    replacement at abs(c) >= 1.
    """

    def __init__(
        self,
        targets: Sequence[AttentionTarget],
        *,
        projections: str | Sequence[str] = ("query", "key", "value"),
        tied: bool = False,
        scale: float = 0.1,
    ) -> None:
        """Choose the coefficients: one for each projection.

        Args:
            targets: the layers to operate on.
            projections: of `query`, `key`, `value`, `output`.
            tied: whether all layers share coefficients or each has its own (A = projections * L).
            scale: increase of the remaining singular value from 1 at c = 1, > 0.

        Raises:
            ValueError: if an argument is out of range.
        """
        super().__init__(targets, projections, scale)
        self._lay_out(["rank one"], tied=tied)

    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the change from the singular values towards (1 + scale * c, 0, 0, ...), (N, r)."""
        goal = torch.zeros(len(coefficients), len(values), dtype=values.dtype)
        goal[:, 0] = 1 + self.scale * coefficients[:, 0]
        fraction = coefficients.abs().clamp(max=1).to(values)  # (N, 1)
        return fraction * (goal.to(values) - values)
