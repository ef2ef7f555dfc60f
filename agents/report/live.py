"""The report of a run that is going on, written anew now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from agents.report.page import write_report

RELOAD_SECONDS = 30


class LiveReport:
    """Keeps the report of a run current, at little cost.

    Call `refresh` as often as you like, say after each evaluation: it does something only where
    the last report is old enough, and where writing reports has taken no more than its share of
    the run's time. A run with many rows thus gets its reports in longer intervals.

    Args:
        folder: The run's folder.
        every_seconds: Least time between two reports, at least 0.
        share: Greatest share of the run's time that reports may take, above 0 and at most 1.
        clock: Gives the time in seconds; never falls.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_seconds: float = 15.0,
        share: float = 0.02,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not every_seconds >= 0:
            raise ValueError(f"every_seconds must be at least 0, got {every_seconds}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        self._folder = folder
        self._every_seconds = every_seconds
        self._share = share
        self._clock = clock
        self._due = clock()

    def refresh(self) -> bool:
        """Write the report if it is time to; return whether it did.

        A disk that cannot be written to does not end the run: the next report comes in its turn.
        """
        start = self._clock()
        if start < self._due:
            return False
        try:
            write_report(self._folder, reload_seconds=RELOAD_SECONDS)
        except OSError:
            return False
        else:
            return True
        finally:
            end = self._clock()
            self._due = end + max(self._every_seconds, (end - start) * (1 / self._share - 1))
