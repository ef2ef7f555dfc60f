"""Errors that end a run."""

from __future__ import annotations

from pathlib import Path


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
