"""Tests of agents/tracking/sinks.py and agents/tracking/tensorboard.py."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agents.tracking.sinks import Sinks
from agents.tracking.tensorboard import FOLDER
from agents.tracking.writer import Clock, MetricWriter, RunFolder, check_tracking

# --- any tracker ---------------------------------------------------------------------------------


class Sink:
    """Records its calls, and fails in one of them."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.calls: list[str] = []

    def log(self, row: Mapping[str, Any]) -> None:
        self._call("log")

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._call("summarise")

    def finish(self, *, failed: bool) -> None:
        self._call(f"finish {failed}")

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.broken and what.startswith(self.broken):
            raise LookupError(f"no {what}\nand more")


WHOLE = ["log", "log", "summarise", "finish False"]


@pytest.mark.parametrize(
    ("broken", "calls", "warnings"),
    [
        ("", WHOLE, []),
        ("log", WHOLE[:1], ["Other failed (no log)"]),
        ("summarise", WHOLE[:3], ["Other failed (no summarise)"]),
        ("finish", WHOLE, ["Other did not finish (no finish False)"]),
    ],
)
def test_the_first_failure_costs_one_warning_and_the_rest_of_that_tracker(
    broken: str, calls: list[str], warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    sink, healthy, sinks = Sink(broken), Sink(), Sinks()
    sinks.start("Other", lambda: sink)
    sinks.start("Healthy", lambda: healthy)
    sinks.log({})
    sinks.log({})
    sinks.summarise({})
    sinks.finish(failed=False)
    sinks.finish(failed=True)
    assert sink.calls == calls
    assert healthy.calls == WHOLE
    assert caplog.messages == [f"{line}: the run continues without it" for line in warnings]


def test_a_tracker_that_does_not_start_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def make(error: type[BaseException]) -> Sink:
        raise error

    sinks = Sinks()
    sinks.start("Other", lambda: make(RuntimeError))
    sinks.log({})
    message = "Other did not start (RuntimeError): the run continues without it"
    assert caplog.messages == [message]
    with pytest.raises(KeyboardInterrupt):
        sinks.start("Other", lambda: make(KeyboardInterrupt))


# --- TensorBoard ---------------------------------------------------------------------------------

Events = dict[str, list[tuple[int, float, Any]]]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "first")


def clock(update: int, operation: int, seconds: float = 0.0) -> Clock:
    return Clock(
        phase="joint", update=update, operation=operation, forward_tokens=4096, seconds=seconds
    )


def events(folder: RunFolder) -> Events:
    """Read all event files: name to step, time and value, in the order of writing."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: Events = defaultdict(list)
    for path in sorted((folder.path / FOLDER).iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                text, number = value.tensor.string_val, value.tensor.float_val
                content = text[0].decode() if text else number[0]
                found[value.tag].append((event.step, event.wall_time, content))
    return dict(found)


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, Any]]]:
    found = {name: [(at, x) for at, _, x in of] for name, of in events(folder).items()}
    return {name: of for name, of in found.items() if not isinstance(of[0][1], str)}


def test_scalars_count_updates_or_operations_as_their_rows_do(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(5, 0), {"grpo/loss": 0.5})
        writer.write("evaluation", clock(6, 0), {"validation/loss": 0.25})
        row = {"surgeon/return": -1.0, "surgeon/flatline": "entropy", "surgeon/length": None}
        writer.write("operation", clock(7, 3), {**row, "surgeon/coefficients": [0.5]})
        writer.write("surgeon", clock(7, 4), {"surgeon/actor_loss": 2.0})
        writer.write("commit", clock(7, 8), {"commit/kept": True, "commit/gain": {"mean": 4.0}})
    assert scalars(folder) == {
        "grpo/loss": [(5, 0.5)],
        "validation/loss": [(6, 0.25)],
        "surgeon/return": [(3, -1.0)],
        "surgeon/actor_loss": [(4, 2.0)],
        "commit/kept": [(8, 1.0)],
        "commit/gain/mean": [(8, 4.0)],
    }


def test_samples_configuration_and_summary_are_texts(folder: RunFolder) -> None:
    sample = {"prompt": "To", "text": "*be*", "operated_text": None}
    with MetricWriter(folder, config={"seed": 3}, tensorboard=True) as writer:
        for update in (7, 9):
            writer.write("grpo", clock(update, 0), {})
            for _ in range(2):
                writer.write("sample", clock(update, 3), sample)
        writer.write_summary({"seconds": 1.0})
    found = events(folder)
    assert {name: [step for step, _, _ in of] for name, of in found.items()} == {
        "config/text_summary": [0],
        "sample/0/text_summary": [7, 9],
        "sample/1/text_summary": [7, 9],
        "summary/text_summary": [0],
    }
    # Markdown shows lines that are indented by four character for character.
    assert "    --- text\n    *be*\n" in found["sample/0/text_summary"][0][2]
    assert json.loads(found["config/text_summary"][0][2]) == {"seed": 3}


def test_a_resumed_run_shows_every_kept_row_once_at_its_time(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(1, 0, seconds=10.0), {"grpo/loss": 0.5})
        position = writer.positions()
        writer.write("grpo", clock(2, 0), {"grpo/loss": 0.25})
    (folder.path / FOLDER / "notes.txt").touch()  # not ours to remove
    again = RunFolder.reopen(folder.path)
    with MetricWriter(again, config={}, tensorboard=True, resume_from=position) as writer:
        writer.write("grpo", clock(2, 0, seconds=70.5), {"grpo/loss": 0.125})
    (folder.path / FOLDER / "notes.txt").unlink()
    assert scalars(folder) == {"grpo/loss": [(1, 0.5), (2, 0.125)]}
    (_, first, _), (_, second, _) = events(folder)["grpo/loss"]
    assert second - first == 60.5


def test_tensorboard_must_be_installed_if_it_is_asked_for(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"avatarl-env\[tensorboard\]"):
        MetricWriter(folder, config={}, tensorboard=True)
    assert not folder.config.exists()
    check_tracking("off", False)
    with MetricWriter(folder, config={}) as writer:
        writer.write("grpo", clock(1, 0), {"grpo/loss": 0.5})
    assert not (folder.path / FOLDER).exists()
