"""The command line: `avatarl COMMAND ...`; `python train.py ...` is `avatarl train ...`.

Nothing slow is imported here, so that Ctrl-C is handled from the start.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agents.cli import COMMANDS, Refusal
from agents.errors import STOPPING, printable

SIGNALLED = 128  # plus the signal's number is the exit code, as in a shell


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, as `train.py` does; return the exit code.

    For bad input, print one line that names argument, rule and value, and return 2.
    """
    return _run("train.py", "train", sys.argv[1:] if arguments is None else arguments)


def avatarl(arguments: Sequence[str] | None = None) -> int:
    """Run a command of `avatarl`; return the exit code, as `main` does."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        return _run(f"avatarl {words[0]}", words[0], words[1:])
    return _run("avatarl", "overview", words)


def _run(prog: str, name: str, words: Sequence[str]) -> int:
    """Print the result or the error of a command; return the exit code."""
    # Takes effect when torch loads OpenMP. Threads that wait in a busy loop make a step up to four
    # times slower on cores that other programs use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with _as_rank():
        try:
            with _quitting_at_once(prog):
                import importlib

                command = importlib.import_module(f"agents.cli.{name}")
            with _one_line_warnings(prog):
                text: str = command.main(words, prog)
            return _print(prog, text)
        except SystemExit as end:  # the help has been printed
            return _print(prog, "") or int(end.code or 0)
        except Refusal as error:
            return _complain(prog, f"error: {' '.join(str(error).split())}", error.code)
        except KeyboardInterrupt as stop:  # that of a run has the command that resumes it
            number = int(getattr(stop, "signum", signal.SIGINT))
            return _complain(prog, str(stop) or "interrupted", SIGNALLED + number)


@contextmanager
def _as_rank() -> Iterator[None]:
    """Under torchrun, let only rank 0 print and receive signals; it stops the others."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield
    elif os.environ["RANK"] == "0":
        yield
        # torchrun terminates all processes when one fails; keep this one's own exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        from contextlib import redirect_stderr, redirect_stdout
        from pathlib import Path

        # Until it has joined the others, which then tell it to stop, a signal ends it at once.
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as above


@contextmanager
def _quitting_at_once(prog: str) -> Iterator[None]:
    """Let Ctrl-C end the process with one line during imports.

    A KeyboardInterrupt during an import can be swallowed or become another error.
    """
    import threading

    def quit_at_once(number: int, frame: object) -> None:
        os.write(2, f"{prog}: interrupted\n".encode())
        os._exit(SIGNALLED + number)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, quit_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _one_line_warnings(prog: str) -> Iterator[None]:
    import logging
    import warnings

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _complain(prog, f"warning: {message}", 0)

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _print(prog: str, text: str) -> int:
    """Print a text on stdout, if it is open; return the exit code."""
    if sys.stdout is None:
        return 0
    try:
        if text:
            print(printable(text, sys.stdout))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader closed the pipe
            return SIGNALLED + 13  # SIGPIPE, which not every system has
        return _complain(prog, f"error: stdout cannot be written: {error.strerror}", 1)
    return 0


def _complain(prog: str, text: str, code: int) -> int:
    print(printable(f"{prog}: {text}", sys.stderr, "backslashreplace"), file=sys.stderr)
    return code
