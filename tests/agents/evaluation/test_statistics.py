from __future__ import annotations

import math

import numpy as np
import pytest

from agents.evaluation.statistics import Interval, interval


def test_an_interval_by_hand() -> None:
    """1, 2, 3, 4: mean 2.5, standard deviation sqrt(5/3), error sqrt(5/12); Student's t(3)."""
    error = math.sqrt(5 / 12)
    expected = (2.5, 2.5 - 3.182446 * error, 2.5 + 3.182446 * error, 2.5 - 2.353363 * error, 4)
    found = interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(type(value) is float for value in found[:4])
    assert interval(np.full(5, 0.25)) == (0.25, 0.25, 0.25, 0.25, 5)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    intervals = [interval(rng.normal(1.0, 2.0, 5)) for _ in range(2000)]
    two_sided = np.mean([i.low <= 1.0 <= i.high for i in intervals])
    one_sided = np.mean([i.lower_bound <= 1.0 for i in intervals])
    assert two_sided == pytest.approx(0.95, abs=0.015)  # three standard errors
    assert one_sided == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("n", [0, 1])
def test_one_difference_is_not_enough(n: int) -> None:
    with pytest.raises(ValueError, match=f"differences .*{n}"):
        interval(np.zeros(n))


@pytest.mark.parametrize(
    ("low", "high", "sign", "largest"),
    [(1.0, 2.0, 1, 2.0), (-2.0, -1.0, -1, 2.0), (-3.0, 1.0, 0, 3.0), (0.0, 1.0, 0, 1.0)],
)
def test_what_an_interval_excludes(low: float, high: float, sign: int, largest: float) -> None:
    found = Interval((low + high) / 2, low, high, low, 9)
    assert (found.sign, found.largest) == (sign, largest)
    assert found.is_finite
    assert not found.is_zero
    assert not found._replace(high=math.nan).is_finite
    assert Interval(0.0, 0.0, 0.0, 0.0, 9).is_zero
