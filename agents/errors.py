"""Exceptions that end runs and commands, and text that is safe to print."""

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
"""Signals that ask a run to stop. SIGHUP (terminal closed) does not exist on every system."""

# All but line breaks, tabs, and the carriage return before a line break.
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class BadInput(ValueError):
    """The run cannot be done as configured; nothing has been trained."""


class BadCheckpoint(ValueError):
    """A checkpoint is missing, corrupt or incompatible; it has not been changed."""


class DivergedError(RuntimeError):
    """The model or the surgeon has diverged: its numbers are not finite.

    Attributes:
        folder: of a run with a checkpoint to resume from, or None.
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
        """Set the message, which tells how to resume, and the signal's number."""
        super().__init__(message)
        self.signum = signum


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: name of the library.
        extra: the extra of this package that installs it.
        user: the feature that needs it, for the message.

    Raises:
        ImportError: if it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # a dependency of the library
            raise
        raise ImportError(f"{user} needs {module}: pip install 'avatarl-env[{extra}]'") from error


def printable(text: str, stream: TextIO | None, errors: str = "replace") -> str:
    r"""Return a text in a form that a stream can show.

    For a terminal, control characters become escapes like `\x1b`: a model can learn them from its
    text, and the terminal would execute them. A file or a pipe gets them unchanged.

    Args:
        text: to be printed.
        stream: the output; None if it is closed.
        errors: for characters that the stream's encoding lacks: `"replace"` for a question mark,
            `"backslashreplace"` for an escape.
    """
    if stream is None:
        return text
    if stream.isatty():
        text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors).decode(encoding)
