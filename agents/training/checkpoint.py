"""Checkpoints: all that a run needs to resume exactly, in folders that are complete or absent.

Tensors are stored in one safetensors file, everything else in JSON; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from agents.errors import BadCheckpoint
from agents.state import State, flatten, unflatten
from agents.tracking.run_folder import CHECKPOINTS, LOCK, PARTIAL
from avatarl_env.files import read_json

FORMAT = 2
KEPT = 2
"""Number of checkpoints that a run keeps, the newest ones."""
MANIFEST, VALUES, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_PREFIX = "step-"
_LOCK_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)


def write(
    root: Path,
    step: int,
    state: State,
    about: Mapping[str, Any],
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint atomically; remove all but the last `KEPT`.

    Args:
        root: folder of a run's checkpoints; made if needed.
        step: steps that the run has done, which name the checkpoint.
        state: what `read` returns.
        about: what a run must match to resume, in JSON types.
        more: writes further files into the folder that it is called with.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written; earlier checkpoints are unchanged.
    """
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)  # which also makes the run's other files durable
    remove_partial(root)
    partial = root / f".{step}.partial"
    try:
        partial.mkdir()
        values, tensors = flatten(state)
        (partial / VALUES).write_text(json.dumps(values), encoding="utf-8")
        (partial / TENSORS).write_bytes(dump_tensors(tensors))
        if more is not None:
            more(partial)
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "files": files, "about": dict(about)}
        content = json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=2)
        (partial / MANIFEST).write_text(content + "\n", encoding="utf-8")
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        goal = root / f"{_PREFIX}{step:06d}"
        os.replace(partial, goal)
        sync(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(root)[:-KEPT]:
        _remove(old)
    return goal


def checkpoints(root: Path) -> list[Path]:
    """Return the folders of the complete checkpoints in `root`, oldest first."""
    named = (path for path in root.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal())
    return sorted(
        (path for path in named if path.is_dir()), key=lambda path: int(path.name[len(_PREFIX) :])
    )


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run's folder, or None."""
    return next(reversed(checkpoints(folder / CHECKPOINTS)), None)


def read_about(checkpoint: Path) -> dict[str, Any]:
    """Check that a checkpoint is complete and unchanged; return what a run must match.

    Raises:
        BadCheckpoint: if a file is missing or corrupt, or the format is not `FORMAT`.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = read_json(path)
        is_whole = manifest.pop("sha256") == _digest_of(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"checkpoint must have a readable {MANIFEST}, got {path}") from error
    if is_whole and manifest.get("format") != FORMAT:
        raise BadCheckpoint(
            f"checkpoint must have format {FORMAT}, got {manifest.get('format')} in {checkpoint}"
        )
    files, about = manifest.get("files"), manifest.get("about")
    is_listed = isinstance(files, dict) and {TENSORS, VALUES} <= files.keys()
    if not (is_whole and is_listed and isinstance(about, dict)):
        raise BadCheckpoint(f"checkpoint must be unchanged since it was written, got {path}")
    for name, digest in files.items():
        part = checkpoint / name
        if not os.path.isfile(part):  # pathlib raises if the name is too long
            raise BadCheckpoint(f"checkpoint must have the file {name[:80]}, got {checkpoint}")
        if _digest(part) != digest:
            raise BadCheckpoint(f"checkpoint must be unchanged since it was written, got {part}")
    return about


def read(checkpoint: Path) -> State:
    """Return the state in a checkpoint that `read_about` accepted; tuples are lists.

    Raises:
        BadCheckpoint: if the content of a file is not as expected.
    """
    with checking(checkpoint):
        tensors = load_tensors((checkpoint / TENSORS).read_bytes())
        state: State = unflatten(read_json(checkpoint / VALUES), tensors)
    return state


@contextlib.contextmanager
def checking(checkpoint: Path) -> Iterator[None]:
    """Turn errors that a checkpoint's content causes in the body into a `BadCheckpoint`."""
    try:
        yield
    except BadCheckpoint:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:200]
        raise BadCheckpoint(
            f"checkpoint must hold the state of this run, got {checkpoint}: {type(e).__name__}: "
            f"{reason}"
        ) from e


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder while the body runs, so that no second process writes to it.

    The system releases the lock if the process is killed.

    Raises:
        ValueError: if another process holds it, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # not available on every system
        yield
        return
    try:
        handle = os.fdopen(os.open(folder / LOCK, _LOCK_FLAGS, 0o666), "a")
    except OSError as error:
        is_link = error.errno == errno.ELOOP
        reason = f"its {LOCK} is a symbolic link" if is_link else error.strerror
        raise ValueError(
            f"out must be a folder that can be written to, got {str(folder)!r}: {reason}"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"out must be a run that no other process is working on, got {str(folder)!r}"
            ) from error
        yield


def remove_partial(root: Path) -> None:
    """Remove the partial folders of a killed run from `root`; links are not followed."""
    for left in root.glob(PARTIAL):
        if left.is_symlink() or not left.is_dir():
            left.unlink()
        else:
            shutil.rmtree(left)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first, so that an interruption leaves no half of it."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, partial)
    shutil.rmtree(partial)
