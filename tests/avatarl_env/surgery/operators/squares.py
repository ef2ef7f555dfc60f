"""An attention layer of bare matrices, for values worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avatarl_env.surgery import AttentionTarget, Projection, Targets


def squares(*matrices: Tensor) -> Targets:
    """One layer for each matrix, which is the weight of all four of its projections; one head."""
    layers = nn.ModuleList()
    targets = []
    for number, matrix in enumerate(matrices):
        layer = nn.ModuleDict()
        for name in ("query", "key", "value", "output"):
            layer[name] = nn.Linear(matrix.size(1), matrix.size(0), bias=False)
            layer[name].weight = nn.Parameter(matrix.clone())
        made = [Projection(layer[name], 1, matrix.size(0)) for name in ("query", "key", "value")]
        output = Projection(layer["output"], 1, matrix.size(1), reads_heads=True)
        targets.append(AttentionTarget(f"{number}", number, *made, output))
        layers.append(layer)
    return Targets(layers, targets)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
