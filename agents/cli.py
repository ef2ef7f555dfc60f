"""The command line: `python train.py [--preset NAME] [--FIELD VALUE ...]`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avatarl_env.choices import closest

if TYPE_CHECKING:
    from agents.config import TrainConfig

INTERRUPTED, BAD_INPUT = 130, 2
_RULES = {
    "invalid literal for int() with base 10:": "must be a whole number, got",
    "could not convert string to float:": "must be a number, got",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code.

    Bad input ends with one line that names the argument, the rule and the value, and code 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _train(words)
        except KeyboardInterrupt:
            print("train.py: interrupted", file=sys.stderr)
            return INTERRUPTED


def _train(words: list[str]) -> int:
    from agents.config import BadInput

    try:
        config = _parse(words)
        if config is None:
            return 0
        from agents.training import train

        run = train(config, command=shlex.join(["python", "train.py", *words]))
    except BadInput as error:
        print(f"train.py: error: {_one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT
    metrics = run.summary["validation"]
    print(
        f"\nvalidation: accuracy {metrics['accuracy']:.1%}, loss {metrics['loss']:.3f} nats/char, "
        f"entropy {metrics['entropy']:.2f} nats; {run.summary['seconds']:.0f} s\n"
        f"{run.verdict}\nreport: {run.folder / 'report.html'}"
    )
    return 0


def _parse(words: list[str]) -> TrainConfig | None:
    """Read the command line; None if it asked for help, which then stands on stdout.

    Raises:
        BadInput: if something in it is unknown or of the wrong kind.
    """
    import tyro

    from agents.config import BadInput, TrainConfig, preset

    complaint = io.StringIO()  # tyro frames what it has to say over several lines
    try:
        base = preset(_preset_name(words))
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                TrainConfig,
                prog="train.py",
                default=base,
                args=words,
                return_unknown_args=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except ValueError as error:
        raise BadInput(str(error)) from error
    except SystemExit as leave:
        if not leave.code:
            return None
        raise BadInput(_unframe(complaint.getvalue())) from None
    if unknown:
        hint = closest(unknown[0].partition("=")[0], _flags(dataclasses.asdict(base)))
        raise BadInput(f"arguments must be those that --help lists, got {unknown[0]!r}{hint}")
    options = {name: _value(value) for name, value in config.surgeon_options.items()}
    return dataclasses.replace(config, surgeon_options=options)


def _value(word: Any) -> Any:
    """Read an option's value as JSON, and what is none as text."""
    try:
        return json.loads(word)
    except (TypeError, ValueError):
        return word


def _preset_name(words: list[str]) -> str:
    """Find the preset before everything else: it decides all other defaults."""
    name = "laptop"
    for index, word in enumerate(words):
        if word == "--preset":
            name = words[index + 1] if index + 1 < len(words) else ""
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    return name


def _flags(settings: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    """Yield the flags of all settings: `--seed`, `--lm.n-heads`, ..."""
    for name, value in settings.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        else:
            yield flag


def _unframe(box: str) -> str:
    """Return the complaint that stands in tyro's box, without its title and the help below it.

    The box is drawn with lines, or, where stdout cannot show those, with blanks and hyphens.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        inside = line.strip(" │")
        if inside and not inside.strip("─-"):
            parts.append([])
        elif inside:
            parts[-1].append(inside)
    text = next((" ".join(part) for part in parts if part), "arguments cannot be read")
    for pythons, ours in _RULES.items():
        text = text.replace(pythons, ours)
    return text.removeprefix("Error parsing ").removeprefix("TrainConfig: ")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"train.py: warning: {message}", file=sys.stderr)
