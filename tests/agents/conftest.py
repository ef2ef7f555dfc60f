"""Fixtures of runs and operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.training.loop import train
from agents.training.summary import RunSummary
from avatarl_env.surgery import OPERATORS
from tests.agents.training.broken_runs import break_off, config
from tests.patients import InPlaceGain
from tests.training_runs import SmallRun, small_config, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text to learn from."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """A small run with everything on, uninterrupted, with a checkpoint after each step."""
    return train(config(text, tmp_path_factory.mktemp("whole") / "run"), quiet=True)


@pytest.fixture(scope="session")
def broken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, broken off after its seventh step; do not change it."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    break_off(config(text, folder), 7)
    return folder


@pytest.fixture
def small_run(text: Path, tmp_path: Path) -> SmallRun:
    """Return a function that trains for seconds, into a folder of `tmp_path`."""

    def small_run(folder: str = "run", **changes: Any) -> RunSummary:
        places: dict[str, Any] = {"corpus": text, "out": tmp_path / folder}
        return train(small_config(**{**places, **changes}), quiet=True)

    return small_run


@pytest.fixture
def in_place_gain(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register an operator without row edits for the time of a test; return its name."""
    monkeypatch.setitem(OPERATORS, "in_place_gain", InPlaceGain)
    return "in_place_gain"
