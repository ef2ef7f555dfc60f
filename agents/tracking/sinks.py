"""Trackers that receive a copy of a run's rows.

A tracker that raises an error is dropped with one warning; the run and its files are not affected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A tracker; it receives JSON types, and its methods may raise any exception."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Receive a row of `metrics.jsonl`."""

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Receive the content of `summary.json`."""

    def finish(self, *, failed: bool) -> None:
        """Write what is left; the last call."""


class Sinks:
    """The trackers of a run; each method passes its arguments on to all of them."""

    def __init__(self) -> None:
        self._sinks: dict[str, Sink] = {}

    def start(self, name: str, make: Callable[[], Sink]) -> None:
        """Create a tracker; `name` is its name in warnings."""
        with self._warning(name, "did not start"):
            self._sinks[name] = make()

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass a row on."""
        for name, sink in list(self._sinks.items()):
            with self._warning(name, "failed"):
                sink.log(row)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Pass the summary on."""
        for name, sink in list(self._sinks.items()):
            with self._warning(name, "failed"):
                sink.summarise(summary)

    def finish(self, *, failed: bool) -> None:
        """Finish all trackers; a second call does nothing."""
        while self._sinks:
            name, sink = self._sinks.popitem()
            with self._warning(name, "did not finish"):
                sink.finish(failed=failed)

    @contextmanager
    def _warning(self, name: str, what: str) -> Iterator[None]:
        """Drop a tracker, with a warning, if the body raises an error."""
        try:
            yield
        except Exception as error:  # trackers document no complete list
            self._sinks.pop(name, None)
            reason = first_line(error)
            _logger.warning("%s %s (%s): the run continues without it", name, what, reason)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
