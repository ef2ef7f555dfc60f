"""Tests of avatarl_env/surgery/theater.py: threads and Ctrl-C."""

from __future__ import annotations

import dis
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatarl_env.surgery import SurgicalTheater, interrupts, sites, snapshot, theater
from tests.avatarl_env.surgery.edits import (
    Snapshot,
    in_place,
    new_data,
    run_in_thread,
    small,
    write,
)
from tests.fakes import fingerprint

FILES = {module.__file__ for module in (theater, sites, snapshot, interrupts)}
"""The theater's own code."""
LOOKING = ("RESUME", "CALL", "JUMP_BACKWARD")
"""Instructions at which Python looks for signals."""
COLLECTING = (*LOOKING, "BUILD", "LIST", "GET_ITER")
"""Instructions at which it may collect garbage: also where something is made."""


def instruction(frame: FrameType) -> str:
    """Return the name of the instruction that comes next."""
    return dis.opname[frame.f_code.co_code[max(0, frame.f_lasti)]]


# --- threads -------------------------------------------------------------------------------------


def test_a_second_thread_is_refused_until_the_first_has_left() -> None:
    model = small()
    before = Snapshot(model)
    first = SurgicalTheater(model, [model[0]])

    def elsewhere() -> None:
        with SurgicalTheater(model, [model[1]]) as room:  # the other layer
            room.write(model[1].weight, torch.zeros(2, 3))

    with first:
        in_place(model, first)
        edited = fingerprint(model)
        raised = run_in_thread(elsewhere)
        assert isinstance(raised, RuntimeError)
        assert str(raised) == (
            "one thread and one asyncio task at a time may operate on a model, "
            f"thread {threading.get_ident()} has a theater open on this one"
        )
        assert first.is_open
        assert fingerprint(model) == edited
    before.assert_same()
    assert run_in_thread(elsewhere) is None
    before.assert_same()


def test_the_main_thread_is_refused_while_another_operates() -> None:
    model = small()
    before = Snapshot(model)
    entered, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with SurgicalTheater(model, [model]) as room:
            in_place(model, room)
            entered.set()
            done.wait(10)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        assert entered.wait(10)
        room = SurgicalTheater(model, [model])
        with pytest.raises(RuntimeError, match="one thread and one asyncio task at a time"):
            room.__enter__()
        assert not room.is_open
        with SurgicalTheater(other := small(), [other]) as unrelated:
            in_place(other, unrelated)
    finally:
        done.set()
        thread.join(10)
    before.assert_same()
    with room:
        in_place(model, room)
    before.assert_same()


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does, as a module of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("first_on", ["wrapper", "inner"])
def test_a_wrapper_and_the_model_inside_are_one_to_a_second_thread(first_on: str) -> None:
    model = small()
    wrapper = Wrapper(model)
    first, second = (wrapper, model) if first_on == "wrapper" else (model, wrapper)
    before = Snapshot(model)
    elsewhere = SurgicalTheater(second, [model[1]])
    with SurgicalTheater(first, [model[0]]) as room:
        in_place(model, room)
        raised = run_in_thread(elsewhere.__enter__)
        assert isinstance(raised, RuntimeError)
        assert "one thread and one asyncio task at a time" in str(raised)
    assert not elsewhere.is_open
    before.assert_same()


def test_models_that_share_no_more_than_a_layer_are_one_to_a_second_thread() -> None:
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    one, two = nn.Sequential(layer, nn.Linear(3, 2)), nn.Sequential(nn.Linear(2, 3), layer)
    with SurgicalTheater(one, [one[1]]):  # not even a target of either
        raised = run_in_thread(SurgicalTheater(two, [two[0]]).__enter__)
        assert isinstance(raised, RuntimeError)
        assert "one thread and one asyncio task at a time" in str(raised)
        assert isinstance(run_in_thread(SurgicalTheater(layer, [layer]).__enter__), RuntimeError)

        def unrelated() -> None:
            with SurgicalTheater(nn.Sequential(nn.ReLU(), other), [other]):
                pass

        assert run_in_thread(unrelated) is None


def test_the_theater_itself_is_refused_to_a_second_thread() -> None:
    model = small()
    room = SurgicalTheater(model, [model])
    with room:
        in_place(model, room)
        raised = run_in_thread(room.__enter__)
        assert isinstance(raised, RuntimeError)
        assert room.is_open
        write(model, room)


