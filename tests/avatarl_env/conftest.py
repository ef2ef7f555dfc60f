"""Fixtures that several test files share."""

from __future__ import annotations

import pytest

from avatarl_env.surgery import OPERATORS
from tests.patients import InPlaceGain, store_tiny_patient


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stored tiny patient: what `lm` takes."""
    return store_tiny_patient(tmp_path_factory.mktemp("patient"))


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register an operator without `row_edits`, called in_place."""
    monkeypatch.setitem(OPERATORS, "in_place", InPlaceGain)
