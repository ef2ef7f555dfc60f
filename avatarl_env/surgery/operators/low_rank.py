"""Seeded random directions of low rank.

Shapes: A coefficients, N operations, F and H * D the sides of a projection's matrix, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avatarl_env.errors import check_integer
from avatarl_env.surgery.operators.factored import FactoredOperator, Factors
from avatarl_env.surgery.projections import AttentionTarget

MAX_DIRECTIONS = 4096
"""Largest number of directions, and largest rank: both take time and memory."""


class LowRankSeed(FactoredOperator):
    """Steps along random directions drawn from a seed, so only coefficients have to be stored.

    `W' = W + sum_k c_k * scale * |W| / |D_k| * D_k` with `D_k = sum_j a_kj b_kj` of rank r,
    a and b standard normal, |.| the Frobenius norm. Each direction spans the chosen matrices of all
    layers. Evolution strategies use such directions (MeZO, arXiv 2305.17333, regenerates them from
    seeds; EGGROLL, arXiv 2511.16652, gives them a low rank).
    """

    def __init__(
        self,
        targets: Sequence[AttentionTarget],
        *,
        projections: str | Sequence[str] = ("query", "output"),
        n_directions: int = 8,
        rank: int = 1,
        seed: int = 0,
        scale: float = 0.1,
    ) -> None:
        """Draw the directions; A = n_directions.

        Args:
            targets: the layers to operate on.
            projections: of `query`, `key`, `value`, `output`.
            n_directions: at least 1.
            rank: of each direction, at least 1.
            seed: of the directions' own generator.
            scale: length of a step at c = 1, relative to the matrix's norm, > 0.

        Raises:
            ValueError: if an argument is out of range.
        """
        super().__init__(targets, projections, scale)
        n_directions = check_integer("n_directions", n_directions, 1, MAX_DIRECTIONS)
        rank = check_integer("rank", rank, 1, MAX_DIRECTIONS)
        seed = check_integer("seed", seed)
        self.rank = rank
        parts = [f"direction {k}" for k in range(n_directions)]
        self._lay_out(parts, tied=True, tied_projections=True)
        generator = torch.Generator().manual_seed(seed)
        n = n_directions * rank
        with torch.inference_mode(False):  # the directions must work with autograd later
            self._directions = [
                (
                    torch.randn(height, n, generator=generator),
                    torch.randn(n, width, generator=generator),
                )
                for height, width in self._shapes()
            ]

    def factorise(self, index: int, matrix: Tensor) -> Factors:
        """Return the directions, and the length of a step along each for this matrix."""
        left, right = (x.to(matrix) for x in self._directions[index])  # (F, n * r), (n * r, H * D)
        # |sum_j a_j b_j|^2 = sum_ij (a_i . a_j) (b_i . b_j), within each direction
        groups = (left.shape[1] // self.rank, self.rank)
        a = left.mT.reshape(*groups, -1).double()
        b = right.reshape(*groups, -1).double()
        norms = ((a @ a.mT) * (b @ b.mT)).sum((1, 2)).sqrt()  # (n,)
        lengths = self.scale * matrix.double().norm() / norms
        return Factors(left, lengths.repeat_interleave(self.rank), right)

    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the step along each direction, (N, n * r)."""
        return coefficients.repeat_interleave(self.rank, dim=1).to(values) * values