def test_a_theater_may_be_left_on_another_thread() -> None:
    """As when a generator with a theater inside is collected there."""
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    room.__enter__()
    new_data(model, room)
    assert run_in_thread(lambda: room.__exit__(None, None, None)) is None
    before.assert_same()
    with room:  # gives SIGINT back, which the other thread could not
        in_place(model, room)
    before.assert_same()


def test_two_models_can_be_operated_on_two_threads() -> None:
    def work() -> None:
        model = small()
        before = Snapshot(model)
        for _ in range(30):
            with SurgicalTheater(model, [model]) as room:
                new_data(model, room)
        before.assert_same()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_another_theater_may_be_left_at_any_instruction() -> None:
    """As when the garbage collector finds a generator with a theater inside, in the same thread."""
    model, other = small(), small()
    before, before_other = Snapshot(model), Snapshot(other)
    room, another = SurgicalTheater(model, [model]), SurgicalTheater(other, [other])
    at = count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "call" or (event == "opcode" and instruction(frame).startswith(COLLECTING)):
            count += 1
            if count == at:
                another.__exit__(None, None, None)
        return trace

    while count >= at:
        at, count = at + 1, 0
        another.__enter__()
        new_data(other, another)
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            with room:
                new_data(model, room)
        finally:
            sys.settrace(previous)
        before.assert_same()
        another.__exit__(None, None, None)
        before_other.assert_same()
        assert theater._open_theaters == []
        assert theater._interrupts._depth == 0
    assert at > 100


# --- Ctrl-C --------------------------------------------------------------------------------------


class Striker:
    """Raise SIGINT at one instruction of the theater's own code, counted from the start.

    Python looks for signals when a function begins, when it calls one and when a loop goes round:
    `looks` says whether that is such an instruction. At the others no signal can be seen, so
    there it is enough that the weights come back.
    """

    def __init__(self, at: int, *, everywhere: bool) -> None:
        self.at = at
        self.everywhere = everywhere
        self.count = 0
        self.looks = False
        self.where = ""
        """Which of the theater's methods was running."""

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event in ("call", "opcode"):
            looks = event == "call" or instruction(frame).startswith(LOOKING)
            self.count += looks or self.everywhere
            if self.count == self.at and not self.where:
                self.looks = looks
                caller: FrameType | None = frame
                while caller is not None and caller.f_code.co_filename in FILES:
                    self.where = caller.f_code.co_name
                    caller = caller.f_back
                signal.raise_signal(signal.SIGINT)
        return self.trace

    def run(self, program: Callable[[], None]) -> bool:
        """Run the program; return whether the strike came through as a KeyboardInterrupt."""
        previous = sys.gettrace()
        sys.settrace(self.trace)
        try:
            program()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(previous)
        return False


def strikes(
    program: Callable[[], None], *, everywhere: bool = True, handled: bool = False
) -> Iterator[Striker]:
    """Run the program once for each of its instructions, struck there; yield after every run.

    Args:
        program: what to run.
        everywhere: strike at all instructions, or only where Python looks for signals.
        handled: whether the handler returns, so that nothing is raised.
    """
    at = 0
    while True:
        at += 1
        striker = Striker(at, everywhere=everywhere)
        struck = striker.run(program)
        assert theater._open_theaters == [], at
        assert theater._interrupts._depth == 0, at
        assert not theater._interrupts.pending, at
        if striker.count < at:
            assert not struck
            return
        assert struck != handled, at
        yield striker


@pytest.fixture
def python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handler")
def test_ctrl_c_at_any_instruction_leaves_whole_weights_and_is_delivered_right_after() -> None:
    model = nn.Linear(1, 1)
    room = SurgicalTheater(model, [model.weight])
    found = 0.5
    model.weight.data.fill_(found)
    pristine = Snapshot(model)
    log: list[str] = []

    def program() -> None:
        model.weight.data.fill_(found)
        log.clear()
        with room:
            log.append("entered")
            model.weight.data.fill_(1.0)
            with pytest.raises(RuntimeError, match="open already"):
                room.__enter__()
            log.append("refused")
            model.weight.data = torch.full((1, 1), 2.0)
            room.commit()
            log.append("committed")
            model.weight.data.fill_(3.0)
        log.append("left")

    seen: dict[tuple[str, str], set[float]] = {}
    for strike in strikes(program):
        assert model.weight.item() in (found, 2.0)
        if model.weight.item() == found:
            pristine.assert_same()
        if strike.looks:
            last = log[-1] if log else "before"
            seen.setdefault((strike.where, last), set()).add(model.weight.item())
    assert seen == {
        ("__enter__", "before"): {found},
        ("__enter__", "entered"): {found},  # the one that is refused
        ("commit", "refused"): {2.0},  # held back from its first instruction on
        ("__exit__", "committed"): {2.0},
    }


