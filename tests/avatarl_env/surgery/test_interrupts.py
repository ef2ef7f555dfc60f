"""Tests of avatarl_env/surgery/interrupts.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from avatarl_env.surgery import interrupts
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
    """Notes what ran; ``held`` is guarded."""

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
    assert calls == [(signal.SIGINT, False)]
    patient.deeper()
    assert calls == [(signal.SIGINT, False), (signal.SIGINT, True)]
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


def test_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    patient = Patient()
    patient.guard.install()
    patient.held()
    patient.deeper()
    patient.guard.remove()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("where", ["held()", "deeper()"])
def test_default_action_still_ends_the_process(where: str) -> None:
    code = f"""
import importlib.util, signal
spec = importlib.util.spec_from_file_location("interrupts", {interrupts.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
guard = module.InterruptGuard()

def deeper():
    signal.raise_signal(signal.SIGINT)
    print("lived on", flush=True)

@guard.guard
def held():
    deeper()
    guard.deliver()

signal.signal(signal.SIGINT, signal.SIG_DFL)
guard.install()
{where}
print("not reached")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stdout == ("lived on\n" if where == "held()" else "")


def test_last_removal_gives_the_handler_back() -> None:
    guard = InterruptGuard()
    guard.install()
    guard.install()
    guard.remove()
    assert signal.getsignal(signal.SIGINT) == guard._handle
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


def test_off_the_main_thread_nothing_is_installed() -> None:
    guard = InterruptGuard()
    assert in_thread(guard.install) is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_python_did_not_install_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = InterruptGuard()
    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "getsignal", lambda _: None)
        assert guard.install() is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
