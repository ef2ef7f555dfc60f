"""Checkpoints: all that a run needs to go on exactly, in folders that are whole or not there.

A state is a tree of dicts and lists whose leaves are tensors, arrays, numbers, strings and None.
Tensors go to one safetensors file, the rest to JSON; nothing here is a pickle.
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

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from agents.tracking.run_folder import LOCK, PARTIAL
from avatarl_env.files import read_json

State = dict[str, Any]

FORMAT = 1
KEPT = 2
MANIFEST, VALUES, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
_LOCK_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
_PREFIX, _PLACE = "step-", "$tensor"


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be gone on from; it has not been touched."""


def write(
    root: Path,
    number: int,
    state: State,
    about: Mapping[str, Any],
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Write checkpoint `number` into `root`, in one step; remove all but the last few.

    Args:
        root: folder of a run's checkpoints; made if need be.
        number: counts up.
        state: to be had back from `read`.
        about: what a reader has to agree with (JSON).
        more: writes further files into the folder it is given.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written; what was there is as it was.
    """
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)  # which also has the run's other files from then on
    remove_partial(root)
    partial = root / f".{number}.partial"
    try:
        partial.mkdir()
        tensors: dict[str, Tensor] = {}
        values = json.dumps(_take_apart(state, "", tensors))
        (partial / VALUES).write_text(values, encoding="utf-8")
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
        goal = root / f"{_PREFIX}{number:06d}"
        os.replace(partial, goal)
        sync(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(root)[:-KEPT]:
        _remove(old)
    return goal


def checkpoints(root: Path) -> list[Path]:
    """Return the folders of the whole checkpoints in `root`, oldest first."""
    named = (path for path in root.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal())
    return sorted((path for path in named if path.is_dir()), key=number_of)


def number_of(checkpoint: Path) -> int:
    """Return a checkpoint's number."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def read_about(checkpoint: Path) -> dict[str, Any]:
    """Return what was said about a checkpoint, once every part of it is found to be whole.

    Raises:
        BadCheckpoint: if a file is missing, cut short or changed, or of another format.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = read_json(path)
        said = manifest.pop("sha256")
        is_whole = said == _digest_of(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"checkpoint must hold a readable {MANIFEST}, got {path}") from error
    if not is_whole:
        raise BadCheckpoint(f"checkpoint must be as it was written, got another {path}")
    if manifest.get("format") != FORMAT:
        raise BadCheckpoint(
            f"checkpoint must be of format {FORMAT}, got {manifest.get('format')} in {checkpoint}"
        )
    files, about = manifest.get("files"), manifest.get("about")
    is_listed = isinstance(files, dict) and {TENSORS, VALUES} <= files.keys()
    if not is_listed or not isinstance(about, dict):
        raise BadCheckpoint(f"checkpoint must be as it was written, got another {path}")
    for name, digest in files.items():
        part = checkpoint / name
        if not os.path.isfile(part):  # also of a name that is too long
            raise BadCheckpoint(f"checkpoint must hold {name[:80]}, got {checkpoint} without it")
        if _digest(part) != digest:
            raise BadCheckpoint(f"checkpoint must be as it was written, got another {part}")
    return about


def read(checkpoint: Path) -> State:
    """Return the state in a checkpoint that `read_about` found whole; tuples are lists.

    Raises:
        BadCheckpoint: if a file does not hold what it is to hold.
    """
    with sound(checkpoint):
        tensors = load_tensors((checkpoint / TENSORS).read_bytes())
        state: State = _put_together(read_json(checkpoint / VALUES), tensors)
    return state


@contextlib.contextmanager
def sound(checkpoint: Path) -> Iterator[None]:
    """Refuse a checkpoint whose content the body cannot use: it was written by something else.

    Raises:
        BadCheckpoint: says what the body raised.
    """
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


def check_state(state: State) -> None:
    """Raise a TypeError if a state holds anything that no checkpoint can."""
    json.dumps(_take_apart(state, "", {}))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for the body, so that no second process works in it.

    The lock goes with the process, however that ends.

    Raises:
        ValueError: if another process holds it, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
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
                f"out must be a run that no other process works on, got {str(folder)!r}"
            ) from error
        yield


def remove_partial(root: Path) -> None:
    """Remove what a killed run left half written in `root`; of a link only the link."""
    for left in root.glob(PARTIAL):
        if left.is_symlink() or not left.is_dir():
            left.unlink()
        else:
            shutil.rmtree(left)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, order="C"))
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_PLACE: path}
    if isinstance(value, Mapping):
        return {key: _take_apart(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_apart(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_PLACE}:
            return tensors[value[_PLACE]]
        return {key: _put_together(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    return value


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint in a way that never leaves half of one under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)
