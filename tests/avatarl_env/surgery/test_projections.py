"""Tests of avatarl_env/surgery/projections.py."""

from __future__ import annotations

import pytest
import torch

from avatarl_env.surgery import Projection, find_targets
from tests.zoo import ZOO, shared

PARTS = ("query", "key", "value", "output")


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
