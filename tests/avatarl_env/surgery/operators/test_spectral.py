"""Tests of avatarl_env/surgery/operators/spectral.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avatarl_env.surgery import (
    LayerTruncation,
    Operator,
    SeedRankOne,
    SpectralBands,
    SurgicalTheater,
    Targets,
)
from tests.avatarl_env.surgery.edits import refused
from tests.avatarl_env.surgery.operators.squares import diagonal, noise, squares

LN2 = math.log(2)


def operated(operator: Operator, targets: Targets, c: list[float], part: str = "output") -> Tensor:
    """Return the first layer's matrix of one projection under an operation."""
    with SurgicalTheater(targets.model, [operator]) as theater:
        operator.apply(theater, c)
        return getattr(targets[0], part).weight.detach().clone()  # type: ignore[no-any-return]


# --- SpectralBands -------------------------------------------------------------------------------


def test_bands_by_hand() -> None:
    """4 3 | 2 1 times 2 | 1/2 is 8 6 | 1 1/2, of mass 15.5, brought back to 10."""
    targets = squares(diagonal(2.0, 4.0, 1.0, 3.0))
    operator = SpectralBands(targets, projections="output", n_bands=2, scale=LN2)
    assert operator.labels == (
        "log-gain band 0 output layer all",
        "log-gain band 1 output layer all",
    )
    found = operated(operator, targets, [1.0, -1.0])
    torch.testing.assert_close(found, diagonal(1.0, 8.0, 0.5, 6.0) / 1.55)


def test_bands_of_values_that_do_not_divide_evenly() -> None:
    """Five values in three bands: 0 0 1 1 2."""
    targets = squares(diagonal(5.0, 4.0, 3.0, 2.0, 1.0))
    operator = SpectralBands(targets, projections="query", n_bands=3, scale=LN2)
    found = operated(operator, targets, [1.0, 0.0, 0.0], "query")
    torch.testing.assert_close(found, diagonal(10.0, 8.0, 3.0, 2.0, 1.0) * 15 / 24)
    found = operated(operator, targets, [0.0, 0.0, 1.0], "query")
    torch.testing.assert_close(found, diagonal(5.0, 4.0, 3.0, 2.0, 2.0) * 15 / 16)


@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_mass_and_singular_vectors_stay(shape: tuple[int, int], seed: int) -> None:
    matrix = noise(*shape, seed=seed).double()
    targets = squares(matrix)
    operator = SpectralBands(targets, projections=["output"], n_bands=5)
    c = np.random.default_rng(seed).uniform(-1, 1, 5).tolist()
    found = operated(operator, targets, c)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ found @ right.mT
    torch.testing.assert_close(core, torch.diag(core.diagonal()), atol=1e-13, rtol=0)
    torch.testing.assert_close(core.trace(), values.sum(), atol=1e-12, rtol=0)
    ratio = core.diagonal() / values
    if len(values) == 5:  # a value for each band
        torch.testing.assert_close((ratio / ratio[0]).log(), torch.tensor(c).double() - c[0])


