"""Fixtures for whoever learns or operates."""

from __future__ import annotations

import pytest

from agents.surgeons.sb3 import ALGORITHMS
from avatarl_env.surgery import OPERATORS
from tests.patients import InPlaceGain
from tests.training_runs import QUICK_SAC


@pytest.fixture
def in_place_gain(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register an operator without row edits for the time of a test; return its name."""
    monkeypatch.setitem(OPERATORS, "in_place_gain", InPlaceGain)
    return "in_place_gain"


@pytest.fixture
def quick_surgeons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the algorithms of the table learn early and cheaply."""
    for name, algorithm in ALGORITHMS.items():
        quick = {key: value for key, value in QUICK_SAC.items() if key in algorithm.options}
        monkeypatch.setitem(
            ALGORITHMS, name, algorithm._replace(options={**algorithm.options, **quick})
        )


@pytest.fixture
def immortal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the patient survive whatever is done to it."""
    monkeypatch.setattr("avatarl_env.episode.ENTROPY_RANGE", (0.0, 100.0))
    monkeypatch.setattr("avatarl_env.episode.COLLISION_MARGIN", 1e9)
