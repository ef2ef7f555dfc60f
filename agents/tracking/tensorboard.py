"""TensorBoard: event files in the folder `tensorboard` of a run.

Every number of a row becomes a scalar of the same name; its step is the field of the clock that
`agents.tracking.schema.AXES` names. Samples, configuration and summary become texts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.tracking.schema import AXES, numbers, sample_text

FOLDER = "tensorboard"

_FLUSH_SECONDS = 10  # longest delay until a row is visible


class TensorBoardSink:
    """Writes the event file of one run.

    A resumed run logs all its rows again and replaces the old files, which may have rows that were
    cut off since; TensorBoard itself can cut rows by one step counter only.

    Args:
        folder: the run's folder.
        config: the settings of the run, in JSON types.
        seconds: time since the start of the run.
    """

    def __init__(self, folder: Path, config: Any, seconds: float = 0.0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in (folder / FOLDER).glob("events.out.tfevents.*"):
            old.unlink()
        self._start = time.time() - seconds
        self._n_samples = 0  # consecutive: samples of one step need different names
        self._writer: Any = SummaryWriter(  # its methods have no types
            str(folder / FOLDER), flush_secs=_FLUSH_SECONDS
        )
        self._add_text("config", json.dumps(config, indent=2, ensure_ascii=False), 0, self._start)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row, or the text of a sample."""
        step, wall_time = row[AXES[row["kind"]]], self._start + row["seconds"]
        if row["kind"] == "sample":
            self._add_text(f"sample/{self._n_samples}", sample_text(row), step, wall_time)
        self._n_samples = self._n_samples + 1 if row["kind"] == "sample" else 0
        for name, value in numbers(row):
            if "/" in name:  # the clock's fields have none
                self._writer.add_scalar(name, float(value), step, walltime=wall_time)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Write the summary as a text."""
        self._add_text("summary", json.dumps(summary, indent=2, ensure_ascii=False), 0, time.time())

    def finish(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()

    def _add_text(self, name: str, text: str, step: int, wall_time: float) -> None:
        # Markdown shows indented lines verbatim.
        block = "".join(f"    {line}\n" for line in text.split("\n"))
        self._writer.add_text(name, block, step, walltime=wall_time)
