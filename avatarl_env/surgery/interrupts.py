"""Hold signals back while chosen functions run, without a gap at their first and last instruction.

Python runs a signal's handler between any two instructions of the main thread, and what the handler
raises (KeyboardInterrupt, a timeout) comes from there. Swapping handlers inside a function leaves a
gap: a signal that arrives on the function's first instruction still raises there. So the handler
stays in place for the whole time between `InterruptGuard.install` and
`InterruptGuard.remove`, and looks at the interrupted stack: inside a guarded function it only
takes a note, elsewhere it calls the handler it replaced.
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
Handler = Callable[[int, FrameType | None], Any]

_SIGNALS = tuple(int(number) for number in signal.valid_signals())


class InterruptGuard:
    """Signal handler that is deferred while a guarded function is on the stack.

    It takes over every signal whose handler is a Python function at the time of `install`.
    Signals that are ignored, or that end the process, raise nothing and are left alone. A handler
    that is installed later is not held back.
    """

    def __init__(self) -> None:
        """Start with nothing guarded and nothing installed."""
        self._guarded: set[CodeType] = set()
        self._installed: dict[int, _Relay] = {}
        self._pending: list[tuple[int, Handler, FrameType | None]] = []
        self._depth = 0

    def guard(self, function: F) -> F:
        """Decorate a function in which signals must wait."""
        self._guarded.add(function.__code__)
        return function

    @property
    def pending(self) -> bool:
        """Whether a signal waits to be delivered."""
        return bool(self._pending)

    def install(self) -> bool:
        """Take the signals over; return whether `remove` is owed.

        Only Python's main thread runs handlers, so elsewhere this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._depth == 0:
            self._pending.clear()
            for number in _SIGNALS:
                present = getsignal(number)
                if isinstance(present, _Relay):  # left behind by a removal on another thread
                    present = present.replaced
                if callable(present):
                    self._installed[number] = _Relay(self, present)
                    set_handler(number, self._installed[number])
        self._depth += 1
        return True

    def remove(self) -> None:
        """Give the signals back once every `install` has been answered.

        Off the main thread, where Python refuses that, the handler stays and passes all on.
        """
        self._depth -= 1
        if self._depth == 0:
            installed, self._installed = self._installed, {}
            if threading.current_thread() is threading.main_thread():
                for number, relay in installed.items():
                    if getsignal(number) is relay:
                        set_handler(number, relay.replaced)

    def deliver(self) -> None:
        """Pass waiting signals on to the handlers that were there before, also if one raises."""
        while self._pending and threading.current_thread() is threading.main_thread():
            number, handler, frame = self._pending.pop(0)
            try:
                handler(number, frame)
            finally:
                self.deliver()

    def hold(self, number: int, handler: Handler, frame: FrameType | None) -> bool:
        """Take note of a signal if `frame` is inside a guarded function; return whether it is."""
        caller = frame
        while caller is not None:
            if caller.f_code in self._guarded:
                if (number, handler) not in [pending[:2] for pending in self._pending]:
                    self._pending.append((number, handler, frame))
                return True
            caller = caller.f_back
        return False


class _Relay:
    """The handler of one signal: holds it back or passes it to the handler that it replaced."""

    def __init__(self, guard: InterruptGuard, replaced: Handler) -> None:
        self.guard = guard
        self.replaced = replaced

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.guard.hold(signum, self.replaced, frame):
            self.replaced(signum, frame)
