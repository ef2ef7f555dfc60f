"""How this program was started: alone, or by torchrun as one of several processes."""

from __future__ import annotations

import os
import signal
import stat
import sys

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a run to stop; not every system has the last one, of a closed terminal."""


class _Quit:
    """What Ctrl-C does while a command begins."""

    def __init__(self, prog: str) -> None:
        self._line = f"{prog}: interrupted\n"

    def __call__(self, number: int, frame: object) -> None:
        os.write(2, self._line.encode())
        os._exit(128 + number)


def begin(prog: str) -> None:
    """Let Ctrl-C end this process at once, with one line, until it `has_begun`.

    Libraries that are being imported make another error of KeyboardInterrupt, or nothing at all.
    """
    import threading

    is_first = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_first and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _Quit(prog))


def has_begun() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again; a second call does nothing."""
    if isinstance(signal.getsignal(signal.SIGINT), _Quit):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def place() -> tuple[int, int]:
    """Return which process of the run this is, from 0, and how many there are."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def started_by(program: str, python: str = "python") -> tuple[str, ...]:
    """Return the command that a Python program was started with, without its arguments."""
    _, count = place()
    if count == 1:
        return (python, program)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    nodes = () if local == count else ("--nnodes", str(count // local))
    return ("torchrun", *nodes, "--nproc-per-node", str(local), program)


def resume_command(folder: os.PathLike[str]) -> str:
    """Return what to type in a shell to go on with a run: the program that was started, quoted.

    A program that is neither `train.py` nor `avatarl` used the package: that has `avatarl`.
    """
    import shlex
    import shutil

    script = sys.argv[0]
    if os.path.basename(script) == "train.py":
        words = started_by(script, python=sys.orig_argv[0])
    else:
        found = shutil.which("avatarl")
        is_own = os.path.basename(script).partition(".")[0] == "avatarl"
        other = is_own and not (found and os.path.samefile(found, script))
        _, count = place()
        words = ("avatarl",) if count == 1 else started_by(found or "avatarl")
        words = (*words[:-1], script if other else words[-1], "train")
    return shlex.join([*words, "--resume", os.fspath(folder)])


def leave_closed_terminal() -> None:
    """Let stdout and stderr lead nowhere where they lead to a terminal that has been closed."""
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        except OSError:  # closed altogether
            continue


def own_device(name: str) -> str:
    """Return the device that this process is to take where `name` is asked for.

    Processes on one machine cannot share a GPU: each takes the one of its number.

    Raises:
        ValueError: if several processes are asked to take one and the same.
    """
    _, count = place()
    if count == 1 or name == "cpu":
        return name
    if ":" in name:
        raise ValueError(
            f"device must have no number where each process takes its own, got {name!r}"
        )
    return f"{name}:{os.environ.get('LOCAL_RANK', '0')}"
