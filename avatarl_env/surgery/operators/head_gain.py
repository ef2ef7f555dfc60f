"""Gains on the queries and on the output of each head.

Shapes: A coefficients, N operations, L layers, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from avatarl_env.errors import check_bool
from avatarl_env.surgery.operators.base import as_coefficients, check_scale
from avatarl_env.surgery.overlay import RowEdit, scale_heads
from avatarl_env.surgery.projections import AttentionTarget
from avatarl_env.surgery.theater import SurgicalTheater


class HeadGain:
    """A log-sharpness (minus a log-temperature) and a log-value-gain for each head.

    `gain = exp(scale * c)`. The sharpness scales the head's query rows and their bias, hence its
    attention logits: positive is sharper. The value gain scales the columns of the output
    projection that read the head: positive is louder. The output's bias belongs to no head and is
    not scaled. Gains of keys and values would be equivalent, and heads may share keys and values,
    so there are none. (SVF, arXiv 2501.06252, scales singular values in a similar way.)
    """

    def __init__(
        self, targets: Sequence[AttentionTarget], *, tied: bool = True, scale: float = 1.0
    ) -> None:
        """Choose the coefficients.

        Args:
            targets: the layers to operate on.
            tied: one pair per head for all layers (A = 2H: H sharpnesses, then H gains) or a
                pair per layer and head (A = 2HL, layer by layer in the same order).
            scale: nats of gain at c = 1, > 0; 1.0 is a factor of e.

        Raises:
            ValueError: if there are no targets, layers differ in heads while tied, the scale is
                not positive and finite, or a layer normalises its queries, which would undo the
                gain.
        """
        heads = {target.n_heads for target in targets}
        if not heads or (tied and len(heads) > 1):
            raise ValueError(f"targets must agree in the number of heads, got {sorted(heads)}")
        normalised = [target.name for target in targets if target.normalises_queries]
        if normalised:
            raise ValueError(
                "targets must not normalise their queries after the projection: a gain there would "
                f"do nothing, got {normalised}"
            )
        tied = check_bool("tied", tied)
        check_scale(scale)
        self.targets = tuple(targets)
        self.tied = tied
        self.scale = scale
        layers = [("all", targets[0])] if tied else [(str(t.layer), t) for t in targets]
        self.labels = tuple(
            f"{kind} layer {layer} head {head}"
            for layer, target in layers
            for kind in ("log-sharpness", "log-value-gain")
            for head in range(target.n_heads)
        )

    def parameters(self) -> Iterator[Tensor]:
        """Yield query weights and biases and output weights."""
        for target in self.targets:
            yield target.query.weight
            if target.query.bias is not None:
                yield target.query.bias
            yield target.output.weight

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that `coefficients` (A,) stand for."""
        gains = (self.scale * as_coefficients(coefficients, len(self.labels))).exp()
        for target, sharpness, loudness in self._shares(gains):
            _scale(theater, target.query.weight, target.query.by_head, sharpness)
            if target.query.bias is not None:
                _scale(theater, target.query.bias, target.query.heads, sharpness)
            _scale(theater, target.output.weight, target.output.by_head, loudness)

    def row_edits(self, coefficients: ArrayLike) -> list[RowEdit]:
        """Return the edits that `coefficients` (N, A) stand for, on the rows of a batch."""
        gains = (self.scale * as_coefficients(coefficients, len(self.labels), rows=True)).exp()
        return [
            scale_heads(projection, share)
            for target, sharpness, loudness in self._shares(gains)
            for projection, share in ((target.query, sharpness), (target.output, loudness))
        ]

    def _shares(self, gains: Tensor) -> Iterator[tuple[AttentionTarget, Tensor, Tensor]]:
        """Yield each target, its sharpnesses and its value gains, (..., H) of `gains` (..., A)."""
        start = 0
        for target in self.targets:
            middle, stop = start + target.n_heads, start + 2 * target.n_heads
            yield target, gains[..., start:middle], gains[..., middle:stop]
            start = 0 if self.tied else stop


def _scale(
    theater: SurgicalTheater, parameter: Tensor, heads: Callable[[Tensor], Tensor], gains: Tensor
) -> None:
    """Write `parameter` with its part `heads` (..., H, D) multiplied by `gains` (H,)."""
    value = theater.original(parameter).clone()
    part, factor = heads(value), gains.to(value)[:, None]
    # Half precision multiplied by one can change the bits of a NaN.
    part.copy_(torch.where(factor == 1, part, part * factor))
    theater.write(parameter, value)
