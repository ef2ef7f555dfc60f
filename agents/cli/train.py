"""`avatarl train`, which is also `python train.py`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.cli.parsing import Failure, Refusal, read_words, refusing
from agents.launch import has_begun
from avatarl_env.files import parse_json

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

    from agents.training.config import TrainConfig
    from agents.training.summary import RunSummary


def main(words: Sequence[str], prog: str, started: Sequence[str] = ("avatarl", "train")) -> str:
    """Train; return what came out, in words.

    Args:
        words: the command line; `--help` prints and returns nothing more to print.
        prog: what the command is called in the help.
        started: the command itself, for the run's record.

    Raises:
        Refusal: if something in it is unknown, of the wrong kind, or does not fit.
        Failure: if the model or the surgeon diverged, the disk took no more of the run, or its
            processes lost one another.
    """
    from agents.distributed import joined

    with joined() as ranks:
        with ranks.agreeing(Refusal):
            config = _read(words, prog, resumes=ranks.is_first)
        if config is None:
            return ""
        run = _train(config, shlex.join([*started, *words]))
    metrics = run.summary["validation"]
    return (
        f"\nvalidation: accuracy {metrics['accuracy']:.1%}, loss {metrics['loss']:.3f} nats/char, "
        f"entropy {metrics['entropy']:.2f} nats; {run.summary['seconds']:.0f} s\n"
        f"{run.verdict}\nreport: {run.folder / 'report.html'}"
    )


def _train(config: TrainConfig, command: str) -> RunSummary:
    from agents.errors import BadInput, DivergedError, DriftError, LostError
    from agents.tracking.run_folder import NotWritten
    from agents.training.loop import train

    has_begun()
    try:
        with refusing(BadInput):
            return train(config, command=command)
    except (DivergedError, DriftError, LostError, NotWritten) as error:
        raise Failure(str(error)) from error


def _read(words: Sequence[str], prog: str, *, resumes: bool) -> TrainConfig | None:
    """Read the command line; `resumes`: also the run that it goes on with, if it does."""
    import tyro

    from agents.training.config import TrainConfig, preset

    with refusing(ValueError):
        run = _given(words, "--resume") if resumes else None
        name = _given(words, "--preset")
        base = _stored(run) if run else preset("laptop" if name is None else name)
    # As the default of a flag, options would each be a flag of its own.
    usual = dataclasses.replace(base, surgeon_options={})
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_of_weights)
    with registry:
        config = read_words(
            TrainConfig, words, prog, default=usual, markers=(tyro.conf.FlagConversionOff,)
        )
    if config is None:
        return None
    if "--surgeon-options" in words and not config.surgeon_options:
        raise Refusal("surgeon_options must be names and values in turn, got none")
    options = {name: _value(value) for name, value in config.surgeon_options.items()}
    with refusing(ValueError):
        return dataclasses.replace(config, surgeon_options=options or base.surgeon_options)


def _stored(run: str) -> TrainConfig:
    from agents.training.resume import stored_run

    return stored_run(Path(run)).config


def _of_weights(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, float]] | None:
    """Let a score be one name, or names with weights; tyro makes a flag of each default weight."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type != dict[str, float]:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="TERM [WEIGHT [TERM WEIGHT ...]]",
        instance_from_str=_weights,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda weights: [
            word for name, weight in weights.items() for word in (name, f"{weight:g}")
        ],
    )


def _weights(words: list[str]) -> dict[str, float]:
    """Read terms and their weights.

    Raises:
        ValueError: if they are not one name, or pairs of a name and a number.
    """
    pairs = [words[0], "1"] if len(words) == 1 else words
    names, weights = pairs[::2], pairs[1::2]
    rule = "must be a term, or terms each with its weight (kl_ref 1 heldout_loss 20)"
    if not words or len(names) != len(weights) or len(set(names)) != len(names):
        raise ValueError(f"{rule}, got {' '.join(words)!r}")
    try:
        return {name: float(weight) for name, weight in zip(names, weights, strict=True)}
    except ValueError as error:
        raise ValueError(f"{rule}, got {' '.join(words)!r}") from error


def _value(word: Any) -> Any:
    """Read an option's value as JSON, and what is none as text."""
    try:
        return parse_json(word)
    except (TypeError, ValueError):
        return word


def _given(words: Sequence[str], flag: str) -> str | None:
    """Find a flag's value before everything else: it decides all other defaults."""
    value = None
    for index, word in enumerate(words):
        if word == flag:
            value = words[index + 1] if index + 1 < len(words) else ""
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value
