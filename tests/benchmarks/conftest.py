"""Benchmark scripts import `measure` from beside them, as when Python runs one of them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call a script's `main` with words; return its JSON, the same in its file and last line."""
    out = tmp_path / "results" / "result.json"

    def call(script: ModuleType, *words: str) -> dict[str, Any]:
        script.main([*words, "--out", str(out)])
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result == json.loads(out.read_text(encoding="utf-8"))
        assert result.keys() >= {"command", "commit", "torch", "settings"}
        result["png"] = out.with_suffix(".png").exists()
        return result

    return call
