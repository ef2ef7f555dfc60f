"""The folder of a run, and the command that resumes it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from agents.distributed import torchrun_words
from agents.tracking.schema import Row, read_rows
from agents.tracking.tensorboard import FOLDER as EVENTS
from avatarl_env.errors import shown

LOCK = ".lock"
PARTIAL = ".*.partial"  # names of files and folders that are still being written
CHECKPOINTS = "checkpoints"


class NotWritten(OSError):
    """A run could not be written to disk; the message has the command that resumes it."""


class RunFolder:
    """The folder of a new run, created on construction; `reopen` opens that of an existing run.

    Args:
        path: the folder to create. It may exist if it is empty but for a lock and partial files,
            which a run leaves behind if it is killed before it writes `config.json`.

    Attributes:
        path: the folder.
        config: `config.json`, the settings of the run.
        references: `references.json`, scores of n-gram models.
        metrics: `metrics.jsonl`, the rows of the run.
        samples: `samples.txt`, the samples in readable form.
        summary: `summary.json`, the results; absent until the run has finished.

    Raises:
        ValueError: if `path` is a file, is not empty, or cannot be created.
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
        """Open the folder of an existing run, without changing anything in it.

        Raises:
            ValueError: if it has no `config.json`, or one of the run's files is a symbolic link,
                since writing to it would change a file elsewhere.
        """
        folder = cls.__new__(cls)
        folder._name_files(path)
        if not folder.config.is_file():
            raise ValueError(f"folder must hold a run's config.json, got {str(path)!r}")
        folder._refuse_links()
        return folder

    def rows(self) -> Iterator[Row]:
        """Yield the rows of `metrics.jsonl`; invalid lines are skipped."""
        return (row for _, row in read_rows(self.metrics) if row is not None)

    def check_holds(self, n_metrics: int, n_samples: int) -> None:
        """Check that both files have at least the given lengths, which end with a line.

        Lines of `metrics.jsonl` must be valid rows: after a power failure a file can have its
        length but not its content.

        Args:
            n_metrics: bytes of `metrics.jsonl`, from `MetricWriter.positions`.
            n_samples: bytes of `samples.txt`.

        Raises:
            ValueError: if a check fails.
        """
        for file, length in ((self.metrics, n_metrics), (self.samples, n_samples)):
            size = file.stat().st_size if file.exists() else 0
            if size < length:
                raise ValueError(
                    f"{file} must have the {length} bytes that were recorded, got {size}"
                )
            if not _ends_line(file, length):
                raise ValueError(f"{file} must have a line that ends at byte {length}, got none")
        for number, (line, row) in enumerate(read_rows(self.metrics, n_metrics), start=1):
            if row is None:
                rule = f"{self.metrics} must have a row of JSON in line {number}"
                raise ValueError(f"{rule}, got {shown(line[:40])}")

    def cut_back(self, n_metrics: int, n_samples: int) -> None:
        """Truncate `metrics.jsonl` and `samples.txt` and remove `summary.json`.

        Args:
            n_metrics: bytes of `metrics.jsonl` to keep, from `MetricWriter.positions`.
            n_samples: bytes of `samples.txt` to keep.

        Raises:
            ValueError: if `check_holds` fails; nothing has been changed then.
        """
        self.check_holds(n_metrics, n_samples)
        self.summary.unlink(missing_ok=True)
        for file, length in ((self.metrics, n_metrics), (self.samples, n_samples)):
            if file.exists():
                os.truncate(file, length)

    @contextmanager
    def written_to(self) -> Iterator[None]:
        """Turn an OSError in the body into a `NotWritten`.

        Raises:
            NotWritten: if the disk is full or fails otherwise. Files written before are complete.
        """
        try:
            yield
        except BrokenPipeError:  # of the program's output
            raise
        except OSError as error:
            path = str(self.path)
            remedy = ""
            if self.summary.is_file():
                command = shlex.join(["avatarl", "report", path])
                remedy = f"; the run has finished, get its report with: {command}"
            elif self.config.is_file():
                remedy = f"; once it can, resume with: {resume_command(self.path)}"
            reason = error.strerror or str(error)
            raise NotWritten(
                f"out must be a folder that can be written to, got {path!r}: {reason}{remedy}"
            ) from error

    def _refuse_links(self) -> None:
        checkpoints = self.path / CHECKPOINTS
        own = [self.path / LOCK, self.config, self.references, self.metrics, self.samples]
        own += [self.summary, self.path / EVENTS, checkpoints]
        own += checkpoints.iterdir() if checkpoints.is_dir() else ()
        for path in own:
            if path.is_symlink():
                raise ValueError(
                    f"resume must be a run whose files are in its own folder, got {str(path)!r}, a "
                    "symbolic link; replace it by its target"
                )

    def _name_files(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.references = self.path / "references.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.txt"
        self.summary = self.path / "summary.json"


def refuse_used(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError if `path` is a file, or a folder that holds more than a lock."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be an empty or new folder, got the file {str(path)!r}")
        names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be read, got {str(path)!r}: {error.strerror}"
        ) from error
    if not all(name == LOCK or fnmatch(name, PARTIAL) for name in names):
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"out must be an empty or new folder, got {str(path)!r} which holds {listed}"
        )


def start_command() -> list[str]:
    """Return the command, in words, that starts this program again, without its arguments.

    For a program other than `train.py` and `avatarl`, it is `avatarl train`.
    """
    script, launcher = sys.argv[0], torchrun_words()
    if os.path.basename(script) == "train.py":
        return [*(launcher or [sys.orig_argv[0]]), script]
    found = shutil.which("avatarl")
    is_avatarl = os.path.basename(script).partition(".")[0] == "avatarl"
    if is_avatarl and not (found and os.path.samefile(found, script)):
        program = script
    else:  # torchrun needs a path
        program = found if found and launcher else "avatarl"
    return [*launcher, program, "train"]


def resume_command(folder: os.PathLike[str]) -> str:
    """Return the shell command that resumes a run."""
    return shlex.join([*start_command(), "--resume", os.fspath(folder)])


def _ends_line(file: Path, length: int) -> bool:
    """Whether a line ends after `length` bytes of a file; true for 0 bytes."""
    if length <= 0:
        return length == 0
    with file.open("rb") as content:
        content.seek(length - 1)
        return content.read(1) == b"\n"
