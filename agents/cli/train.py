"""`avatarl train`, which is also `python train.py`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from agents.cli import Failure, Refusal
from agents.cli.parsing import read_words, refusing
from agents.distributed import joined
from agents.errors import BadInput, DivergedError, DriftError, LostError
from agents.tracking.run_folder import NotWritten, start_command
from agents.training.config import TrainConfig, preset
from agents.training.loop import train
from agents.training.resume import stored_run
from avatarl_env.files import parse_json


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The arguments that determine the defaults of all others."""

    preset: str = "laptop"
    resume: str | None = None


def main(words: Sequence[str], prog: str) -> str:
    """Train; return the results in words.

    Raises:
        Refusal: if the configuration is not valid, or does not fit the corpus or the machine.
        Failure: if the model or the surgeon diverges, the run cannot be written, or the
            connection between processes is lost.
        SystemExit: after `--help`.
    """
    with joined() as ranks:
        with ranks.agreeing(Refusal):
            config = read_config(words, prog, resumes=ranks.is_first)
        try:
            with refusing(BadInput):
                run = train(config, command=shlex.join([*start_command(), *words]))
        except (DivergedError, DriftError, LostError, NotWritten) as error:
            raise Failure(str(error)) from error
    metrics = run.summary["validation"]
    return (
        f"\nvalidation: accuracy {metrics['accuracy']:.1%}, loss {metrics['loss']:.3f} nats/char, "
        f"entropy {metrics['entropy']:.2f} nats; {run.summary['seconds']:.0f} s\n"
        f"{run.verdict}\nreport: {run.folder / 'report.html'}"
    )


def read_config(words: Sequence[str], prog: str, *, resumes: bool = True) -> TrainConfig:
    """Read the configuration of a run from a command line.

    Args:
        words: the command line.
        prog: the name of the command in the help.
        resumes: whether to take the defaults from the run named by `--resume`.

    Raises:
        Refusal: if it is not valid.
        SystemExit: after `--help`.
    """
    read = read_words(_Base, words, prog, add_help=False, return_unknown_args=True)
    known, _ = cast("tuple[_Base, list[str]]", read)
    with refusing(ValueError):
        base = stored_run(Path(known.resume)).config if resumes and known.resume else None
        base = base or preset(known.preset)
    registry = ConstructorRegistry()
    registry.primitive_rule(_names_with_values)
    markers = (tyro.conf.FlagConversionOff,)
    return read_words(TrainConfig, words, prog, default=base, config=markers, registry=registry)


def _names_with_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """Read a dictionary from one flag; tyro would make one flag for each key of the default."""
    if get_origin(info.type) is not dict:
        return None
    are_weights = info.type == dict[str, float]  # a single name gets weight 1

    def read(words: list[str]) -> dict[str, Any]:
        pairs = [*words, "1"] if are_weights and len(words) == 1 else words
        names, values = pairs[::2], pairs[1::2]
        if not pairs or len(names) != len(values) or len(set(names)) != len(names):
            raise ValueError(f"must be pairs of name and value, got {' '.join(words) or 'none'}")
        parse = float if are_weights else _parse
        return {name: parse(value) for name, value in zip(names, values, strict=True)}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME VALUE ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda pairs: [str(word) for pair in pairs.items() for word in pair],
    )


def _parse(word: str) -> Any:
    """Read a value as JSON if possible, else as text."""
    try:
        return parse_json(word)
    except ValueError:
        return word
