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
def quick_sac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the SAC of the table learn early and cheaply."""
    sac = ALGORITHMS["sac"]
    quick = sac._replace(options={**sac.options, **QUICK_SAC})
    monkeypatch.setitem(ALGORITHMS, "sac", quick)


@pytest.fixture
def immortal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the patient survive whatever is done to it."""
    monkeypatch.setattr("avatarl_env.episode.ENTROPY_RANGE", (0.0, 100.0))
    monkeypatch.setattr("avatarl_env.episode.COLLISION_MARGIN", 1e9)
