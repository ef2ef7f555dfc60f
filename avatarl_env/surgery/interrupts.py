"""Hold Ctrl-C back while chosen functions run, without a gap at their first and last instruction.

Swapping SIGINT's handler inside a function leaves a gap: a signal that arrives on the function's
first instruction still raises there. So the handler stays in place for the whole time between
:meth:`InterruptGuard.install` and :meth:`InterruptGuard.remove`, and looks at the interrupted
stack: inside a guarded function it only takes a note, elsewhere it calls the handler it replaced.
"""

from __future__ import annotations

import signal
import threading

# The functions behind signal.getsignal() and signal.signal(), less their conversions to enums:
# with Python 3.11 these cost half as much again as saving the weights of a small model.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class InterruptGuard:
    """SIGINT handler that is deferred while a guarded function is on the stack."""

    def __init__(self) -> None:
        """Start with nothing guarded and nothing installed."""
        self._guarded: set[CodeType] = set()
        self._previous: Any = None
        self._depth = 0
        self._pending = False

    def guard(self, function: F) -> F:
        """Decorate a function in which SIGINT must wait."""
        self._guarded.add(function.__code__)
        return function

    @property
    def pending(self) -> bool:
        """Whether a SIGINT waits to be delivered."""
        return self._pending

    def install(self) -> bool:
        """Take SIGINT over; return whether :meth:`remove` is owed.

        Only Python's main thread receives signals, so elsewhere this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._depth == 0:
            present = getsignal(signal.SIGINT)
            if present is None:  # a handler that Python did not install, nor could restore
                return False
            if present != self._handle:
                self._previous = present
            self._pending = False
            set_handler(signal.SIGINT, self._handle)
        self._depth += 1
        return True

    def remove(self) -> None:
        """Give SIGINT back once every :meth:`install` has been answered.

        Off the main thread, where Python refuses that, the handler stays and passes all on.
        """
        self._depth -= 1
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and self._depth == 0 and getsignal(signal.SIGINT) == self._handle:
            set_handler(signal.SIGINT, self._previous)

    def deliver(self) -> None:
        """Pass a waiting SIGINT on to the handler that was there before."""
        while self._pending and threading.current_thread() is threading.main_thread():
            self._pending = False
            self._pass_on(signal.SIGINT, None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        caller = frame
        while caller is not None:
            if caller.f_code in self._guarded:
                self._pending = True
                return
            caller = caller.f_back
        self._pass_on(signum, frame)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(signum, frame)
        elif self._previous == signal.SIG_DFL:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
