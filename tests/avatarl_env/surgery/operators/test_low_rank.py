"""Tests of avatarl_env/surgery/operators/low_rank.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from avatarl_env.surgery import LowRankSeed, SurgicalTheater, Targets
from tests.avatarl_env.surgery.edits import refused
from tests.avatarl_env.surgery.operators.squares import noise, squares


def step(
    operator: LowRankSeed, targets: Targets, c: list[float], part: str = "output"
) -> list[Tensor]:
    """Return how far every layer's projection goes."""
    before = [getattr(target, part).weight.detach().clone() for target in targets]
    with SurgicalTheater(targets.model, [operator]) as theater:
        operator.apply(theater, c)
        after = [getattr(target, part).weight.detach().clone() for target in targets]
    return [new - old for new, old in zip(after, before, strict=True)]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_a_step_has_the_length_and_the_rank_that_were_asked_for(rank: int, scale: float) -> None:
    """In every matrix a share of its own Frobenius norm."""
    targets = squares(noise(9, 7).double(), 5 * noise(6, 8, seed=1).double())
    operator = LowRankSeed(targets, n_directions=2, rank=rank, scale=scale)
    for part in ("query", "output"):
        for target, change in zip(targets, step(operator, targets, [0.0, -0.5], part), strict=True):
            expected = 0.5 * scale * getattr(target, part).weight.norm()
            torch.testing.assert_close(change.norm(), expected, atol=0, rtol=1e-10)
            assert torch.linalg.matrix_rank(change, rtol=1e-9) == rank


def test_steps_add_up() -> None:
    targets = squares(noise(6, 6).double())
    operator = LowRankSeed(targets, n_directions=3)
    (first,), (second,) = step(operator, targets, [1, 0, 0]), step(operator, targets, [0, 0, 1])
    (both,) = step(operator, targets, [0.5, 0, -2])
    torch.testing.assert_close(both, 0.5 * first - 2 * second)
    assert (first * second).sum().abs() < 0.9 * first.norm() * second.norm()


def test_a_seed_is_all_there_is_to_a_direction() -> None:
    targets = squares(noise(6, 6))
    state = torch.get_rng_state()
    for part in ("query", "output"):
        (one,), (same,), (other,) = (
            step(LowRankSeed(targets, seed=seed), targets, [1.0] + [0.0] * 7, part)
            for seed in (3, 3, 4)
        )
        assert torch.equal(one, same)
        assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_matrices_and_directions_have_each_their_own() -> None:
    targets = squares(*[noise(6, 6)] * 2)
    operator = LowRankSeed(targets, projections=("query", "key"), n_directions=2)
    steps = [
        change
        for part in ("query", "key")
        for c in ([1.0, 0.0], [0.0, 1.0])
        for change in step(operator, targets, c, part)
    ]
    assert len(steps) == 8
    for i, a in enumerate(steps):
        for b in steps[:i]:
            assert (a * b).sum().abs() < 0.9 * a.norm() * b.norm()


def test_the_length_follows_the_weights_the_direction_does_not() -> None:
    targets = squares(noise(6, 6))
    operator = LowRankSeed(targets, n_directions=1)
    (before,) = step(operator, targets, [1.0])
    targets[0].output.weight.data.mul_(2).neg_()
    (after,) = step(operator, targets, [1.0])
    torch.testing.assert_close(after, 2 * before, atol=1e-6, rtol=1e-5)


def test_labels_are_directions_through_all_layers() -> None:
    targets = squares(noise(4, 4), noise(4, 4))
    labels = LowRankSeed(targets, n_directions=2).labels
    assert labels == ("direction 0 layer all", "direction 1 layer all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_directions": 0}, "n_directions must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"scale": -1.0}, "scale must be positive and finite, got -1.0"),
        ({"scale": math.inf}, "scale must be positive and finite, got inf"),
        ({"projections": []}, "projections must be distinct and not empty, got []"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with refused(ValueError, message):
        LowRankSeed(squares(noise(4, 4)), **options)
