"""Tests of benchmarks/bench_theater.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType

import pytest
import torch
from torch import nn

from avatarl_env.surgery import SurgicalTheater
from benchmarks import bench_theater


def test_it_checks_times_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two layers of width 16 with (48, 16) and (16, 16) projections: 2 x 1024 floats saved."""
    out = tmp_path / "folder" / "result.json"
    arguments = ["--quick", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_theater.py", *arguments])
    bench_theater.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    row = result["sizes"]["tiny"]
    assert row["saved_bytes"] == 2 * 1024 * 4
    assert row["model_bytes"] == 4 * row["n_parameters"] > row["saved_bytes"]
    ways = ["copies", "theater", "new theater", "deepcopy", "state dict"]
    assert list(row["seconds"]) == list(row["over_copies"]) == ways
    assert row["over_copies"]["copies"] == 1.0
    assert all(seconds["median"] > 0 for seconds in row["seconds"].values())
    assert result["ceilings"].keys() == {
        "large_copy_bytes_per_second",
        "small_copy_bytes_per_second",
    }
    assert result["threads"] == result["settings"]["threads"] == 1


class Forgetful(SurgicalTheater):
    """Leaves the edited weights behind."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_open:
            self.commit()
        super().__exit__(exc_type, exc, traceback)


class Greedy(SurgicalTheater):
    """Saves a byte too much."""

    @property
    def saved_bytes(self) -> int:
        return super().saved_bytes + 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgetful, "all weights must come back, got others"),
        (Greedy, "only the targets must be saved, got 13 bytes"),
    ],
)
def test_a_theater_that_does_not_keep_its_word_is_not_timed(
    kind: type[SurgicalTheater], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(3, 1)
    assert bench_theater.check(model, [model.weight]) == 12
    monkeypatch.setattr(bench_theater, "SurgicalTheater", kind)
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        bench_theater.check(model, [model.weight])


def test_an_edit_that_changes_nothing_would_be_no_check() -> None:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(torch.inf)
    with pytest.raises(RuntimeError, match=r"^all 1 targets must change in the theater, got 0$"):
        bench_theater.check(model, [model.weight])