def test_equal_bands_are_the_identity_up_to_rounding() -> None:
    targets = squares(noise(6, 6))
    operator = SpectralBands(targets, projections="output")
    found = operated(operator, targets, [0.7] * 4)
    torch.testing.assert_close(found, targets[0].output.weight.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_values", [7, 64, 301])
def test_a_row_of_zeros_beside_others_is_exactly_no_change(n_values: int) -> None:
    """However a sum of so many values is rounded."""
    operator = SpectralBands(squares(noise(7, 7)), n_bands=3)
    for seed in range(20):
        values = noise(n_values, seed=seed).double().abs()
        change = operator.middle(values, torch.tensor([[1.0, 0.0, -1.0], [0.0] * 3]).double())
        assert (change[0] != 0).any()
        assert not change[1].any()


def test_a_matrix_of_zeros_stays_one() -> None:
    targets = squares(torch.zeros(3, 3))
    operator = SpectralBands(targets, projections="output", n_bands=2)
    assert operated(operator, targets, [1.0, -1.0]).tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("n_bands", [-1, 0, 1, 4, 10**12])
def test_bands_must_be_two_at_least_and_the_smallest_rank_at_most(n_bands: int) -> None:
    targets = squares(noise(5, 5), noise(3, 8))
    with refused(ValueError, f"n_bands must be in [2, 3], got {n_bands}"):
        SpectralBands(targets, n_bands=n_bands)


def test_each_layer_has_bands_of_its_own_unless_tied() -> None:
    targets = squares(diagonal(2.0, 1.0), diagonal(2.0, 1.0))
    operator = SpectralBands(targets, n_bands=2, tied=False)
    assert operator.labels == tuple(
        f"log-gain band {band} {part} layer {layer}"
        for layer in (0, 1)
        for part in ("query", "output")
        for band in (0, 1)
    )
    with SurgicalTheater(targets.model, [operator]) as theater:
        operator.apply(theater, [0, 0, 0, 0, 0, 0, 1, 0])
        moved = [
            (t.layer, name)
            for t in targets
            for name in ("query", "key", "value", "output")
            if not torch.equal(getattr(t, name).weight, diagonal(2.0, 1.0))
        ]
    assert moved == [(1, "output")]


# --- LayerTruncation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "c", "rank"),
    [(1.0, 0.25, 3), (1.0, -0.5, 2), (1.0, 1.0, 0), (0.5, 1.0, 2), (0.5, 0.1, 4), (1.0, 1.7, 0)],
)
def test_truncation_leaves_the_largest_values(scale: float, c: float, rank: int) -> None:
    """Of four values; beyond all of them there is nothing to take."""
    targets = squares(diagonal(2.0, 4.0, 1.0, 3.0))
    operator = LayerTruncation(targets, scale=scale)
    kept = [value if value > 4 - rank else 0.0 for value in (2.0, 4.0, 1.0, 3.0)]
    torch.testing.assert_close(operated(operator, targets, [c]), diagonal(*kept), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_is_the_best_approximation_of_its_rank(dtype: torch.dtype) -> None:
    matrix = noise(8, 8).to(dtype)
    targets = squares(matrix)
    found = operated(LayerTruncation(targets, scale=1.0), targets, [0.5])
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 4
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close((found - matrix).norm(), values[4:].norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.01, 5.0])
def test_truncation_cannot_take_more_than_all(scale: float) -> None:
    with refused(ValueError, f"scale must be at most 1, the whole spectrum, got {scale}"):
        LayerTruncation(squares(noise(3, 3)), scale=scale)


def test_truncation_labels() -> None:
    targets = squares(noise(3, 3), noise(3, 3))
    assert LayerTruncation(targets).labels == ("cut output layer 0", "cut output layer 1")
    assert LayerTruncation(targets, tied=True).labels == ("cut output layer all",)


# --- SeedRankOne ---------------------------------------------------------------------------------


def test_rank_one_by_hand() -> None:
    """Half of the way from diag(4, 2) to diag(1 + 0.5 * 0.5, 0)."""
    targets = squares(diagonal(4.0, 2.0))
    operator = SeedRankOne(targets, projections="output", scale=0.5)
    found = operated(operator, targets, [0.5])
    torch.testing.assert_close(found, diagonal(2 + 0.625, 1.0))


@pytest.mark.parametrize(("c", "length"), [(1.0, 1.3), (-1.0, 0.7), (2.0, 1.6)])
def test_from_one_on_only_the_first_singular_vectors_are_left(c: float, length: float) -> None:
    matrix = noise(5, 4).double()
    targets = squares(matrix)
    found = operated(SeedRankOne(targets, scale=0.3), targets, [c, 0, 0], "query")
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(found, length * torch.outer(left[:, 0], right[0]))


def test_rank_one_labels() -> None:
    targets = squares(noise(3, 3), noise(3, 3))
    assert SeedRankOne(targets).labels == tuple(
        f"rank one {part} layer {layer}" for layer in (0, 1) for part in ("query", "key", "value")
    )
    assert SeedRankOne(targets, tied=True).labels == tuple(
        f"rank one {part} layer all" for part in ("query", "key", "value")
    )


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SpectralBands, LayerTruncation, SeedRankOne])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": math.nan}, "scale must be positive and finite, got nan"),
        ({"projections": ()}, "projections must be distinct and not empty, got []"),
        (
            {"projections": ("key", "key")},
            "projections must be distinct and not empty, got ['key', 'key']",
        ),
        (
            {"projections": "quary"},
            "projections must be one of ['key', 'output', 'query', 'value'], got 'quary', "
            "did you mean 'query'?",
        ),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with refused(ValueError, message):
        kind(squares(noise(4, 4)), **options)
    with refused(ValueError, "targets must hold at least one attention layer, got none"):
        kind([])
