"""The projections of an attention layer, and which head each of their channels belongs to.

Shapes: H heads, D head dim, F the width on a projection's other side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from avatarl_env.surgery.parameters import check_weight


@dataclass(frozen=True, eq=False)
class Projection:
    """The part of a linear module for queries, keys or values, or the output projection.

    Channel d of head h is channel `start + h * stride + d` of the module's output, or of its input
    if `reads_heads`. This covers fused and interleaved projections.

    Raises:
        ValueError: if the weight is not of floating-point numbers of 16 bits or more.
    """

    module: nn.Module
    """An `nn.Linear`, or a transformers `Conv1D`, which keeps its weight transposed."""
    n_heads: int
    """H; keys and values may have fewer heads than queries."""
    head_dim: int
    """D."""
    start: int = 0
    """First channel of head 0."""
    stride: int = 0
    """Channels from one head to the next; 0 for D, heads without gaps."""
    reads_heads: bool = False
    """Whether the heads are the module's input, as in the output projection."""

    def __post_init__(self) -> None:
        check_weight(self.module)

    @property
    def weight(self) -> nn.Parameter:
        """The module's weight, which other projections may share."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The module's bias; None if it has none or no such attribute."""
        return self.module._parameters.get("bias")

    def heads(self, x: Tensor) -> Tensor:
        """Return the heads' channels of x (..., channels) as (..., H, D), a view."""
        stride = self.stride or self.head_dim
        span = (self.n_heads - 1) * stride + self.head_dim
        return x.narrow(-1, self.start, span).unfold(-1, self.head_dim, stride)

    def by_head(self, weight: Tensor) -> Tensor:
        """Return the heads' part of a tensor laid out like the weight: (F, H, D), a view."""
        made_last = is_transposed(self.module)
        return self.heads(weight if made_last != self.reads_heads else weight.mT)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the heads' part of a tensor laid out like the weight: (F, H * D)."""
        return self.by_head(weight).flatten(1)


@dataclass(frozen=True, eq=False)
class AttentionTarget:
    """The projections of one attention layer."""

    name: str
    """Path of the attention module inside the model."""
    layer: int
    """Number of the layer, from 0."""
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    normalises_queries: bool = False
    """Whether queries are normalised after their projection, which cancels any gain there."""

    @property
    def n_heads(self) -> int:
        """Query heads, H."""
        return self.query.n_heads

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights and biases of all four projections, each once."""
        modules = (self.query.module, self.key.module, self.value.module, self.output.module)
        for module in dict.fromkeys(modules):
            yield from module.parameters(recurse=False)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is (in, out), as in transformers' Conv1D (not imported here)."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
