from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.grpo.estimators import ESTIMATORS
from agents.report.data import (
    CONTROLS,
    PhaseSpan,
    RunRecord,
    Series,
    flatlines,
    load_run,
    running_mean,
)


def record(*rows: dict[str, Any], **changes: Any) -> RunRecord:
    return RunRecord(**{"name": "run", "config": {}, "rows": list(rows), "summary": {}, **changes})


def row(kind: str, phase: str, tokens: int, **metrics: Any) -> dict[str, Any]:
    return {"kind": kind, "phase": phase, "forward_tokens": tokens, **metrics}


def write(folder: Path, metrics: bytes = b"", config: str = "{}") -> Path:
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "metrics.jsonl").write_bytes(metrics)
    return folder


def test_a_run_is_read_back(tmp_path: Path) -> None:
    lines = [row("sample", "a", 1, text="\u2028 one line"), row("grpo", "a", 1)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    run = load_run(write(tmp_path, content.encode(), config='{"seed": 3}'))
    assert run.rows == lines
    assert run.config == {"seed": 3}
    assert run.name == tmp_path.name
    assert not run.finished


def test_a_summary_means_that_the_run_has_finished(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"seconds": 2.5}', encoding="utf-8")
    run = load_run(write(tmp_path))
    assert run.finished
    assert run.fact("seconds") == 2.5


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    whole = row("grpo", "a", 1)
    half = '{"kind": "sample", "text": "é'.encode()[:-1]  # cut within a character
    run = load_run(write(tmp_path, json.dumps(whole).encode() + b"\n" + half))
    assert (run.rows, run.torn) == ([whole], 0)


@pytest.mark.parametrize(
    "torn",
    [
        b"{oops",
        b'{"kind": "grpo", "phase": "a"}',
        b'{"kind": "grpo", "forward_tokens": 3}',
        b'{"kind": 1, "phase": "a", "forward_tokens": 3}',
        b'{"kind": "grpo", "phase": "a", "forward_tokens": null}',
        b"[]",
        b"",
        b"\xff\xfe",
    ],
)
def test_what_is_no_row_is_left_out_and_counted(tmp_path: Path, torn: bytes) -> None:
    whole = row("grpo", "a", 1)
    line = json.dumps(whole).encode()
    run = load_run(write(tmp_path, b"\n".join([line, torn, line, b""])))
    assert (run.rows, run.torn) == ([whole, whole], 1)


def test_a_part_that_was_done_again_counts_as_it_came_the_second_time(tmp_path: Path) -> None:
    first = [row("grpo", "a", tokens, loss=1.0) for tokens in (10, 20, 30)]
    second = [row("grpo", "a", tokens, loss=2.0) for tokens in (20, 30, 40)]
    lines = "".join(json.dumps(line) + "\n" for line in first + second)
    run = load_run(write(tmp_path, lines.encode()))
    assert run.series("grpo", "loss") == Series(
        [10, 20, 20, 30, 40], [1.0, 1.0, 2.0, 2.0, 2.0], ["a"] * 5
    )


def test_controls_are_those_that_the_table_of_estimators_calls_so() -> None:
    assert {name for name, made in ESTIMATORS.items() if made.is_control} == CONTROLS
    assert record(config={"grpo": {"estimator": "ce"}}).is_control
    assert not record(config={"grpo": {"estimator": "brier"}}).is_control
    assert not record(config={"grpo": None}).is_control


def test_scores_are_the_final_ones_or_the_latest() -> None:
    rows = [row("evaluation", "a", n, **{"validation/loss": 3.0 - n}) for n in (0, 1)]
    assert record(*rows).scores() == {"loss": 2.0}
    assert record(*rows, summary={"validation": {"loss": 1.5}}).scores() == {"loss": 1.5}
    assert record().scores() == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", r"must hold valid JSON in config\.json"), ("[1]", r"one object in .*, got \[1\]")],
)
def test_broken_settings_are_named(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(write(tmp_path, config=config))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^run_folder must hold config\.json and metrics\.jsonl"):
        load_run(tmp_path)


def test_facts_come_from_the_summary_first() -> None:
    run = record(config={"corpus": "auto", "seed": 0}, summary={"corpus": "playwright"})
    assert (run.fact("corpus"), run.fact("seed"), run.fact("none")) == ("playwright", 0, None)


def test_a_series_leaves_out_what_is_no_number() -> None:
    run = record(
        row("grpo", "a", 1, loss=0.5),
        row("grpo", "a", 2, loss=None),
        row("grpo", "a", 3),
        row("other", "a", 4, loss=0.25),
        row("grpo", "b", 5, loss=1),
    )
    assert run.series("grpo", "loss") == Series([1, 5], [0.5, 1.0], ["a", "b"])


def test_metrics_are_names_with_a_slash_that_are_a_number_somewhere() -> None:
    first = {"a/x": None, "a/flag": True, "a/list": [1.0], "a/y": 1.0, "a/text": "b"}
    run = record(row("grpo", "p", 1, **first), row("grpo", "p", 2, **{"a/x": 2}))
    assert run.metrics("grpo") == ["a/y", "a/x"]


def test_kept_commits_are_those_with_the_flag() -> None:
    kept = row("commit", "joint", 2, **{"commit/kept": True})
    run = record(row("commit", "joint", 1, **{"commit/kept": False}), kept)
    assert run.kept_commits() == [kept]


def test_phases_follow_without_gaps_and_may_come_again() -> None:
    places = [("a", 0), ("a", 10), ("b", 12), ("b", 30), ("a", 40)]
    run = record(*(row("grpo", phase, tokens) for phase, tokens in places))
    assert run.phases() == [
        PhaseSpan(name="a", start=0, end=10),
        PhaseSpan(name="b", start=10, end=30),
        PhaseSpan(name="a", start=30, end=40),
    ]


def test_running_mean_looks_back_over_the_window() -> None:
    series = Series([1, 2, 3, 4], [2.0, 4.0, 6.0, 20.0], ["a"] * 4)
    assert running_mean(series, window=2).y == [2.0, 3.0, 5.0, 13.0]
    assert running_mean(series, window=9).y == [2.0, 3.0, 4.0, 8.0]


def test_running_mean_begins_anew_with_each_phase() -> None:
    series = Series([1, 2, 3, 4], [0.0, 0.0, 8.0, 4.0], ["a", "a", "b", "b"])
    assert running_mean(series, window=4) == Series([1, 2, 3, 4], [0.0, 0.0, 8.0, 6.0], [*"aabb"])


def test_running_mean_has_one_value_per_place() -> None:
    series = Series([1, 1, 1, 2], [3.0, 5.0, 7.0, 1.0], ["a"] * 4)
    assert running_mean(series, window=3) == Series([1, 2], [5.0, 13 / 3], ["a", "a"])


def test_causes_of_death_are_counted_without_their_figures() -> None:
    causes = [
        "entropy 0.123 outside [1.104, 3.312] nats",
        "collision_l2 30.38 above 10.02",
        "entropy 4.5 outside [1.104, 3.312] nats",
        "non-finite logits",
        None,
        "collision_l2 -1.5 above -2.0",
    ]
    rows = [row("operation", "joint", 1, **{"surgeon/flatline": cause}) for cause in causes]
    rows.append(row("operation", "joint", 1))
    assert flatlines(rows) == {"entropy": 2, "collision_l2": 2, "non-finite logits": 1}
    assert flatlines([]) == {}
