"""Tests of avatarl_env/surgery/interrupts.py."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from avatarl_env.surgery.interrupts import InterruptGuard, require_stack


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[Any]:
    """Begin with Python's own handler and restore the present one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def in_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    return results[0]


class Work:
    """Logs what ran; `held` is guarded."""

    guard = InterruptGuard()

    def __init__(self) -> None:
        self.log: list[str] = []

    @guard.guard
    def held(self, *, deliver: bool = True) -> None:
        try:
            self.deeper()
            self.log.append("end of held")
        finally:
            if deliver:
                self.guard.deliver()

    def deeper(self) -> None:
        interrupt()
        self.log.append("after the signal")


def test_a_signal_waits_in_a_guarded_function_only() -> None:
    work = Work()
    with pytest.raises(KeyboardInterrupt):  # nothing is installed
        work.held()
    assert work.log == []
    assert work.guard.install()
    with pytest.raises(KeyboardInterrupt):
        work.held()
    assert work.log == ["after the signal", "end of held"]
    with pytest.raises(KeyboardInterrupt):
        work.deeper()
    assert work.log == ["after the signal", "end of held"]
    work.guard.remove()


@pytest.mark.parametrize("removed_before", [False, True])
def test_a_signal_is_delivered_once_and_in_the_main_thread(removed_before: bool) -> None:
    work = Work()
    work.guard.install()
    work.held(deliver=False)
    if removed_before:
        work.guard.remove()
    in_thread(work.guard.deliver)
    with pytest.raises(KeyboardInterrupt):
        work.guard.deliver()
    work.guard.deliver()
    if not removed_before:
        work.guard.remove()


def test_a_handler_that_was_set_meanwhile_stays_and_is_called_once() -> None:
    """Also if it calls the handler that it replaced, the guard's own."""
    work, calls = Work(), []
    guard = work.guard
    guard.install()
    replaced = signal.getsignal(signal.SIGINT)

    def mine(signum: int, frame: object) -> None:
        calls.append(signum)
        replaced(signum, frame)  # type: ignore[operator]

    signal.signal(signal.SIGINT, mine)
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is mine
    guard.install()
    for interrupted in (interrupt, work.held):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    guard.remove()
    assert calls == [signal.SIGINT] * 2


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_without_a_python_handler_are_left_alone(action: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, action)
    guard = InterruptGuard()
    guard.install()
    assert signal.getsignal(signal.SIGINT) is action
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is action


def test_every_signal_with_a_python_handler_waits_and_all_are_delivered() -> None:
    """The alarm of a timeout as well as Ctrl-C, also if the first handler raises."""
    guard = Work.guard
    calls: list[int] = []

    def alarm(signum: int, frame: object) -> None:
        calls.append(signum)
        raise TimeoutError

    @guard.guard
    def held() -> None:
        for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGALRM, signal.SIGINT):
            signal.raise_signal(number)
        assert calls == []
        guard.deliver()

    before = [signal.signal(number, alarm) for number in (signal.SIGALRM, signal.SIGUSR1)]
    try:
        guard.install()
        with pytest.raises(KeyboardInterrupt) as caught:
            held()
        guard.remove()
        assert signal.getsignal(signal.SIGALRM) is alarm
    finally:
        for number, handler in zip((signal.SIGALRM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)
    assert isinstance(caught.value.__context__, TimeoutError)
    assert calls == [signal.SIGALRM, signal.SIGUSR1]  # one of each kind, as the system keeps them
    guard.deliver()


def test_off_the_main_thread_nothing_is_installed_and_a_removal_leaves_a_relay() -> None:
    guard = InterruptGuard()
    assert in_thread(guard.install) is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    guard.install()
    in_thread(guard.remove)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    guard.install()  # finds the true handler behind it
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stack_without_room_is_refused() -> None:
    require_stack(20)
    with pytest.raises(RecursionError):
        require_stack(1_000_000)
