"""Tests of agents/tracking/writer.py and agents/tracking/run_folder.py."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.tracking.schema import read_rows
from agents.tracking.writer import Clock, MetricWriter, RunFolder, to_json

CLOCK = Clock(phase="joint", update=7, operation=3, forward_tokens=4096, seconds=1.5)
FIELDS = {"phase": "joint", "update": 7, "operation": 3, "forward_tokens": 4096, "seconds": 1.5}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "first")


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def sample(text: str, operated: str | None = None) -> dict[str, str | None]:
    return {"prompt": "To", "text": text, "operated_text": operated}


# --- the folder ----------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_taken_and_any_other_refused(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new" / "run").path.is_dir()
    taken = tmp_path / "taken"
    taken.mkdir()
    for name in (".lock", ".a.partial"):  # what a run leaves that was killed as it began
        (taken / name).touch()
    assert RunFolder(taken).path == taken
    for name in ("a.txt", "b.txt", "c.txt"):
        (taken / name).touch()
    names = r"taken' which holds \.a\.partial, \.lock, a\.txt, \.\.\.$"
    with pytest.raises(ValueError, match=f"out must be an empty or new folder, got '.*{names}"):
        RunFolder(taken)
    with pytest.raises(ValueError, match=r"out must be .*, got the file '.*a\.txt'"):
        RunFolder(taken / "a.txt")
    with pytest.raises(ValueError, match=r"out must be a folder that can be .*, got '"):
        RunFolder(taken / "a.txt" / "run")
    assert len(list(taken.iterdir())) == 5


def test_a_run_can_be_reopened_and_a_folder_without_one_cannot(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"folder must hold a run's config\.json"):
        RunFolder.reopen(folder.path)
    with MetricWriter(folder, config={"seed": 3}) as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 0.25})
    before = contents(folder)
    again = RunFolder.reopen(folder.path)
    assert list(again.rows()) == [{"kind": "grpo", **FIELDS, "grpo/loss": 0.25}]
    assert contents(folder) == before
    folder.samples.unlink()
    folder.samples.symlink_to(folder.path.parent / "elsewhere")
    with pytest.raises(ValueError, match=r"resume must be .*samples\.txt', a symbolic link"):
        RunFolder.reopen(folder.path)


def test_lines_that_are_not_rows_are_told_from_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"kind": "grpo", **FIELDS, "text": "a\u2028b\x85c"}
    bad = [{**row, "kind": 3}, {**row, "seconds": None}, {**row, "forward_tokens": True}, [row]]
    whole = [json.dumps(x, ensure_ascii=False) for x in (row, *bad, row)] + ["[" * 10**5, "torn"]
    path.write_text("\n".join([*whole, json.dumps(row)]), encoding="utf-8", newline="\n")

    def found(n_bytes: int | None = None) -> list[dict[str, object] | None]:
        return [row for _, row in read_rows(path, n_bytes)]

    assert found() == [row, None, None, None, None, row, None, None]  # the last line has no end
    length = len(path.read_bytes().split(b"\n")[0]) + 1
    assert found(length) == found(length + 1) == [row]
    assert found(0) == found(length - 1) == []


# --- what is written -----------------------------------------------------------------------------


def test_settings_and_rows_are_on_disk_at_once(folder: RunFolder) -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        betas: tuple[float, float]
        device: torch.device

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner
        out: Path

    config = Outer(Inner((0.9, 0.95), torch.device("cpu")), Path("runs/first"))
    with MetricWriter(folder, config=config) as writer:
        inner = {"betas": [0.9, 0.95], "device": "cpu"}
        assert json.loads(folder.config.read_text()) == {"inner": inner, "out": "runs/first"}
        for count in (1, 2):
            writer.write("grpo", CLOCK, {"grpo/loss": float(count)})
            assert len(list(folder.rows())) == count
    writer.close()  # a second time
    with pytest.raises(ValueError, match="closed file"):
        writer.write("grpo", CLOCK, {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor(3, dtype=torch.int64), 3),
        (torch.ones(2, requires_grad=True), [1.0, 1.0]),
        (torch.tensor([0.5], dtype=torch.bfloat16), [0.5]),
        (torch.float32, "torch.float32"),
        (float("nan"), None),
        (np.array([1.0, -np.inf]), [1.0, None]),
        ({"low": float("inf"), "n": (1,)}, {"low": None, "n": [1]}),
        (True, True),
        (None, None),
        ("\u2028é", "\u2028é"),
    ],
    ids=repr,
)
def test_values_become_strict_json(value: object, expected: object) -> None:
    converted = to_json(value, "value")
    assert converted == expected
    assert type(converted) is type(expected)
    assert json.loads(json.dumps(converted, allow_nan=False)) == expected


@pytest.mark.parametrize(
    ("kind", "metrics", "message"),
    [
        ("operation", {"score/kl_ref": [1.0, object()]}, r"^score/kl_ref\[1\] must .*got object$"),
        ("operation", {"score/kl_ref": {3: 1.0}}, "score/kl_ref must have strings as keys, got 3"),
        ("evaluate", {}, "kind must be one of .*'evaluate', did you mean 'evaluation'"),
        ("grpo", {"update": 1}, r"named like a field of the clock, got \['update'\]"),
    ],
)
def test_what_is_no_row_is_refused_and_not_written(
    kind: str, metrics: dict[str, object], message: str, folder: RunFolder
) -> None:
    with (
        MetricWriter(folder, config={}) as writer,
        pytest.raises((TypeError, ValueError), match=message),
    ):
        writer.write(kind, CLOCK, metrics)
    assert list(folder.rows()) == []


def test_samples_are_also_written_to_be_read(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write("sample", CLOCK, sample(" be"))
        writer.write("sample", CLOCK, sample(" be", " bee"))
    plain = "=== joint, update 7, operation 3\n--- prompt\nTo\n--- text\n be\n"
    operated = "--- text of the operated model\n bee\n"
    assert folder.samples.read_text(encoding="utf-8") == plain + "\n" + plain + operated + "\n"
    assert [row["operated_text"] for row in folder.rows()] == [None, " bee"]


def test_the_summary_is_replaced_in_one_piece(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with MetricWriter(folder, config={}) as writer:
        writer.write_summary({"seconds": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", fail)
            with pytest.raises(OSError, match="disk"):
                writer.write_summary({"seconds": 2.0})
        assert json.loads(folder.summary.read_text()) == {"seconds": 1.0}
        writer.write_summary({"seconds": np.float64("nan")})
        writer.write_references({"corpus_nats_per_char": None})
    assert json.loads(folder.summary.read_text()) == {"seconds": None}
    assert json.loads(folder.references.read_text()) == {"corpus_nats_per_char": None}


# --- a run that is resumed -----------------------------------------------------------------------


def test_positions_are_synced_lengths(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.fstat(number).st_ino))
    with MetricWriter(folder, config={}) as writer:
        assert writer.positions() == (0, 0)
        writer.write("sample", CLOCK, sample("é\u2028"))  # characters of two and three bytes
        synced.clear()
        lengths = writer.positions()
    assert lengths == (len(folder.metrics.read_bytes()), len(folder.samples.read_bytes()))
    assert synced == [folder.metrics.stat().st_ino, folder.samples.stat().st_ino]


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    def write(writer: MetricWriter, numbers: range) -> None:
        for number in numbers:
            writer.write("grpo", CLOCK, {"grpo/loss": float(number)})
            writer.write("sample", CLOCK, sample(f"é{number}"))

    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    with MetricWriter(whole, config={"track": "offline"}) as writer:
        write(writer, range(4))
    with MetricWriter(stopped, config={"track": "off"}) as writer:
        write(writer, range(2))
        position = writer.positions()
        write(writer, range(2, 3))
        writer.write_summary({"seconds": 1.0})
    with stopped.metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "gr')  # killed while it wrote
    again = RunFolder.reopen(stopped.path)
    with MetricWriter(again, config={"track": "offline"}, resume_from=position) as writer:
        assert not again.summary.exists()
        assert writer.positions() == position
        write(writer, range(2, 4))
    assert contents(stopped) == contents(whole)


@pytest.mark.parametrize(
    ("metrics", "samples", "message"),
    [
        (-1, 0, r"metrics\.jsonl must have a line that ends at byte -1, got none$"),
        (5, 0, r"metrics\.jsonl must have a line that ends at byte 5, got none$"),
        (9999, 0, r"metrics\.jsonl must have the 9999 bytes that were recorded, got \d+$"),
        (0, 5, r"samples\.txt must have a line that ends at byte 5, got none$"),
        (0, 9999, r"samples\.txt must have the 9999 bytes that were recorded, got \d+$"),
    ],
)
def test_a_position_where_no_line_ends_is_refused_and_nothing_is_cut(
    folder: RunFolder, metrics: int, samples: int, message: str
) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write("sample", CLOCK, sample(" be"))
        writer.write_summary({})
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        MetricWriter(folder, config={}, resume_from=(metrics, samples))
    assert contents(folder) == before


def test_kept_lines_must_be_rows(folder: RunFolder) -> None:
    """After a power failure a file may have its length but not its content."""
    with MetricWriter(folder, config={}) as writer:
        writer.write("grpo", CLOCK, {})
        writer.write("grpo", CLOCK, {})
        position = writer.positions()
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(lines[0] + bytes(len(lines[1]) - 1) + b"\n")
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl must have a row of JSON in line 2, got .*x00"
    ):
        folder.check_holds(*position)
