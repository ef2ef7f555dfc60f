"""Fixtures of runs, surgeons and operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agents.surgeons.sb3 import ALGORITHMS
from agents.training.loop import train
from agents.training.summary import RunSummary
from avatarl_env.surgery import OPERATORS
from tests.agents.training.broken_runs import config
from tests.patients import InPlaceGain
from tests.training_runs import QUICK_SAC, SmallRun, small_config, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text to learn from."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """A small run with everything on, uninterrupted, with a checkpoint after each step."""
    return train(config(text, tmp_path_factory.mktemp("whole") / "run"), quiet=True)


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


@pytest.fixture
def quick_surgeons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the algorithms of the table learn early and cheaply, as `QUICK_SAC` does."""
    for name, algorithm in ALGORITHMS.items():
        quick = {key: value for key, value in QUICK_SAC.items() if key in algorithm.options}
        monkeypatch.setitem(
            ALGORITHMS, name, algorithm._replace(options={**algorithm.options, **quick})
        )


@pytest.fixture
def immortal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no operation flatline."""
    monkeypatch.setattr("avatarl_env.episode.ENTROPY_RANGE", (0.0, 100.0))
    monkeypatch.setattr("avatarl_env.episode.COLLISION_MARGIN", 1e9)
