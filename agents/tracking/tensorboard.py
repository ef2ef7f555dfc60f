"""TensorBoard as an addition to a run's own files: event files in the folder `tensorboard`.

Every number of a row becomes a scalar of the same name, its step counted by the clock that
`agents.tracking.schema.AXES` gives for the row's kind: model updates or operations.
Samples become texts, and so do configuration and summary.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.tracking.schema import AXES, numbers
from agents.tracking.sinks import sample_text

FOLDER = "tensorboard"

_FLUSH_SECONDS = 10  # a reader waits no longer than that to see a row


def check_installed() -> None:
    """Raise an ImportError that names the extra, unless the library is there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard must be installed to be written to: pip install 'avatarl-env[tensorboard]'"
        )


class TensorBoardSink:
    """Event files of one run."""

    def __init__(self, folder: Path, config: Any, seconds: float = 0.0) -> None:
        """Begin an event file; those of an earlier part of the run are removed.

        For whoever goes on with a run logs the rows that stand once more. To keep the old files
        would show rows that were cut off, and TensorBoard's own way to cut knows one clock only.

        Args:
            folder: The run's folder.
            config: The settings of the run, in JSON's types.
            seconds: Time since the start of the run.
        """
        from torch.utils.tensorboard import SummaryWriter

        for old in (folder / FOLDER).glob("events.out.tfevents.*"):
            old.unlink()
        self._start = time.time() - seconds
        self._samples: tuple[tuple[Any, ...], int] = ((), 0)
        self._writer: Any = SummaryWriter(  # its methods have no types
            str(folder / FOLDER), flush_secs=_FLUSH_SECONDS
        )
        self._add_text("config", json.dumps(config, indent=2, ensure_ascii=False), 0, self._start)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row, or the text of a sample."""
        step, wall_time = row[AXES[row["kind"]]], self._start + row["seconds"]
        if row["kind"] == "sample":
            name = f"sample/{self._number_of(row)}"
            self._add_text(name, sample_text(row), step, wall_time)
        for name, value in numbers(row):
            if "/" in name:  # the clock is on the axes
                self._writer.add_scalar(name, float(value), step, walltime=wall_time)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the summary as a text."""
        self._add_text("summary", json.dumps(summary, indent=2, ensure_ascii=False), 0, time.time())

    def finish(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()

    def _number_of(self, row: Mapping[str, Any]) -> int:
        """Count the samples of one time from 0, so that each is a text of its own."""
        when = (row["phase"], row["update"], row["operation"])
        before, count = self._samples
        number = count if when == before else 0
        self._samples = (when, number + 1)
        return number

    def _add_text(self, name: str, text: str, step: int, wall_time: float) -> None:
        # Indented: what TensorBoard reads as Markdown is then shown letter for letter.
        block = "".join(f"    {line}\n" for line in text.split("\n"))
        self._writer.add_text(name, block, step, walltime=wall_time)
