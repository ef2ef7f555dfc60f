"""Run folders read back: agents/report/data.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.grpo.estimators import ESTIMATORS
from agents.report.data import (
    CONTROLS,
    Run,
    Series,
    distinct,
    flatlines,
    load_run,
    plotted,
    running_mean,
)


def row(kind: str, phase: str, tokens: int, **metrics: Any) -> dict[str, Any]:
    return {"kind": kind, "phase": phase, "forward_tokens": tokens, "seconds": 0, **metrics}


def run_of(*rows: dict[str, Any], **changes: Any) -> Run:
    return Run(**{"name": "run", "config": {}, "rows": list(rows), "summary": {}, **changes})


def write(folder: Path, metrics: bytes, **files: str) -> Path:
    for name, text in {"config": "{}", **files}.items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "metrics.jsonl").write_bytes(metrics)
    return folder


def test_a_run_is_read_back(tmp_path: Path) -> None:
    rows = [row("sample", "a", 1, text="\u2028 one line"), row("grpo", "a", 1)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
    files = {"config": '{"seed": 3, "corpus": "auto"}', "summary": '{"corpus": "playwright"}'}
    run = load_run(write(tmp_path, content.encode(), **files))
    assert (run.rows, run.name, run.finished) == (rows, tmp_path.name, True)
    # The summary goes before the settings.
    assert (run.fact("corpus"), run.fact("seed"), run.fact("none")) == ("playwright", 3, None)


@pytest.mark.parametrize(
    "damaged",
    [
        b"{oops",
        b'{"kind": "grpo", "phase": "a", "seconds": 1}',
        b'{"kind": "grpo", "forward_tokens": 3, "seconds": 1}',
        b'{"kind": 1, "phase": "a", "forward_tokens": 3, "seconds": 1}',
        b'{"kind": "grpo", "phase": "a", "forward_tokens": null, "seconds": 1}',
        b"[]",
        b"",
        b"\xff\xfe",
    ],
)
def test_a_damaged_line_is_skipped_and_counted(tmp_path: Path, damaged: bytes) -> None:
    whole = row("grpo", "a", 1)
    line = json.dumps(whole).encode()
    half = '{"kind": "sample", "text": "é'.encode()[:-1]  # being written, cut within a character
    run = load_run(write(tmp_path, b"\n".join([line, damaged, line, half])))
    assert (run.rows, run.n_damaged) == ([whole, whole], 1)


def test_what_was_redone_after_a_resume_counts_as_it_was_the_second_time(tmp_path: Path) -> None:
    first = [row("grpo", "a", tokens, loss=1.0) for tokens in (10, 20, 30)]
    second = [row("grpo", "a", tokens, loss=2.0) for tokens in (20, 30, 40)]
    lines = "".join(json.dumps(line) + "\n" for line in first + second)
    series = load_run(write(tmp_path, lines.encode())).series("grpo", "loss")
    assert series == Series([10, 20, 20, 30, 40], [1.0, 1.0, 2.0, 2.0, 2.0], ["a"] * 5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config", "{", r"valid JSON in config\.json"),
        ("summary", "[1]", r"one object in summary\.json, got \[1\]"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(write(tmp_path, b"", **{name: text}))


def test_controls_are_those_of_the_table_of_estimators() -> None:
    assert {name for name, made in ESTIMATORS.items() if made.is_control} == CONTROLS


def test_scores_are_the_final_ones_or_the_latest() -> None:
    rows = [row("evaluation", "a", n, **{"validation/loss": 3.0 - n}) for n in (0, 1)]
    assert run_of(*rows).scores == {"loss": 2.0}
    assert run_of(*rows, summary={"validation": {"loss": 1.5}}).scores == {"loss": 1.5}
    assert run_of().scores == {}


def test_series_and_metrics_take_numbers_only() -> None:
    first = {"a/x": None, "a/flag": True, "a/list": [1.0], "a/y": 1.0, "a/text": "b"}
    run = run_of(row("grpo", "p", 1, **first), row("grpo", "q", 2, **{"a/x": 2}), row("x", "q", 3))
    assert run.metrics("grpo") == ["a/y", "a/x"]
    assert run.series("grpo", "a/x") == Series([2], [2.0], ["q"])
    assert run.series("grpo", "a/flag") == Series([], [], [])


def test_phases_have_no_gaps_and_may_come_again() -> None:
    places = [("a", 0), ("a", 10), ("b", 12), ("b", 30), ("a", 40)]
    run = run_of(*(row("grpo", phase, tokens) for phase, tokens in places))
    spans = [(span["name"], span["start"], span["end"]) for span in run.phases]
    assert spans == [("a", 0, 10), ("b", 10, 30), ("a", 30, 40)]


def test_the_running_mean_begins_anew_in_each_phase() -> None:
    series = Series([1, 2, 3, 4, 5], [2.0, 4.0, 6.0, 20.0, 8.0], [*"aaaab"])
    assert running_mean(series) == [
        Series([1, 2, 3, 4], [2.0, 3.0, 4.0, 10.0], [*"aaaa"]),  # over three values
        Series([5], [8.0], ["b"]),
    ]


def test_the_running_mean_covers_a_round_of_operations_at_least() -> None:
    series = Series([1] * 64 + [2] * 64, [n / 64 for n in range(128)], ["a"] * 128)
    (line,) = running_mean(series)
    assert line.x == [1, 2]
    assert line.y == pytest.approx([31.5 / 64, 1 + 31.5 / 64])


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    series = Series(list(range(2501)), [1 / 3] * 2501, ["a"] * 2501)
    drawn = plotted(series, 1000)
    assert (len(drawn["x"]), drawn["x"][-1], drawn["y"][0]) == (834, 2500, 0.333333)
    assert plotted(Series([], [], []), 10) == {"x": [], "y": []}


def test_flatlines_are_counted_by_cause() -> None:
    causes = ["entropy 0.1 outside [1, 3] nats", "entropy 4.5 outside [1, 3] nats", None]
    causes += ["collision_l2 -1.5 above -2.0", "non-finite logits"]
    rows = [row("operation", "joint", 1, **{"surgeon/flatline": cause}) for cause in causes]
    assert flatlines(rows) == {"entropy": 2, "collision_l2": 1, "non-finite logits": 1}


def test_runs_are_named_after_as_many_folders_as_tell_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other"]
    named = distinct([*folders, tmp_path / "x" / ".." / "other"])
    assert named == dict(zip(["x/run", "y/run", "other"], folders, strict=True))
    with pytest.raises(ValueError, match=r"run_folders.*none"):
        distinct([])
