"""Tests of avatarl_env/surgery/operators/base.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avatarl_env.surgery.operators import as_coefficient_rows, as_coefficients
from avatarl_env.surgery.operators.base import check_scale
from tests.avatarl_env.surgery.edits import refused


@pytest.mark.parametrize(
    "given",
    [
        [1, 0, -1],
        (1.0, 0.0, -1.0),
        np.array([1, 0, -1], dtype=np.float32),
        np.array([1, 0, -1], dtype=np.int8),
        np.array([-1.0, 0.0, 1.0])[::-1],
        torch.tensor([1.0, 0.0, -1.0]),
    ],
)
def test_coefficients_of_any_kind_become_float64(given: object) -> None:
    for found in (as_coefficients(given, 3), as_coefficient_rows([given, given], 3)[1]):  # type: ignore[arg-type,list-item]
        assert found.dtype == torch.float64
        assert found.tolist() == [1.0, 0.0, -1.0]


def test_coefficients_are_copied() -> None:
    given = np.zeros((2, 3))
    as_coefficients(given[0], 3).fill_(7.0)
    as_coefficient_rows(given, 3).fill_(7.0)
    assert not given.any()


@pytest.mark.parametrize("shape", [(), (2,), (4,), (1, 3), (3, 1), (0,)])
def test_coefficients_must_have_the_operators_shape(shape: tuple[int, ...]) -> None:
    with refused(ValueError, f"coefficients must have shape (3,), got {shape}"):
        as_coefficients(np.zeros(shape), 3)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (3, 2), (0, 3), (1, 2, 3)])
def test_coefficient_rows_must_have_the_operators_shape(shape: tuple[int, ...]) -> None:
    with refused(ValueError, f"coefficients must have shape (N, 3), got {shape}"):
        as_coefficient_rows(np.zeros(shape), 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coefficients_must_be_finite(bad: float) -> None:
    with refused(ValueError, f"coefficients must be finite, got [0.0, {bad}, 1.0]"):
        as_coefficients([0.0, bad, 1.0], 3)
    with refused(ValueError, f"coefficients must be finite, got [[0.0], [{bad}]]"):
        as_coefficient_rows([[0.0], [bad]], 1)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    with refused(ValueError, f"scale must be positive and finite, got {scale}"):
        check_scale(scale)
    check_scale(1e-9)
