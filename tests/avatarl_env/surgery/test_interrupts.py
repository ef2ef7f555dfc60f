"""Tests of avatarl_env/surgery/interrupts.py."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from avatarl_env.surgery.interrupts import InterruptGuard, require_stack


@pytest.fixture(autouse=True)
def handler_at_rest() -> Iterator[Any]:
    """Begin with Python's own handler, and put back what was there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def strike() -> None:
    signal.raise_signal(signal.SIGINT)


def in_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    return results[0]


class Work:
    """Records what ran; `held` is guarded."""

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
        strike()
        self.log.append("after the strike")


def test_a_strike_waits_in_a_guarded_function_alone() -> None:
    work = Work()
    with pytest.raises(KeyboardInterrupt):  # nothing is installed
        work.held()
    assert work.log == []
    assert work.guard.install()
    with pytest.raises(KeyboardInterrupt):
        work.held()
    assert work.log == ["after the strike", "end of held"]
    with pytest.raises(KeyboardInterrupt):
        work.deeper()
    assert work.log == ["after the strike", "end of held"]
    work.guard.remove()


@pytest.mark.parametrize("removed_before", [False, True])
def test_a_strike_is_delivered_once_and_in_the_main_thread(removed_before: bool) -> None:
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


def test_an_old_strike_that_nobody_delivered_is_forgotten() -> None:
    guard = Work.guard
    guard.install()
    Work().held(deliver=False)
    guard.remove()
    guard.install()
    guard.deliver()
    guard.remove()


def test_a_handler_of_the_caller_gets_every_strike() -> None:
    """In guarded functions, elsewhere, and those that arrive during delivery."""
    calls: list[int] = []

    def mine(signum: int, frame: object) -> None:
        assert frame is not None
        calls.append(signum)
        if len(calls) < 3:
            strike()

    signal.signal(signal.SIGINT, mine)
    work = Work()
    work.guard.install()
    work.held()
    assert calls == [signal.SIGINT] * 3
    work.deeper()
    assert len(calls) == 4
    work.guard.remove()
    assert signal.getsignal(signal.SIGINT) is mine


def test_the_last_removal_gives_the_handler_back() -> None:
    guard = InterruptGuard()
    guard.install()
    guard.install()
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_was_set_meanwhile_stays_and_is_called_once() -> None:
    """Also if it passes on to what it replaced: the guard's own handler of that time."""
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
    for struck in (strike, work.held):
        with pytest.raises(KeyboardInterrupt):
            struck()
    guard.remove()
    assert calls == [signal.SIGINT] * 2


def test_handlers_that_were_given_back_are_let_go() -> None:
    class Owner:
        def note(self, signum: int, frame: object) -> None: ...

    owner = Owner()
    signal.signal(signal.SIGINT, owner.note)
    guard = InterruptGuard()
    guard.install()
    guard.remove()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_that_raise_nothing_are_left_alone(action: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, action)
    guard = InterruptGuard()
    guard.install()
    assert signal.getsignal(signal.SIGINT) is action
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is action


def test_every_signal_with_a_python_handler_waits_and_all_are_delivered() -> None:
    """A timeout's alarm as well as Ctrl-C, also if the first of them raises."""
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
        strike()
    guard.install()  # finds the true handler behind it
    with pytest.raises(KeyboardInterrupt):
        strike()
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stack_without_room_is_refused() -> None:
    require_stack(20)
    with pytest.raises(RecursionError):
        require_stack(1_000_000)
