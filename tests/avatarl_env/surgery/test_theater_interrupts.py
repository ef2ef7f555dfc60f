"""Tests of avatarl_env/surgery/theater.py: threads, tasks, signals and garbage collection."""

from __future__ import annotations

import asyncio
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
from torch import nn

from avatarl_env.surgery import SurgicalTheater, interrupts, parameters, snapshot, theater
from tests.avatarl_env.surgery.edits import Snapshot, in_place, new_data, run_in_thread, small

FILES = {module.__file__ for module in (theater, parameters, snapshot, interrupts)}
"""The theater's own code."""
LOOKING = ("RESUME", "CALL", "JUMP_BACKWARD")
"""Instructions at which Python looks for signals."""
COLLECTING = (*LOOKING, "BUILD", "LIST", "GET_ITER")
"""Instructions at which it may collect garbage: also those that allocate."""
ONE_AT_A_TIME = "one thread and one asyncio task at a time"


def instruction(frame: FrameType) -> str:
    """Return the name of the instruction that comes next."""
    return dis.opname[frame.f_code.co_code[max(0, frame.f_lasti)]]


# --- threads and tasks ---------------------------------------------------------------------------


def wrapped(model: nn.Sequential) -> nn.Module:
    return nn.ModuleDict({"module": model})


def part(model: nn.Sequential) -> nn.Module:
    return model[1]


def with_a_parameter_of(model: nn.Sequential) -> nn.Module:
    other = nn.Linear(3, 3)
    other.weight = model[0].weight
    return other


def with_the_memory_of(model: nn.Sequential) -> nn.Module:
    other = small()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize(
    "related",
    [wrapped, part, with_a_parameter_of, with_the_memory_of],
)
@pytest.mark.parametrize("first_is_whole", [True, False])
def test_a_second_thread_is_refused_until_the_first_has_left(
    related: Callable[[nn.Sequential], nn.Module], first_is_whole: bool
) -> None:
    model = small()
    other = related(model)
    before = Snapshot(model)
    first, second = (SurgicalTheater(m, [m]) for m in (model, other))
    if not first_is_whole:
        first, second = second, first
    with first:
        raised = run_in_thread(second.__enter__)
        assert isinstance(raised, RuntimeError)
        assert ONE_AT_A_TIME in str(raised)
        assert threading.current_thread().name in str(raised)
        assert first.is_open
        assert not second.is_open
        assert isinstance(run_in_thread(first.__enter__), RuntimeError)
    before.assert_same()

    def elsewhere() -> None:
        with second:
            pass

    assert run_in_thread(elsewhere) is None


def test_other_models_can_be_operated_on_other_threads() -> None:
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


def test_a_theater_may_be_left_on_another_thread() -> None:
    """As when a generator with an open theater is collected there."""
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    room.__enter__()
    new_data(model, room)
    assert run_in_thread(lambda: room.__exit__(None, None, None)) is None
    before.assert_same()
    with room:  # restores the SIGINT handler, which the other thread could not
        in_place(model, room)
    before.assert_same()


async def operate(model: nn.Module, entered: asyncio.Event, leave: asyncio.Event) -> None:
    with SurgicalTheater(model, [model]):
        entered.set()
        await leave.wait()
        model[0].weight.data.fill_(7.0)


def test_a_second_asyncio_task_is_refused_until_the_first_has_left() -> None:
    model = small()
    before = Snapshot(model)

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(operate(model, entered, leave), name="the first")
        await entered.wait()
        with pytest.raises(RuntimeError, match=f"{ONE_AT_A_TIME} .*the first"):
            await operate(model, entered, leave)
        leave.set()
        await first
        before.assert_same()
        await operate(model, entered, leave)

    with SurgicalTheater(model, [model]) as room:  # a task may nest in its thread's theater
        in_place(model, room)
        before, outermost = Snapshot(model), before
        asyncio.run(main())
        before.assert_same()
    outermost.assert_same()


@pytest.mark.slow
def test_another_theater_may_be_left_at_any_instruction() -> None:
    """As when the garbage collector finds a generator with an open theater in the same thread."""
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
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert at > 100


# --- Ctrl-C --------------------------------------------------------------------------------------


class Striker:
    """Raise SIGINT at one instruction of the theater's code, counted from the start.

    Python looks for signals when a function begins, when it calls one and when a loop goes round.
    Only these instructions count.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.where = ""
        """Which of the theater's methods was running."""

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "call" or (event == "opcode" and instruction(frame).startswith(LOOKING)):
            self.count += 1
            if self.count == self.at and not self.where:
                caller: FrameType | None = frame
                while caller is not None and caller.f_code.co_filename in FILES:
                    self.where = caller.f_code.co_name
                    caller = caller.f_back
                signal.raise_signal(signal.SIGINT)
        return self.trace

    def run(self, program: Callable[[], None]) -> bool:
        """Run the program; return whether it raised a KeyboardInterrupt."""
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
    program: Callable[[], None], step: int, rooms: list[SurgicalTheater], *, handled: bool = False
) -> Iterator[Striker]:
    """Run the program with a SIGINT at every `step`-th instruction; yield after every run.

    Args:
        program: the function to run.
        step: instructions between two signals.
        rooms: its theaters, which must be closed afterwards.
        handled: whether the handler returns, so that nothing is raised.
    """
    handler, at = signal.getsignal(signal.SIGINT), 1
    while True:
        striker = Striker(at)
        struck = striker.run(program)
        assert not any(room.is_open for room in rooms), at
        assert signal.getsignal(signal.SIGINT) is handler, at
        if striker.count < at:
            assert not struck
            return
        assert struck != handled, at
        yield striker
        at += step


