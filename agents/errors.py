"""How runs and commands end early, and how that is printed."""

from __future__ import annotations

import importlib
import re
import signal
from pathlib import Path
from types import ModuleType
from typing import TextIO

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a run to stop. SIGHUP, of a closed terminal, does not exist on every system."""

# All but the line break and the tab. A carriage return before a line break does no harm.
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class BadInput(ValueError):
    """The run cannot be done as configured; nothing has been trained or written."""


class BadCheckpoint(ValueError):
    """A checkpoint that is missing, corrupt or incompatible; it has not been changed."""


class DivergedError(RuntimeError):
    """The model or the surgeon cannot be trained further: its numbers are not finite.

    Attributes:
        folder: run folder with a checkpoint to resume from, or None.
    """

    folder: Path | None = None


class LostError(RuntimeError):
    """Another rank of the run has ended, or cannot be reached."""


class DriftError(RuntimeError):
    """The ranks of the run no longer have the same weights."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; it has written a checkpoint.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        """Take the message, which says how to resume, and the signal's number."""
        super().__init__(message)
        self.signum = signum


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """Import a library that only an extra of this package installs.

    Args:
        module: the library's name.
        extra: the extra that installs it.
        user: what needs it, for the message.

    Raises:
        ImportError: if it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # something that the library itself needs
            raise
        raise ImportError(f"{user} needs {module}: pip install 'avatarl-env[{extra}]'") from error


def printable(text: str, stream: TextIO | None, errors: str = "replace") -> str:
    r"""Return a text in a form that a stream can show.

    On a terminal, control characters become escapes such as `\x1b`: the terminal would obey them,
    and a model can learn them from any text. A file or a pipe gets them unchanged.

    Args:
        text: what is to be printed.
        stream: where to; None if it is closed.
        errors: for characters that the stream's encoding lacks: `"replace"` for a question mark,
            `"backslashreplace"` for an escape.
    """
    if stream is None:
        return text
    if stream.isatty():
        text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors).decode(encoding)
