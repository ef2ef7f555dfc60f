"""Files: bounded reading of untrusted files, and atomic writing.

The whole project reads JSON and writes files here, so that damaged, endless or hostile files are
refused with the same messages everywhere.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of objects and lists in JSON. Our own files have fewer than ten levels."""
MAX_JSON = 2**28
"""Size of the largest JSON file, bytes."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def is_utf8(text: str) -> bool:
    """Return whether UTF-8 can encode a text, which it cannot with lone surrogates."""
    return _SURROGATE.search(text) is None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from an untrusted source.

    Args:
        text: the JSON; bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: if it is not JSON, or nested more than 100 deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
        is_deep = True
    else:
        is_deep = text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value)
    if is_deep:
        raise ValueError(f"it must be nested at most {MAX_DEPTH} deep, got more")
    return value


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a file of JSON.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a regular file, not UTF-8, not JSON, longer than 256 MiB, or nested
            more than 100 deep.
    """
    try:
        return parse_json(read_regular(path, MAX_JSON))
    except ValueError as error:
        raise ValueError(f"file {str(path)!r} must hold JSON: {error}") from error


def dump_json(value: object, indent: int | None = None) -> str:
    """Return strict JSON that UTF-8 can encode; only lone surrogates are escaped.

    Python represents undecodable bytes of a path as such surrogates; `parse_json` restores them.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a regular file, in bounded time and memory.

    Pipes and devices are refused before they are opened, since opening one may block. No more is
    read than the size that the file system reports (0 for the files of `/proc`).

    Args:
        path: the file.
        most: bytes it may have.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a regular file, or longer than `most`.
    """
    _check_regular(os.stat(path), most)
    with open(path, "rb", opener=_open_nonblocking) as file:
        found = os.fstat(file.fileno())  # the file may have been replaced
        _check_regular(found, most)
        return file.read(found.st_size)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader finds the whole old file or the whole new one.

    The content is written and synced to a new file beside it, which is then renamed. Its first name
    cannot be guessed, so that no prepared link is followed.

    Args:
        path: the file; a link there is replaced, not followed.
        content: its new content; a string is written in UTF-8.

    Raises:
        OSError: if it cannot be written; the old file is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    handle = os.open(partial, _NEW_FILE, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [x for x in level if isinstance(x, dict | list)]
        level = [item for x in inner for item in (x.values() if isinstance(x, dict) else x)]
        if not inner:
            return False
    return True


def _check_regular(found: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it must be a regular file, got a directory, pipe or device")
    if found.st_size > most:
        raise ValueError(f"it must have at most {most:,} bytes, got {found.st_size:,}")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
