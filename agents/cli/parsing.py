"""Read command lines and JSON files; every error is one line."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from agents.cli import Refusal
from avatarl_env import files

T = TypeVar("T")

Run = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
"""The positional argument of commands that read a stored model."""


@contextlib.contextmanager
def refusing(*kinds: type[Exception], lm: str = "lm") -> Iterator[None]:
    """Turn errors of these kinds in the body into a `Refusal` with the same message.

    Args:
        kinds: types of errors.
        lm: replaces `lm`, the environment's name of the argument, at the start of a message.
    """
    try:
        yield
    except kinds as error:
        message = str(error)
        if message.startswith("lm "):
            message = f"{lm} {message.removeprefix('lm ')}"
        raise Refusal(message) from error


def read_words(kind: type[T], words: Sequence[str], prog: str, **options: Any) -> T:
    """Read a command line with tyro; `--help` prints the help and exits.

    Args:
        kind: a dataclass; its fields are the arguments, their docstrings the help.
        words: the command line.
        prog: name of the command in the help.
        options: further keyword arguments of `tyro.cli`.

    Raises:
        Refusal: if an argument is unknown, missing or of the wrong kind.
        SystemExit: after `--help`.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), refusing(ValueError):
            read: T = tyro.cli(kind, prog=prog, args=words, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise Refusal(_complaint(box.getvalue(), kind.__name__)) from None
    return read


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        Refusal: if it cannot be read or is not JSON.
    """
    try:
        return files.read_json(path)
    except OSError as error:
        raise Refusal(f"file {str(path)!r} must be readable: {error.strerror}") from error
    except ValueError as error:
        raise Refusal(str(error)) from error


def run_settings(folder: Path) -> dict[str, Any] | None:
    """Return the `config.json` of a run, given its folder or that of its checkpoint, or None."""
    for place in (folder, *folder.absolute().parents[:2]):
        config = place / "config.json"
        settings = read_json(config) if os.path.isfile(config) else None
        # A model of transformers has a file of this name too.
        if isinstance(settings, dict) and {"operator", "operation"} <= settings.keys():
            return settings
    return None


def _complaint(box: str, kind: str) -> str:
    """Return the message in a box that tyro printed, in one line.

    The box is drawn with lines or, if stdout cannot show them, with blanks and hyphens.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        inside = line.strip(" │╰─╯")
        if inside.strip("-"):
            parts[-1].append(inside)
        elif parts[-1]:
            parts.append([])
    text = " ".join(parts[0] or box.split())
    if len(parts) > 1 and parts[1][:1] == ["Perhaps you meant:"]:
        text += f", did you mean {parts[1][1].split()[0]}?"
    return text.removeprefix("Error parsing ").removeprefix(f"{kind}: ")
