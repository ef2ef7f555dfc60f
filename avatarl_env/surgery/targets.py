"""Find the attention projections of a model, and say which rows and columns belong to which head.

Shapes: H heads, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from avatarl_env.lm.gpt import Attention


@dataclass(frozen=True)
class AttentionTarget:
    """The projections of one attention layer."""

    name: str
    """Path of the attention module inside the model."""
    layer: int
    """Number of the layer, from 0."""
    n_heads: int
    """Query heads, H."""
    head_dim: int
    """Channels per head, D."""
    query: nn.Linear
    """Makes the queries: its output's first H * D channels, head by head."""
    output: nn.Linear
    """Mixes what the heads read: its input's H * D channels, head by head."""

    @property
    def query_rows(self) -> int:
        """Rows of the query projection's weight that make queries."""
        return self.n_heads * self.head_dim

    def parameters(self) -> Iterator[Tensor]:
        """Yield what an operation on this layer may edit."""
        yield self.query.weight
        if self.query.bias is not None:
            yield self.query.bias
        yield self.output.weight

    def queries(self, projected: Tensor) -> Tensor:
        """Cut the queries (..., H, D) out of the query projection's output."""
        queries = projected[..., : self.query_rows]
        return queries.view(*queries.shape[:-1], self.n_heads, self.head_dim)

    def output_by_head(self) -> Tensor:
        """Return the output projection's weight as (C, H, D), a view."""
        return self.output.weight.view(-1, self.n_heads, self.head_dim)


def find_targets(model: nn.Module) -> tuple[AttentionTarget, ...]:
    """Return the attention layers of ``model`` from first to last.

    Raises:
        ValueError: if the model has no attention layer of a known kind; names what it has.
    """
    found = tuple(
        AttentionTarget(
            name, module.layer, module.n_heads, module.head_dim, module.c_attn, module.c_proj
        )
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    )
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(f"model must have attention layers of a known kind, got {kinds}")
    return found
