"""Command lines into records, and whatever is wrong with them into one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from avatarl_env import files
from avatarl_env.errors import closest

T = TypeVar("T")

_RULES = {
    "invalid literal for int() with base 10:": "must be a whole number, got",
    "could not convert string to float:": "must be a number, got",
}


class Refusal(Exception):
    """What was asked for cannot be done; the message says why."""

    code = 2
    """The exit code."""


class Failure(Refusal):
    """It was begun, and came to nothing."""

    code = 1


@contextlib.contextmanager
def refusing(*kinds: type[Exception], lm: str = "lm") -> Iterator[None]:
    """Turn errors of these kinds in the body into a `Refusal` with the same message.

    Args:
        kinds: of errors.
        lm: what the command calls the argument that the environment calls so.
    """
    try:
        yield
    except kinds as error:
        message = str(error)
        if message.startswith("lm "):
            message = f"{lm} {message.removeprefix('lm ')}"
        raise Refusal(message) from error


def read_words(
    kind: type[T],
    words: Sequence[str],
    prog: str,
    *,
    default: T | None = None,
    markers: tuple[Any, ...] = (),
) -> T | None:
    """Read a command line.

    Args:
        kind: a dataclass; its fields are the arguments, their docstrings the help.
        words: the command line.
        prog: what the command is called in the help.
        default: of all fields; if None, those that `kind` has.
        markers: tyro's, how fields become flags.

    Returns:
        The record, or None if help was asked for, which then stands on stdout.

    Raises:
        Refusal: if something in it is unknown, missing or of the wrong kind.
    """
    import tyro

    complaint = io.StringIO()  # tyro frames what it has to say over several lines
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint), refusing(ValueError):
            read: tuple[T, list[str]] = tyro.cli(
                kind, prog=prog, args=words, return_unknown_args=True, config=markers, **given
            )
    except SystemExit as leave:
        if not leave.code:
            return None
        raise Refusal(_complaint(complaint.getvalue(), kind)) from None
    record, unknown = read
    if unknown:
        flags = _flags(record)
        hint = closest(unknown[0].partition("=")[0], flags)
        raise Refusal(f"arguments must be those that --help lists, got {unknown[0]!r}{hint}")
    return record


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        Refusal: if there is no such file, or it is none.
    """
    try:
        return files.read_json(path)
    except OSError as error:
        raise Refusal(f"file {str(path)!r} must be readable: {error.strerror}") from error
    except ValueError as error:
        raise Refusal(str(error)) from error


def run_settings(folder: Path) -> dict[str, Any] | None:
    """Return what the run was configured with that a folder is of, or is the checkpoint of.

    Returns:
        Its `config.json`, or None if it is no run's.
    """
    for place in (folder, *folder.absolute().parents[:2]):
        config = place / "config.json"
        settings = read_json(config) if os.path.isfile(config) else None
        # A folder of transformers has a file of that name too.
        if isinstance(settings, dict) and {"operator", "operation"} <= settings.keys():
            return settings
    return None


def _flags(settings: Any, prefix: str = "--") -> Iterator[str]:
    """Yield the flags of all settings of a dataclass: `--seed`, `--lm.n-heads`, ..."""
    for field in dataclasses.fields(settings):
        flag, value = prefix + field.name.replace("_", "-"), getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{flag}.")
        else:
            yield flag


def _complaint(box: str, kind: type) -> str:
    """Return what tyro has to say, in one line and in our words where we have some."""
    text = _unframe(box)
    if text.startswith("Missing from "):
        missing = dataclasses.MISSING
        needed = [
            field.name.upper()
            for field in dataclasses.fields(kind)
            if field.default is missing and field.default_factory is missing
        ]
        return f"arguments must begin with {' '.join(needed)}, see --help"
    for pythons, ours in _RULES.items():
        text = text.replace(pythons, ours)
    return text.removeprefix("Error parsing ").removeprefix(f"{kind.__name__}: ")


def _unframe(box: str) -> str:
    """Return the complaint that stands in tyro's box, without its title and the help below it.

    The box is drawn with lines, or, where stdout cannot show those, with blanks and hyphens.
    """
    parts: list[list[str]] = [[]]
    for line in box.split("\n")[1:]:
        inside = line.strip(" │")
        if inside and not inside.strip("─-"):
            parts.append([])
        elif inside:
            parts[-1].append(inside)
    return next((" ".join(part) for part in parts if part), "arguments cannot be read")
