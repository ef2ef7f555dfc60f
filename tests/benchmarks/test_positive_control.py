from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import positive_control
from tests.patients import store_tiny_patient


def test_the_share_and_its_interval() -> None:
    rows = np.array([[0.5, 1.0], [1.0, 2.0], [0.25, 0.5]])
    assert positive_control.share(rows) == 0.5
    assert positive_control.share_interval(rows) == pytest.approx((0.5, 0.5))
    low, high = positive_control.share_interval(np.array([[0.0, 1.0], [1.0, 1.0]] * 20))
    assert low < 0.5 < high


def test_it_trains_tests_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = store_tiny_patient(tmp_path / "model")
    out = tmp_path / "result.json"
    arguments = ["--lm", lm, "--surgeon", "zero", "--operations", "3", "--tests", "2"]
    arguments += ["--n-new", "8", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["positive_control.py", *arguments])
    positive_control.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert [point["operations"] for point in result["curve"]] == [3]
    assert result["test"].keys() == {"trained", "random", "zero"}
    assert result["test"]["trained"]["share"] == 0.0
    assert result["test"]["random"]["gain_over_this"]["n"] == 2
