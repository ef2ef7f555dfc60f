from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from agents.tracking.tensorboard import FOLDER
from agents.tracking.writer import Clock, MetricWriter, RunFolder, check_tracking

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
                tensor = value.tensor
                content = (
                    tensor.string_val[0].decode() if tensor.string_val else tensor.float_val[0]
                )
                found[value.tag].append((event.step, event.wall_time, content))
    return dict(found)


def steps(found: Events) -> dict[str, list[tuple[int, Any]]]:
    return {name: [(step, value) for step, _, value in of] for name, of in found.items()}


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, Any]]]:
    found = steps(events(folder))
    return {name: of for name, of in found.items() if not isinstance(of[0][1], str)}


def test_scalars_count_updates_or_operations_as_their_rows_do(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(5, 0), {"grpo/loss": 0.5})
        writer.write("evaluation", clock(6, 0), {"validation/loss": 0.25})
        writer.write("operation", clock(7, 3), {"surgeon/return": -1.0})
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


def test_what_is_no_number_stays_in_the_runs_own_file(folder: RunFolder) -> None:
    row = {
        "surgeon/flatline": "entropy",
        "surgeon/coefficients": [0.5],
        "surgeon/return": float("nan"),
    }
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("operation", clock(7, 3), row)
    assert scalars(folder) == {}


def test_samples_configuration_and_summary_are_texts(folder: RunFolder) -> None:
    sample = {"prompt": "To", "text": "*be*", "operated_text": None}
    with MetricWriter(folder, config={"seed": 3}, tensorboard=True) as writer:
        for update in (7, 9):
            for _ in range(2):
                writer.write("sample", clock(update, 3), sample)
        writer.write_summary({"seconds": 1.0})
    found = steps(events(folder))
    texts = {name: [step for step, _ in of] for name, of in found.items()}
    assert texts == {
        "config/text_summary": [0],
        "sample/0/text_summary": [7, 9],
        "sample/1/text_summary": [7, 9],
        "summary/text_summary": [0],
    }
    # Indented by four, which is Markdown's way to say: letter for letter.
    assert "    --- text\n    *be*\n" in found["sample/0/text_summary"][0][1]
    assert json.loads(found["config/text_summary"][0][1]) == {"seed": 3}


def test_the_times_are_those_of_the_rows(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(1, 0, seconds=10.0), {"grpo/loss": 0.5})
        writer.write("grpo", clock(2, 0, seconds=70.5), {"grpo/loss": 0.5})
    (_, first, _), (_, second, _) = events(folder)["grpo/loss"]
    assert second - first == 60.5


def test_a_run_that_goes_on_shows_every_row_that_stands_once(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(1, 0, seconds=10.0), {"grpo/loss": 0.5})
        place = writer.positions()
        writer.write("grpo", clock(2, 0), {"grpo/loss": 0.25})
    (folder.path / FOLDER / "notes.txt").touch()  # not ours to remove
    again = RunFolder.reopen(folder.path)
    with MetricWriter(again, config={}, tensorboard=True, resume_from=place) as writer:
        writer.write("grpo", clock(2, 0, seconds=70.5), {"grpo/loss": 0.125})
    (folder.path / FOLDER / "notes.txt").unlink()
    assert scalars(folder) == {"grpo/loss": [(1, 0.5), (2, 0.125)]}
    (_, first, _), (_, second, _) = events(folder)["grpo/loss"]
    assert second - first == 60.5


def test_without_being_asked_for_there_is_no_such_folder(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write("grpo", clock(1, 0), {"grpo/loss": 0.5})
    assert not (folder.path / FOLDER).exists()


def test_a_library_that_is_not_there_is_named_with_its_extra_before_anything_is_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = (
        r"^tensorboard must be installed to be written to: "
        r"pip install 'avatarl-env\[tensorboard\]'$"
    )
    with pytest.raises(ImportError, match=message):
        check_tracking("off", True)
    with pytest.raises(ImportError, match=message):
        MetricWriter(folder, config={}, tensorboard=True)
    assert not folder.config.exists()
    check_tracking("off", False)


def test_a_place_that_cannot_be_written_to_costs_a_warning_and_no_row(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.path / FOLDER).touch()  # a file
    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(1, 0), {"grpo/loss": 0.5})
    (message,) = caplog.messages
    assert message.startswith("TensorBoard did not start (")
    assert len(list(folder.rows())) == 1


def test_a_fault_on_the_way_costs_a_warning_and_no_row(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with MetricWriter(folder, config={}, tensorboard=True) as writer:
        writer.write("grpo", clock(1, 0), {"grpo/loss": 0.5})
        monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
        writer.write("grpo", clock(2, 0), {"grpo/loss": 0.25})
        writer.write("grpo", clock(3, 0), {"grpo/loss": 0.125})
    assert caplog.messages == ["TensorBoard failed (disk full): the run goes on without it"]
    assert [row["grpo/loss"] for row in folder.rows()] == [0.5, 0.25, 0.125]
