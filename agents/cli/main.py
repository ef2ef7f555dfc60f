"""The command line: `avatarl COMMAND ...`; `python train.py ...` is `avatarl train ...`.

Little is imported here, and nothing that takes time: `_outcome` has that done, where Ctrl-C ends
with one line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from agents.cli import COMMANDS
from agents.launch import STOPPING, begin, has_begun, place, started_by

SIGNALLED = 128  # and the signal's number, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, as `train.py` does; return the exit code.

    Bad input ends with one line that names the argument, the rule and the value, and code 2.
    """
    words = _words(arguments)
    return _run("train.py", lambda: _train(words))


def avatarl(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command of `avatarl`; return the exit code.

    Bad input ends with one line that names the argument, the rule and the value, and code 2.
    """
    # Before torch loads OpenMP: threads that spin while they wait are slow on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = _words(arguments)
    if not words or words[0] in ("-h", "--help"):
        return _run("avatarl", _overview)
    prog = f"avatarl {words[0]}" if words[0] in COMMANDS else "avatarl"
    return _run(prog, lambda: _command(words[0], words[1:], prog))


def _words(arguments: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if arguments is None else arguments)


def _train(words: list[str]) -> str:
    from agents.cli import train

    return train.main(words, "train.py", started=started_by("train.py"))


def _overview() -> str:
    lines = [f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        ["usage: avatarl COMMAND ...", "", *lines, "", "avatarl COMMAND --help lists its arguments"]
    )


def _command(name: str, words: list[str], prog: str) -> str:
    import importlib

    from agents.cli.parsing import refusing
    from avatarl_env.errors import check_choice

    with refusing(ValueError):
        check_choice("command", name, COMMANDS)
    module = importlib.import_module(f"agents.cli.{name}")
    if name != "train":  # which has more to import
        has_begun()
    text: str = module.main(words, prog)
    return text


def _run(prog: str, body: Callable[[], str]) -> int:
    """Print what the body returns, once, however many processes run it; return the exit code."""
    rank, count = place()
    code = _outcome(prog, body) if rank == 0 else _silently(lambda: _outcome(prog, body))
    if count > 1:  # torchrun ends what is left when one has failed; this is leaving, with its code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return code


def _silently(run: Callable[[], int]) -> int:
    """Run as one of the processes that say nothing; the first one says when to stop."""
    import contextlib
    from pathlib import Path

    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return run()


def _outcome(prog: str, body: Callable[[], str]) -> int:
    """Print what the body returns, or why it does not; return the exit code."""
    begin(prog)
    try:
        return _said(prog, body)
    except KeyboardInterrupt as stop:  # a run that can be gone on with says how
        _complain(prog, str(stop) or "interrupted")
        return SIGNALLED + int(getattr(stop, "signum", signal.SIGINT))
    finally:
        has_begun()


def _said(prog: str, body: Callable[[], str]) -> int:
    import functools
    import logging
    import warnings

    from agents.cli.parsing import Refusal

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, prog)
        try:
            text = body()
        except Refusal as error:
            _complain(prog, f"error: {' '.join(str(error).split())}")
            return error.code
    try:
        _show(text)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read has read enough
            return SIGNALLED + 13  # SIGPIPE, which not every system has
        _complain(prog, f"error: stdout cannot be written: {error.strerror}")
        return 1
    return 0


def _show(text: str) -> None:
    """Print a text, as far as stdout can show it; nothing if it is empty or stdout is closed."""
    from agents.terminal import printable

    if sys.stdout is None:
        return
    if text:
        print(printable(text, sys.stdout))
    sys.stdout.flush()


def _complain(prog: str, text: str) -> None:
    from agents.terminal import printable

    print(printable(f"{prog}: {text}", sys.stderr, "backslashreplace"), file=sys.stderr)


def _show_warning(prog: str, message: Warning | str, *_: object, **__: object) -> None:
    _complain(prog, f"warning: {message}")