@pytest.mark.usefixtures("python_handler")
def test_ctrl_c_at_any_instruction_of_nested_theaters_leaves_what_the_outer_one_kept() -> None:
    model = nn.Linear(1, 1, bias=False)
    outer, inner = (SurgicalTheater(model, [model.weight]) for _ in range(2))

    def program() -> None:
        model.weight.data.fill_(1.0)
        with outer:
            with inner:
                model.weight.data = torch.full((1, 1), 3.0)
                inner.commit()
                model.weight.data.fill_(4.0)
            outer.commit()
            model.weight.data.fill_(5.0)

    outcomes = []
    for _ in strikes(program, everywhere=False):
        outcomes.append(model.weight.item())
    assert set(outcomes) == {1.0, 3.0}
    assert outcomes == sorted(outcomes)  # old up to the outer commit, new from then on


def test_a_handler_that_does_not_raise_never_costs_the_body_its_theater() -> None:
    """As with a loop that takes a note of Ctrl-C, to stop after this step."""
    model = nn.Linear(1, 1)
    before = Snapshot(model)
    room = SurgicalTheater(model, [model.weight])
    log: list[object] = []

    def program() -> None:
        log.clear()
        with room:
            log.append("entered")
            room.write(model.weight, torch.zeros(1, 1))

    previous = signal.signal(signal.SIGINT, lambda signum, frame: log.append(signum))
    try:
        for strike in strikes(program, handled=True):
            before.assert_same()
            if strike.where != "__enter__":
                assert log == ["entered", signal.SIGINT]
            elif strike.looks:
                assert log == [signal.SIGINT, "entered"]
            else:
                assert set(log) == {signal.SIGINT, "entered"}
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("python_handler")
def test_ctrl_c_in_the_body_raises_at_once() -> None:
    model = small()
    before, reached = Snapshot(model), []

    def operate() -> None:
        with SurgicalTheater(model, [model]) as room:
            in_place(model, room)
            signal.raise_signal(signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        operate()
    assert reached == []
    before.assert_same()


@pytest.mark.usefixtures("python_handler")
def test_ctrl_c_while_restoring_fails_reports_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(tensor: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        raise OSError("the device is gone")

    model = small()
    room = SurgicalTheater(model, [model])
    room.__enter__()
    monkeypatch.setattr(snapshot, "_dense", failing)
    with pytest.raises(KeyboardInterrupt) as caught:
        room.__exit__(None, None, None)
    assert isinstance(caught.value.__context__, ExceptionGroup)
    assert len(caught.value.__context__.exceptions) == 4


def test_threads_other_than_the_main_one_leave_sigint_alone() -> None:
    model = small()
    handlers: list[Any] = []

    def work() -> None:
        with SurgicalTheater(model, [model]):
            handlers.append(signal.getsignal(signal.SIGINT))

    handler = signal.getsignal(signal.SIGINT)
    assert run_in_thread(work) is None
    assert handlers == [handler]


# --- timeouts ------------------------------------------------------------------------------------


def timeouts(n_programs: int, seed: int) -> int:
    """Run hostile programs in a process of their own; return how many timeouts broke one off.

    A timeout that comes while torch leaves `no_grad()` leaves gradients off, in all that follows.
    """
    words = ["-W", "ignore", "-m", "tests.avatarl_env.surgery.timeouts", str(n_programs), str(seed)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_timeout_at_any_moment_leaves_whole_weights() -> None:
    assert timeouts(1_000, seed=0) > 100


@pytest.mark.exhaustive
def test_many_more_timeouts_leave_whole_weights() -> None:
    assert timeouts(40_000, seed=1) > 4_000  # how many depends on the machine
