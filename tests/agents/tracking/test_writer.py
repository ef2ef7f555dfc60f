"""Tests of agents/tracking/writer.py and agents/tracking/run_folder.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

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


# --- a run that is resumed -----------------------------------------------------------------------


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
