"""The folder of a run: what its files are called, and what may be done to them from outside."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from agents.launch import resume_command
from agents.tracking.tensorboard import FOLDER as EVENTS
from avatarl_env.errors import shown
from avatarl_env.files import parse_json

LOCK = ".lock"
PARTIAL = ".*.partial"  # names of files and folders that are not whole yet
CHECKPOINTS = "checkpoints"


class NotWritten(OSError):
    """The disk took no more of a run; the message says what became of it."""


class RunFolder:
    """The folder of one run, made on construction; a folder that holds anything is refused.

    What a run leaves that was killed before it wrote its `config.json`, the lock and partial files,
    counts as nothing.

    `RunFolder.reopen(path)` takes one that holds a run already.

    Args:
        path: The folder to make. It may exist if it is empty.

    Attributes:
        path: The folder.
        config: `config.json`, the settings of the run.
        references: `references.json`, what its model is to be held against.
        metrics: `metrics.jsonl`, the rows of the run.
        samples: `samples.txt`, the samples in a form to read.
        summary: `summary.json`, the outcome; absent until the run has finished.

    Raises:
        ValueError: If `path` is a file, is not empty, or cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._name_files(path)
        refuse_used(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"out must be a folder that can be written to, got {str(path)!r}: {error.strerror}"
            ) from error

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> Self:
        """Open the folder of a run that was begun before, and change nothing in it.

        Raises:
            ValueError: If there is no `config.json` in it, or if one of the run's own files is a
                symbolic link, through which something else would be changed.
        """
        folder = cls.__new__(cls)
        folder._name_files(path)
        if not folder.config.is_file():
            raise ValueError(
                f"folder must hold a run's config.json to go on with, got {str(path)!r}"
            )
        folder._refuse_links()
        return folder

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of `metrics.jsonl`."""
        with self.metrics.open(encoding="utf-8") as lines:
            for line in lines:
                yield parse_json(line)

    def check_holds(self, n_metrics: int, n_samples: int) -> None:
        """Check that `metrics.jsonl` and `samples.txt` have so many bytes of whole lines.

        The lines of `metrics.jsonl` must be rows: after a power cut a file may have its length
        and not its content.

        Args:
            n_metrics: Bytes of `metrics.jsonl`, as `MetricWriter.positions` says.
            n_samples: Bytes of `samples.txt`.

        Raises:
            ValueError: If one has not; nothing is changed.
        """
        for file, length in ((self.metrics, n_metrics), (self.samples, n_samples)):
            size = file.stat().st_size if file.exists() else 0
            if size < length:
                raise ValueError(
                    f"{file} must have the {length} bytes that were recorded, got {size}"
                )
            if not _has_line_end_at(file, length):
                raise ValueError(f"{file} must have a line that ends at byte {length}, got none")
        if n_metrics:
            _check_rows(self.metrics, n_metrics)

    def cut_back(self, n_metrics: int, n_samples: int) -> None:
        """Shorten `metrics.jsonl` and `samples.txt` and remove `summary.json`.

        Args:
            n_metrics: Bytes to keep of `metrics.jsonl`, as `MetricWriter.positions` says.
            n_samples: Bytes to keep of `samples.txt`.

        Raises:
            ValueError: If a file is shorter, a line does not end there, or one that is to be kept
                is damaged; nothing is changed then.
        """
        self.check_holds(n_metrics, n_samples)
        self.summary.unlink(missing_ok=True)
        for file, length in ((self.metrics, n_metrics), (self.samples, n_samples)):
            if file.exists():
                os.truncate(file, length)

    @contextmanager
    def written_to(self) -> Iterator[None]:
        """Let the body write the run.

        Raises:
            NotWritten: If the disk is full, or does not take it for another reason. What was there
                before is whole.
        """
        try:
            yield
        except BrokenPipeError:  # of who reads what the run prints
            raise
        except OSError as error:
            path = str(self.path)
            if self.summary.is_file():
                command = shlex.join(["avatarl", "report", path])
                remedy = f"; the run has finished, get its report with: {command}"
            elif self.config.is_file():
                remedy = f"; once it can, go on with: {resume_command(self.path)}"
            else:
                remedy = ""
            reason = error.strerror or str(error)
            raise NotWritten(
                f"out must be a folder that can be written to, got {path!r}: {reason}{remedy}"
            ) from error

    def _refuse_links(self) -> None:
        """Raise a ValueError if something else would be written through one of the run's files."""
        checkpoints = self.path / CHECKPOINTS
        own = [self.path / LOCK, self.config, self.references, self.metrics, self.samples]
        own += [self.summary, self.path / EVENTS, checkpoints]
        own += checkpoints.iterdir() if checkpoints.is_dir() else ()
        for path in own:
            if path.is_symlink():
                raise ValueError(
                    f"resume must be a run whose files are in its own folder, got {str(path)!r}, a "
                    "symbolic link; replace it by what it points to"
                )

    def _name_files(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.references = self.path / "references.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.txt"
        self.summary = self.path / "summary.json"


def refuse_used(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError if `path` is a file or a folder that holds anything but a skeleton."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be an empty or new folder, got the file {str(path)!r}")
        names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        if all(name == LOCK or fnmatch(name, PARTIAL) for name in names):
            names = []
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be read, got {str(path)!r}: {error.strerror}"
        ) from error
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"out must be an empty or new folder, got {str(path)!r} which holds {shown}"
        )


def _has_line_end_at(file: Path, length: int) -> bool:
    """Whether the first `length` bytes of a file are whole lines; there may be none."""
    if length == 0:
        return True
    if length < 0 or not file.is_file():
        return False
    with file.open("rb") as content:
        content.seek(length - 1)
        return content.read(1) == b"\n"


def _check_rows(metrics: Path, length: int) -> None:
    """Raise a ValueError unless the lines in the first `length` bytes are rows of a run."""
    n_read = 0
    with metrics.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            n_read += len(line)
            if n_read > length:
                return
            if not _is_row(line):
                raise ValueError(
                    f"{metrics} must have a row of JSON in line {number}, got {shown(line[:40])}"
                )


def _is_row(line: bytes) -> bool:
    """Whether a line is a row as `MetricWriter.write` makes them."""
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return (
        isinstance(row, dict)
        and isinstance(row.get("kind"), str)
        and isinstance(row.get("seconds"), int | float)
    )
