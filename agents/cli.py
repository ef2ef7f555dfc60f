"""The command line: `python train.py [--preset NAME] [--FIELD VALUE ...]`."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence

INTERRUPTED, BAD_INPUT = 130, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code.

    Bad input ends with one line that names the argument, the rule and the value, and code 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _show_warning
    try:
        return _train(words)
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return INTERRUPTED


def _train(words: list[str]) -> int:
    import tyro

    from agents.config import TrainConfig, preset

    base = preset(_preset_name(words))
    config = tyro.cli(
        TrainConfig,
        prog="train.py",
        default=base,
        args=words,
        config=(tyro.conf.ConsolidateSubcommandArgs, tyro.conf.FlagConversionOff),
    )
    from agents.training import train

    run = train(config, command=shlex.join(["python", "train.py", *words]))
    metrics = run.summary["validation"]
    print(
        f"\nvalidation: accuracy {metrics['accuracy']:.1%}, loss {metrics['loss']:.3f} nats/char, "
        f"entropy {metrics['entropy']:.2f} nats; {run.summary['seconds']:.0f} s\n"
        f"{run.verdict}\nreport: {run.folder / 'report.html'}"
    )
    return 0


def _preset_name(words: list[str]) -> str:
    """Find the preset before everything else: it decides all other defaults."""
    name = "laptop"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--preset":
            name = following
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    return name


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"train.py: warning: {message}", file=sys.stderr)
