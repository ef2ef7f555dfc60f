"""Tests of avatarl_env/surgery/operators/factored.py: caching and precision of the factors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from avatarl_env.surgery import (
    LayerTruncation,
    LowRankSeed,
    Overlay,
    SeedRankOne,
    SpectralBands,
    SurgicalTheater,
    find_targets,
)
from avatarl_env.surgery.operators.factored import FactoredOperator
from tests.avatarl_env.surgery.operators.squares import noise, squares
from tests.fakes import fingerprint, tiny_gpt

KINDS = [SpectralBands, LayerTruncation, SeedRankOne, LowRankSeed]
SVD_KINDS = KINDS[:3]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the factorisations so far."""
    calls: list[torch.dtype] = []
    real = torch.linalg.svd

    def svd(matrix: torch.Tensor, **options: Any) -> Any:
        calls.append(matrix.dtype)
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return calls


def vector(operator: FactoredOperator, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1, len(operator.labels)) * (
        (-1.0) ** np.arange(len(operator.labels))
    )


# --- kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SVD_KINDS)
def test_factors_are_computed_once(kind: Any, made: list[torch.dtype]) -> None:
    """Although theaters count up the weights' versions."""
    model = tiny_gpt()
    operator = kind(find_targets(model))
    n_sites = 2 * len(operator.projections)
    assert made == []
    versions = [p._version for p in operator.parameters()]
    for seed in range(3):
        with SurgicalTheater(model, [operator]) as theater:
            operator.apply(theater, vector(operator, seed))
            operator.apply(theater, vector(operator, seed + 1))
        with Overlay(operator, [vector(operator, seed)]), torch.no_grad():
            model(torch.arange(4)[None])
        assert len(made) == n_sites
    assert [p._version for p in operator.parameters()] != versions


def test_zero_coefficients_need_no_factors(made: list[torch.dtype]) -> None:
    targets = squares(noise(4, 4), noise(4, 4))
    operator = LayerTruncation(targets)
    with SurgicalTheater(targets.model, [operator]) as theater:
        operator.apply(theater, [0.0, 0.0])
        assert operator.row_edits(np.zeros((3, 2))) == []
        assert made == []
        operator.apply(theater, [0.5, 0.0])
        assert len(made) == 1
        assert len(operator.row_edits([[0.0, 0.0], [0.0, 0.5]])) == 1
        assert len(made) == 2


@pytest.mark.parametrize("how", ["optimizer", "data", "replaced data", "commit", "in place"])
def test_factors_are_recomputed_only_for_changed_weights(how: str, made: list[torch.dtype]) -> None:
    targets = squares(noise(5, 5), noise(5, 5, seed=1))
    operator = LayerTruncation(targets, scale=1.0)
    weight = targets[1].output.weight

    def ranks() -> list[int]:
        with SurgicalTheater(targets.model, [operator]) as theater:
            operator.apply(theater, [0.4, 0.4])
            weights = [t.output.weight.detach() for t in targets]
            return [int(torch.linalg.matrix_rank(w, rtol=1e-4)) for w in weights]

    assert ranks() == [3, 3]
    assert len(made) == 2
    if how == "optimizer":
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.grad = noise(5, 5, seed=2)
        optimizer.step()
    elif how == "data":
        weight.data[0, 0] += 1e-3
    elif how == "replaced data":
        weight.data = noise(5, 5, seed=2)
    elif how == "in place":
        with torch.no_grad():
            weight.neg_()
    else:
        with SurgicalTheater(targets.model, [operator]) as theater:
            theater.write(weight, noise(5, 5, seed=2))
            theater.commit()
    assert ranks() == [3, 3]
    assert len(made) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_factors_follow_the_weights_to_another_device(kind: Any) -> None:
    targets = squares(noise(6, 6))
    operator = kind(targets)
    results = []
    for device in ("cpu", "cuda", "cpu"):
        targets.model.to(device)
        with SurgicalTheater(targets.model, [operator]) as theater:
            operator.apply(theater, vector(operator))
            results.append([p.detach().cpu().clone() for p in operator.parameters()])
        with Overlay(operator, [vector(operator)]):
            for part in operator.projections:
                getattr(targets[0], part).module(torch.ones(1, 6, device=device))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_rounded_once_at_the_end(kind: Any, dtype: torch.dtype) -> None:
    half, single = (squares(noise(6, 6).to(dtype).to(x)) for x in (dtype, torch.float32))
    results = []
    for targets in (half, single):
        operator = kind(targets)
        with SurgicalTheater(targets.model, [operator]) as theater:
            operator.apply(theater, vector(operator))
            results.append([p.detach().clone() for p in operator.parameters()])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_weights_are_refused_and_nothing_is_written(kind: Any, bad: float) -> None:
    targets = squares(noise(5, 5), noise(5, 5))
    operator = kind(targets)
    part = operator.projections[-1]
    getattr(targets[1], part).weight.data[2, 3] = bad
    before = fingerprint(targets.model)
    message = f"weights must be finite, got non-finite ones in the {part} projection of 1"
    with SurgicalTheater(targets.model, [operator]) as theater:
        with pytest.raises(ValueError, match=message):
            operator.apply(theater, vector(operator))
        assert fingerprint(targets.model) == before
        operator.apply(theater, 0 * vector(operator))
        assert fingerprint(targets.model) == before
    with pytest.raises(ValueError, match=message), Overlay(operator, [vector(operator)]):
        pass
    assert not any(module._forward_hooks for module in targets.model.modules())
