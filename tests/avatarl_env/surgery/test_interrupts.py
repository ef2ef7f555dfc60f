"""Tests of avatarl_env/surgery/interrupts.py."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from avatarl_env.surgery.interrupts import InterruptGuard


@pytest.fixture(autouse=True)
def handler_at_rest() -> Iterator[Any]:
    """Begin with Python's own handler, and check that the test gave it back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def strike() -> None:
    signal.raise_signal(signal.SIGINT)


def in_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(10)
    return results[0]


class Patient:
    """Notes what ran; `held` is guarded."""

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


def test_strike_in_a_guarded_function_waits_for_its_end() -> None:
    patient = Patient()
    assert patient.guard.install()
    with pytest.raises(KeyboardInterrupt):
        patient.held()
    assert patient.log == ["after the strike", "end of held"]
    assert not patient.guard.pending
    patient.guard.remove()


def test_strike_elsewhere_raises_at_once() -> None:
    patient = Patient()
    patient.guard.install()
    with pytest.raises(KeyboardInterrupt):
        patient.deeper()
    assert patient.log == []
    patient.guard.remove()


def test_without_install_nothing_is_held_back() -> None:
    patient = Patient()
    with pytest.raises(KeyboardInterrupt):
        patient.held()
    assert patient.log == []


def test_pending_until_delivered_and_delivered_once() -> None:
    patient = Patient()
    patient.guard.install()
    patient.held(deliver=False)
    assert patient.guard.pending
    with pytest.raises(KeyboardInterrupt):
        patient.guard.deliver()
    assert not patient.guard.pending
    patient.guard.deliver()
    patient.guard.remove()


def test_strike_that_waited_is_delivered_after_removal_too() -> None:
    patient = Patient()
    patient.guard.install()
    patient.held(deliver=False)
    patient.guard.remove()
    with pytest.raises(KeyboardInterrupt):
        patient.guard.deliver()


def test_a_handler_of_the_caller_gets_both_kinds_of_strike() -> None:
    calls: list[tuple[int, bool]] = []

    def mine(signum: int, frame: object) -> None:
        calls.append((signum, frame is not None))

    signal.signal(signal.SIGINT, mine)
    patient = Patient()
    patient.guard.install()
    patient.held()
    assert calls == [(signal.SIGINT, True)]
    patient.deeper()
    assert calls == [(signal.SIGINT, True)] * 2
    patient.guard.remove()
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_strike_that_arrives_during_delivery_is_delivered_too() -> None:
    calls: list[int] = []

    def mine(signum: int, frame: object) -> None:
        calls.append(signum)
        if len(calls) < 3:
            strike()

    signal.signal(signal.SIGINT, mine)
    patient = Patient()
    patient.guard.install()
    patient.held()
    assert len(calls) == 3
    assert not patient.guard.pending
    patient.guard.remove()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_last_removal_gives_the_handler_back() -> None:
    guard = InterruptGuard()
    guard.install()
    guard.install()
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_installed_meanwhile_is_left_in_place() -> None:
    def mine(signum: int, frame: object) -> None: ...

    guard = InterruptGuard()
    guard.install()
    signal.signal(signal.SIGINT, mine)
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is mine
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_handler_that_was_installed_meanwhile_and_passes_on_is_called_once() -> None:
    """One that stays, and calls what it replaced: the guard's own handler of that time."""
    patient, calls = Patient(), []
    guard = patient.guard
    guard.install()
    replaced = signal.getsignal(signal.SIGINT)

    def mine(signum: int, frame: object) -> None:
        calls.append(signum)
        replaced(signum, frame)  # type: ignore[operator]

    signal.signal(signal.SIGINT, mine)
    guard.remove()
    guard.install()
    with pytest.raises(KeyboardInterrupt):
        strike()
    with pytest.raises(KeyboardInterrupt):
        patient.held()
    guard.remove()
    assert calls == [signal.SIGINT] * 2
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


def test_off_the_main_thread_nothing_is_installed() -> None:
    guard = InterruptGuard()
    assert in_thread(guard.install) is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_that_raise_nothing_are_left_alone(action: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, action)
    guard = InterruptGuard()
    guard.install()
    assert signal.getsignal(signal.SIGINT) is action
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is action
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_every_signal_with_a_python_handler_waits_and_all_are_delivered() -> None:
    """A timeout's alarm as well as Ctrl-C, also if the first of them raises."""
    guard = Patient.guard
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
    assert not guard.pending


def test_removal_off_the_main_thread_leaves_a_handler_that_passes_all_on() -> None:
    guard = InterruptGuard()
    guard.install()
    in_thread(guard.remove)
    with pytest.raises(KeyboardInterrupt):
        strike()
    # and the next pair finds the true handler behind it
    guard.install()
    with pytest.raises(KeyboardInterrupt):
        strike()
    guard.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_cannot_take_delivery() -> None:
    patient = Patient()
    patient.guard.install()
    patient.held(deliver=False)
    in_thread(patient.guard.deliver)
    assert patient.guard.pending
    with pytest.raises(KeyboardInterrupt):
        patient.guard.deliver()
    patient.guard.remove()


def test_a_strike_long_past_is_forgotten() -> None:
    guard = Patient.guard
    guard.install()
    Patient().held(deliver=False)
    guard.remove()
    guard.install()
    assert not guard.pending
    guard.remove()