STEPS = [11, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", STEPS)
def test_ctrl_c_at_any_instruction_leaves_whole_weights(step: int) -> None:
    """And is raised when the interrupted method of the theater ends."""
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
    for strike in strikes(program, step, [room]):
        assert model.weight.item() in (found, 2.0)
        if model.weight.item() == found:
            pristine.assert_same()
        last = log[-1] if log else "before"
        seen.setdefault((strike.where, last), set()).add(model.weight.item())
    assert seen == {
        ("__enter__", "before"): {found},
        ("__enter__", "entered"): {found},  # the one that is refused
        ("commit", "refused"): {found},  # all or nothing
        ("__exit__", "committed"): {2.0},
    }


@pytest.mark.parametrize("step", STEPS)
def test_ctrl_c_in_nested_theaters_leaves_what_the_outer_one_committed(step: int) -> None:
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

    outcomes = [model.weight.item() for _ in strikes(program, step, [outer, inner])]
    assert set(outcomes) == {1.0, 3.0}
    assert outcomes == sorted(outcomes)  # old up to the outer commit, new from then on


@pytest.mark.parametrize("step", STEPS)
def test_after_a_handler_that_does_not_raise_the_theater_stays_open(step: int) -> None:
    """As in a loop that records Ctrl-C to stop after the present step."""
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
        for strike in strikes(program, step, [room], handled=True):
            before.assert_same()
            first, second = "entered", signal.SIGINT
            if strike.where == "__enter__":
                first, second = second, first
            assert log == [first, second]
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_without_a_python_handler_are_left_alone(handler: signal.Handlers) -> None:
    model = small()
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with SurgicalTheater(model, [model]):
            assert signal.getsignal(signal.SIGUSR1) is handler
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_handler_that_the_body_installs_stays() -> None:
    """Also if it calls the handler that it replaced."""
    model, calls = small(), []
    room = SurgicalTheater(model, [model])
    previous = signal.getsignal(signal.SIGUSR1)

    def outer(signum: int, frame: object) -> None:
        calls.append("outer")

    def inner(signum: int, frame: object) -> None:
        calls.append("inner")
        replaced(signum, frame)  # type: ignore[operator]

    signal.signal(signal.SIGUSR1, outer)
    try:
        with room:
            replaced = signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, inner)
        assert signal.getsignal(signal.SIGUSR1) is inner
        signal.raise_signal(signal.SIGUSR1)
        with room:
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert calls == ["inner", "outer"] * 2


def test_signals_during_exit_wait_until_the_weights_are_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The alarm of a timeout as well as Ctrl-C, also if the first handler raises."""
    model, copy_, sent = small(), torch.Tensor.copy_, []
    before, room = Snapshot(model), SurgicalTheater(model, [model])

    def timeout(signum: int, frame: object) -> None:
        raise TimeoutError

    def interrupted_copy(*args: Any, **kwargs: Any) -> Any:
        if not sent:
            for number in (signal.SIGALRM, signal.SIGINT):
                sent.append(number)
                signal.raise_signal(number)
        return copy_(*args, **kwargs)

    def program() -> None:
        with room:
            new_data(model, room)
            monkeypatch.setattr(torch.Tensor, "copy_", interrupted_copy)

    previous = signal.signal(signal.SIGALRM, timeout)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            program()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert len(sent) == 2
    assert isinstance(caught.value.__context__, TimeoutError)
    before.assert_same()


def test_ctrl_c_in_the_body_raises_at_once() -> None:
    model = small()
    before, reached = Snapshot(model), []

    def operate_() -> None:
        with SurgicalTheater(model, [model]) as room:
            in_place(model, room)
            signal.raise_signal(signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        operate_()
    assert reached == []
    before.assert_same()


# --- timeouts ------------------------------------------------------------------------------------


def timeouts(n_programs: int, seed: int) -> int:
    """Run hostile programs in another process; return how many timeouts broke one off.

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


@pytest.mark.slow
def test_a_timeout_at_any_moment_leaves_whole_weights() -> None:
    assert timeouts(1_000, seed=0) > 100


@pytest.mark.exhaustive
def test_many_more_timeouts_leave_whole_weights() -> None:
    assert timeouts(40_000, seed=1) > 4_000  # how many depends on the machine
