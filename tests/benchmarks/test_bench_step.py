from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bench_step


def test_a_stopwatch_adds_up_what_its_function_takes() -> None:
    watch = bench_step.Stopwatch(lambda seconds, *, value: (time.sleep(seconds), value)[1])
    assert watch(0.01, value=3) == 3
    assert watch(0.02, value=4) == 4
    assert 0.03 <= watch.seconds < 1.0


def test_what_fails_is_timed_too() -> None:
    watch = bench_step.Stopwatch(int)
    with pytest.raises(ValueError, match="invalid literal"):
        watch("x")
    assert watch.seconds > 0


def test_it_measures_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--rows", "2", "--prompts", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments, "--out", str(out)])
    bench_step.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert len(result["step_seconds"]) == 2
    assert 0 < result["share_outside_model"] < 1
    for step, outside in zip(result["step_seconds"], result["outside_model_seconds"], strict=True):
        assert 0 < outside < step
    names = [row["function"] for row in result["profile"]]
    assert any("scoring.py" in name or "ngram.py" in name for name in names)
    assert not any("generation.py" in name for name in names)  # the model's part is left out
