"""What a run's record has in common with the places that it is passed on to.

A sink is an addition: whatever goes wrong there costs one warning, and never the run or a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes what a run writes, in JSON's types, and may raise whatever it likes."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take a row of `metrics.jsonl`."""

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Take the content of `summary.json`."""

    def finish(self, *, failed: bool) -> None:
        """Write down what is left; nothing comes after it."""


class Guarded:
    """A sink whose first fault costs one warning and the rest of it, but not the run."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        """Make the sink.

        Args:
            name: What to call it in a warning.
            make: Makes it; where that fails, there is a warning and nothing more.
        """
        self._name = name
        self._sink: Sink | None = None
        try:
            self._sink = make()
        except Exception as error:  # nobody can list what other people's services raise
            self._warn("did not start", error)

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass a row on."""
        self._attempt("failed", lambda sink: sink.log(row))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Pass the summary on."""
        self._attempt("failed", lambda sink: sink.summarise(summary))

    def finish(self, *, failed: bool) -> None:
        """Let the sink finish; a second call does nothing."""
        self._attempt("did not finish", lambda sink: sink.finish(failed=failed))
        self._sink = None

    def _attempt(self, what: str, action: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            action(self._sink)
        except Exception as error:
            self._sink = None
            self._warn(what, error)

    def _warn(self, what: str, error: Exception) -> None:
        _logger.warning("%s %s (%s): the run goes on without it", self._name, what, line(error))


def line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def sample_text(row: Mapping[str, Any]) -> str:
    """Lay out a row of kind `sample` for a human reader."""
    lines = [
        f"=== {row['phase']}, update {row['update']}, operation {row['operation']}",
        "--- prompt",
        row["prompt"],
        "--- text",
        row["text"],
    ]
    if row["operated_text"] is not None:
        lines += ["--- text of the operated model", row["operated_text"]]
    return "\n".join(lines) + "\n\n"
