"""Tests of avatarl_env/surgery/projections.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avatarl_env.surgery import Projection, find_targets
from tests.zoo import ZOO, shared

PARTS = ("query", "key", "value", "output")


class Conv1D(nn.Module):
    """Linear with the weight (in, out), known by its name alone."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(n_in * n_out)).view(n_in, n_out))


def numbered(n_out: int, n_in: int) -> nn.Linear:
    linear = nn.Linear(n_in, n_out)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(float(n_in * n_out)).view(n_out, n_in))
    return linear


def test_by_head_of_made_and_read_channels_in_both_orientations() -> None:
    """Entry (f, h, d) by hand: F = 3 on the other side, channels 2 and 3 are head 1."""
    made = Projection(numbered(4, 3), 2, 2)  # weight[channel, f] = 3 * channel + f
    assert made.by_head(made.weight)[:, 1].tolist() == [[6, 9], [7, 10], [8, 11]]
    read = Projection(numbered(3, 4), 2, 2, reads_heads=True)  # weight[f, channel] = 4 f + channel
    assert read.by_head(read.weight)[:, 1].tolist() == [[2, 3], [6, 7], [10, 11]]
    made = Projection(Conv1D(4, 3), 2, 2)  # weight[f, channel]
    assert made.by_head(made.weight)[:, 1].tolist() == [[2, 3], [6, 7], [10, 11]]
    read = Projection(Conv1D(3, 4), 2, 2, reads_heads=True)  # weight[channel, f]
    assert read.by_head(read.weight)[:, 1].tolist() == [[6, 9], [7, 10], [8, 11]]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ZOO)
def test_matrix_computes_what_the_module_does(name: str, part: str) -> None:
    for target in find_targets(shared(name)):
        projection: Projection = getattr(target, part)
        matrix = projection.matrix(projection.weight.detach())
        assert matrix.shape[1] == projection.n_heads * projection.head_dim
        n_read = matrix.shape[1] if projection.reads_heads else matrix.shape[0]
        read = torch.randn(5, n_read, generator=torch.Generator().manual_seed(0))
        bias = 0 if projection.bias is None else projection.bias.detach()
        with torch.no_grad():
            made = projection.module(read) - bias
        if projection.reads_heads:
            found, expected = made, projection.heads(read).flatten(-2) @ matrix.mT
        else:
            found, expected = projection.heads(made).flatten(-2), read @ matrix
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
