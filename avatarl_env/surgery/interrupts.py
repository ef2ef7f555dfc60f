"""Defer signals while chosen functions run, from their first instruction to their last.

Python runs a signal handler between any two instructions of the main thread, and an exception of
the handler (KeyboardInterrupt, a timeout) is raised there. A function that swaps handlers itself
leaves a gap: a signal on its first instruction still raises. So handlers are swapped once, by
`InterruptGuard.install`, and the new one looks at the interrupted stack. Inside a guarded function
it only records the signal; elsewhere it calls the handler that it replaced.
"""

from __future__ import annotations

import signal
import threading

# signal.getsignal() and signal.signal() call these and convert to enums; in Python 3.11 that takes
# half as long as saving the weights of a small model.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Handler = Callable[[int, FrameType | None], Any]

_SIGNALS = tuple(int(number) for number in signal.valid_signals())


class InterruptGuard:
    """Defers signals while a guarded function is on the stack.

    `install` takes over every signal whose handler is a Python function at that time. Signals that
    are ignored or end the process raise nothing and are left alone. A handler that is set later is
    not deferred.
    """

    def __init__(self) -> None:
        self._guarded: set[CodeType] = set()
        self._relays: dict[int, _Relay] = {}
        self._pending: list[tuple[int, Handler, FrameType | None]] = []
        self._n_installed = 0

    def guard(self, function: F) -> F:
        """Decorate a function in which signals are deferred."""
        self._guarded.add(function.__code__)
        return function

    def install(self) -> bool:
        """Take over the signals and return whether `remove` has to be called later.

        Only the main thread runs handlers; on other threads this does nothing.
        """
        if not _on_main_thread():
            return False
        if self._n_installed == 0:
            self._pending.clear()
            for number in _SIGNALS:
                present = getsignal(number)
                if isinstance(present, _Relay):  # left behind by a removal on another thread
                    present = present.replaced
                if callable(present):
                    self._relays[number] = _Relay(self, present)
                    set_handler(number, self._relays[number])
        self._n_installed += 1
        return True

    def remove(self) -> None:
        """Restore the handlers, once it was called as often as `install`.

        On other threads than the main one Python does not allow that: the relays stay there and
        pass every signal on.
        """
        self._n_installed -= 1
        if self._n_installed == 0:
            relays, self._relays = self._relays, {}
            if _on_main_thread():
                for number, relay in relays.items():
                    if getsignal(number) is relay:
                        set_handler(number, relay.replaced)

    def deliver(self) -> None:
        """Call the handlers of the deferred signals, all of them even if one raises."""
        while self._pending and _on_main_thread():
            number, handler, frame = self._pending.pop(0)
            try:
                handler(number, frame)
            finally:
                self.deliver()

    def defer(self, number: int, handler: Handler, frame: FrameType | None) -> bool:
        """Record a signal if `frame` is inside a guarded function; return whether it is."""
        caller = frame
        while caller is not None:
            if caller.f_code in self._guarded:
                if (number, handler) not in [pending[:2] for pending in self._pending]:
                    self._pending.append((number, handler, frame))
                return True
            caller = caller.f_back
        return False


class _Relay:
    """Handler of one signal that defers it or passes it to the handler it replaced."""

    def __init__(self, guard: InterruptGuard, replaced: Handler) -> None:
        self.guard = guard
        self.replaced = replaced

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.guard.defer(signum, self.replaced, frame):
            self.replaced(signum, frame)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def require_stack(depth: int) -> None:
    """Raise a RecursionError unless this many more calls fit on the stack."""
    if depth:
        require_stack(depth - 1)
