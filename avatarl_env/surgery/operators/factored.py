"""Base class of operators that add `left @ diag(middle(c)) @ right` to a matrix.

Shapes: A coefficients, N operations, F and H * D the sides of a projection's matrix, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from avatarl_env.errors import check_bool, check_choice, shown
from avatarl_env.surgery.operators.base import as_coefficients, check_scale
from avatarl_env.surgery.overlay import RowEdit, add_low_rank
from avatarl_env.surgery.projections import AttentionTarget, Projection
from avatarl_env.surgery.theater import SurgicalTheater

PROJECTIONS = ("query", "key", "value", "output")


class Factors(NamedTuple):
    """A factorisation of a matrix, or of a change to it."""

    left: Tensor
    """(F, r)."""
    values: Tensor
    """(r,) singular values, or sizes; float64."""
    right: Tensor
    """(r, H * D)."""


class EditedMatrix(NamedTuple):
    """A projection that is edited."""

    name: str
    projection: Projection
    columns: slice
    """Its part of the coefficients."""


class FactoredOperator(ABC):
    """Adds a change, factorised as above and computed from W, to each projection's matrix W.

    Factors are computed when first needed, and kept with a copy of W until W changes. Coefficients
    that are all zero need none.
    """

    def __init__(
        self,
        targets: Sequence[AttentionTarget],
        projections: str | Sequence[str],
        scale: float,
    ) -> None:
        if not targets:
            raise ValueError("targets must hold at least one attention layer, got none")
        projections = [projections] if isinstance(projections, str) else projections
        if not isinstance(projections, list | tuple):
            raise ValueError(  # noqa: TRY004 - as for every bad argument
                f"projections must be a name or a list of names, got {shown(projections)}"
            )
        for name in projections:
            check_choice("projections", name, PROJECTIONS)
        if not projections or len(set(projections)) < len(projections):
            raise ValueError(f"projections must be distinct and not empty, got {[*projections]}")
        check_scale(scale)
        self.targets = tuple(targets)
        self.projections = tuple(projections)
        self.scale = scale
        self.labels: tuple[str, ...] = ()
        self._matrices: tuple[EditedMatrix, ...] = ()
        self._known: dict[int, tuple[Tensor, Factors]] = {}

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights, each once; biases are not edited."""
        yield from dict.fromkeys(edited.projection.weight for edited in self._matrices)

    def factorise(self, index: int, matrix: Tensor) -> Factors:
        """Return the factors for edited matrix number `index`: its SVD, largest value first.

        Args:
            index: number of the edited matrix.
            matrix: (F, H * D), float32 or float64.
        """
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Factors(left, values.double(), right)

    @abstractmethod
    def middle(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Return the middle (N, r) of the change; exactly 0 for coefficients of 0.

        Args:
            values: (r,) of the factors.
            coefficients: (N, .) those of the matrix.
        """

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that `coefficients` (A,) stand for.

        Raises:
            ValueError: if the coefficients have another shape or are not finite, or a weight that
                they change is not finite.
        """
        row = as_coefficients(coefficients, len(self.labels))[None]
        values: dict[nn.Parameter, Tensor] = {}  # projections may share a module
        for index, (_, projection, columns) in enumerate(self._matrices):
            weight, share = projection.weight, row[:, columns]
            original = theater.original(weight)
            if weight not in values:
                values[weight] = original.clone()
            if not share.any():  # W + 0 would turn -0.0 into 0.0
                continue
            factors = self._factors(index, projection.matrix(original))
            middle = self.middle(factors.values, share).to(factors.left)
            with torch.autocast(weight.device.type, enabled=False):
                change = factors.left * middle @ factors.right  # (F, H * D)
            by_head = projection.by_head(values[weight])
            by_head.add_(change.view_as(by_head))
        for weight, value in values.items():
            theater.write(weight, value)

    def row_edits(self, coefficients: ArrayLike) -> list[RowEdit]:
        """Return the edits that `coefficients` (N, A) stand for, on the rows of a batch.

        Raises:
            ValueError: as `apply` does.
        """
        rows = as_coefficients(coefficients, len(self.labels), rows=True)
        edits = []
        for index, (_, projection, columns) in enumerate(self._matrices):
            share = rows[:, columns]
            if share.any():
                factors = self._factors(index, projection.matrix(projection.weight.detach()))
                middle = self.middle(factors.values, share)
                edits.append(add_low_rank(projection, factors.left, middle, factors.right))
        return edits

    def _lay_out(self, parts: Sequence[str], *, tied: bool, tied_projections: bool = False) -> None:
        """Give every projection of every layer a coefficient for each part, own or shared."""
        tied = check_bool("tied", tied)
        matrices: list[EditedMatrix] = []
        labels: list[str] = []
        places: dict[str, slice] = {}
        for target in self.targets:
            for name in self.projections:
                layer = "layer all" if tied else f"layer {target.layer}"
                place = layer if tied_projections else f"{name} {layer}"
                if place not in places:
                    places[place] = slice(len(labels), len(labels) + len(parts))
                    labels += [f"{part} {place}" for part in parts]
                full_name = f"{name} projection of {target.name}"
                matrices.append(EditedMatrix(full_name, getattr(target, name), places[place]))
        self._matrices, self.labels = tuple(matrices), tuple(labels)

    def _shapes(self) -> list[tuple[int, int]]:
        """Return (F, H * D) of every edited matrix."""
        edited = [getattr(target, name) for target in self.targets for name in self.projections]
        views = [projection.by_head(projection.weight) for projection in edited]
        return [(view.size(0), view.size(1) * view.size(2)) for view in views]

    # Factors are kept, and tensors made in inference mode could not be used with autograd later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _factors(self, index: int, matrix: Tensor) -> Factors:
        """Return the factors of a matrix, recomputed if it has changed."""
        if index in self._known:
            copy, factors = self._known[index]
            same = (copy.dtype, copy.device) == (matrix.dtype, matrix.device)
            if same and torch.equal(copy, matrix):
                return factors
        if not matrix.isfinite().all():
            name = self._matrices[index].name
            raise ValueError(f"weights must be finite, got non-finite ones in the {name}")
        copy = matrix.clone()
        with torch.autocast(matrix.device.type, enabled=False):
            factors = self.factorise(index, copy.to(torch.promote_types(copy.dtype, torch.float32)))
        self._known[index] = (copy, factors)
        return factors
