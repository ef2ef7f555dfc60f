"""Signals that ask a run to stop, recorded so that the current step can end first."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from agents.errors import STOPPING

_HANGUP = getattr(signal, "SIGHUP", None)


class StopSignals:
    """Context manager that records a signal in `signum`; a second signal acts at once.

    A closed terminal may send several SIGHUPs: they count as one. A signal that this process
    ignored from the start, as in a shell's background job, stays ignored. Outside the main thread
    nothing is recorded.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        """Take a function to call after the first signal."""
        self.signum: int | None = None
        self._on_signal = on_signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in STOPPING}
            self._before = {n: h for n, h in handlers.items() if h != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the handlers."""
        self.remove()

    def remove(self) -> None:
        """Restore the previous handlers; a second call does nothing."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        for each, handler in self._before.items():
            signal.signal(each, signal.SIG_IGN if each == _HANGUP else handler)
        if number == _HANGUP:
            _leave_closed_terminal()
        self._on_signal()


def _leave_closed_terminal() -> None:
    """Redirect stdout and stderr to the null device if their terminal has been closed."""
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)
        except OSError:  # already closed
            continue
