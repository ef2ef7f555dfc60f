"""Signals that ask a run to stop: noted, so that the step under way can end first."""

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
    """Context manager that notes a signal in `signum`; a second signal acts at once.

    A closed terminal may send several SIGHUPs: they count as one. A signal that this process was
    started to ignore, as shells do in the background, stays ignored. Outside the main thread
    nothing is noted.
    """

    def __init__(self, noted: Callable[[], None]) -> None:
        """Take what to call when the first signal has been noted."""
        self.signum: int | None = None
        self._noted = noted
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in STOPPING}
            self._before = {n: h for n, h in handlers.items() if h != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the handlers."""
        self.remove()

    def remove(self) -> None:
        """Put back the handlers that were there before; a second call does nothing."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        for each, handler in self._before.items():
            signal.signal(each, signal.SIG_IGN if each == _HANGUP else handler)
        if number == _HANGUP:
            _leave_closed_terminal()
        self._noted()


def _leave_closed_terminal() -> None:
    """Discard stdout and stderr if they lead to a terminal that has been closed."""
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        except OSError:  # not open at all
            continue
