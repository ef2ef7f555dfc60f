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
    """Louder and softer bands of singular values, at constant mass.

    The singular values s, largest first, are cut into bands of equal number. Band b is multiplied
    by `exp(scale * c_b)`, then all are rescaled to keep their sum: `s' = s * m * sum(s) /
    sum(s * m)`, and `W' = W + U diag(s' - s) V`. The rescaling is that of SVF
    (Transformer-squared, arXiv 2501.06252), which has a factor for every single value. Equal
    coefficients in all bands are the identity up to rounding.
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
            n_bands: bands, at least 2 and at most the singular values.
            tied: the same coefficients for all layers (A = bands * projections) or for each its
                own (that times L).
            scale: nats at c = 1, > 0.

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
        # Summed in the same order, so that where no band is touched the quotient is exactly 1.
        whole = (values * torch.ones_like(gains)).sum(1, keepdim=True)
        ratio = torch.where(mass > 0, whole / mass, 1.0)
        return values * (gains * ratio - 1)


class LayerTruncation(FactoredOperator):
    """Rank reduction: the smallest singular values are set to zero.

    `|c|` times `scale` is the share of the singular values that goes, rounded to whole values;
    the sign means nothing. This is LASER (arXiv 2312.13558), which picks one matrix and the share
    by search.
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
            tied: the same for all layers, or for each its own (A = projections * L).
            scale: share of the singular values that goes at abs(c) = 1, in (0, 1].

        Raises:
            ValueError: if an argument is out of range.
        """
        super().__init__(targets, projections, scale)
        if scale > 1:
            raise ValueError(f"scale must be at most 1, the whole spectrum, got {scale}")
        self._lay_out(["cut"], tied=tied)

    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return minus the values that go, (N, r)."""
        share = (self.scale * coefficients.abs()).clamp(max=1)  # (N, 1)
        n_kept = len(values) - (share * len(values)).round()
        goes = torch.arange(len(values)) >= n_kept  # (N, r)
        return -values * goes.to(values)


class SeedRankOne(FactoredOperator):
    """Towards a matrix of rank one, as in the project that this one grew from.

    There a projection was *replaced* by `(1 + u) (1 + v) a b` with a, b its first singular
    vectors: the singular value was dropped, u and v acted only through their product, and nothing
    was left of the matrix even at zero. Here `W' = W + |c| ((1 + scale * c) a b - W)`, which is
    the identity at zero and the replacement from abs(c) = 1 on. Kept for comparison: it destroys.
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
            tied: the same for all layers, or for each its own (A = projections * L).
            scale: how much longer the one singular value left is at c = 1 than at c = 0, > 0.

        Raises:
            ValueError: if an argument is out of range.
        """
        super().__init__(targets, projections, scale)
        self._lay_out(["rank one"], tied=tied)

    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the way from the singular values towards (1 + scale * c, 0, 0, ...), (N, r)."""
        goal = torch.zeros(len(coefficients), len(values), dtype=values.dtype)
        goal[:, 0] = 1 + self.scale * coefficients[:, 0]
        way = coefficients.abs().clamp(max=1).to(values)  # (N, 1)
        return way * (goal.to(values) - values)
