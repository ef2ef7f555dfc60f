from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import long_texts
from tests.training_runs import write_text


def test_every_way_spends_its_compute_and_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--updates", "3", "--compute", "120000", "--horizon", "8"]
    arguments += ["--texts", "2", "--rows", "2", "--round", "2", "--prompts", "8"]
    arguments += ["--corpus", str(write_text(tmp_path, 20_000)), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["long_texts.py", *arguments])
    long_texts.main()
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made == json.loads(out.read_text(encoding="utf-8"))
    rows = made["rows"]
    assert [*rows] == ["the beginning", "horizon 1", "horizon 8", "horizon 8, operated"]
    for name, row in rows.items():
        assert all(math.isfinite(row[key]) for key in (*long_texts.TERMS, "heldout_loss"))
        if name == "the beginning":
            continue
        assert row["updates"] > 0
        # Whole rounds, of which none would have gone on top.
        spent = row["update_tokens"] + row["surgeon_tokens"]
        assert 60_000 < spent < 130_000
        assert (row["surgeon_tokens"] > 0) == ("operated" in name)
    assert rows["horizon 8, operated"]["n_rounds"] > 0
