"""The stored configuration of a run that is to go on, and what may be asked for beside it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agents.training.config import TrainConfig, from_settings, preset, to_settings
from avatarl_env.files import read_json
from avatarl_env.text.corpus import CorpusError, load_corpus

HARMLESS = ("checkpoint_seconds", "track", "tensorboard")
"""Settings that no result depends on: a run that is resumed may have others from then on."""
PLACES = ("resume", "out", "corpus")  # where things lie; of the corpus the text counts


class StoredRun(NamedTuple):
    """What the `config.json` of a run that can be gone on with says."""

    config: TrainConfig
    corpus_sha256: str
    n_processes: int


def stored_run(folder: Path) -> StoredRun:
    """Read the configuration of a run that is to be resumed.

    Raises:
        ValueError: if there is no such run, it has finished, or its configuration cannot be read.
    """
    path = folder / "config.json"
    given = str(folder)
    if not os.path.isfile(path):  # also of a name that is too long
        raise ValueError(f"resume must be a run folder, with its config.json, got {given!r}")
    if (folder / "summary.json").is_file():
        raise ValueError(f"resume must be a run that has not finished, got {given!r}")
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"resume must be a run with a readable config.json, got {path}") from error
    kind = type(settings).__name__
    if kind != "dict":
        raise ValueError(f"resume must be a run whose config.json is an object, {path} is a {kind}")
    config = dataclasses.replace(from_settings(settings), resume=given, out=given)
    return StoredRun(config, settings.get("corpus_sha256", ""), settings.get("processes", 1))


def config_to_resume(asked: TrainConfig, run: StoredRun) -> TrainConfig:
    """Return the configuration with which a run goes on.

    Args:
        asked: with the run's folder as `out`, every setting counts; without, those that are not
            as the preset has them, and the rest stays the run's own.
        run: the stored one.

    Raises:
        ValueError: if a setting is asked for that is not the run's own and may change its results.
    """
    wanted, own, usual = (flat(to_settings(x)) for x in (asked, run.config, preset(asked.preset)))
    usual["preset"] = preset("laptop").preset
    free = (*HARMLESS, *PLACES)
    changes = {}
    for name, value in wanted.items():
        if name in ("resume", "out") or value == own.get(name):
            continue
        if value == usual.get(name) and (name == "corpus" or asked.out is None):
            continue  # nobody asked
        if name not in free:
            rule = f"the run's own where it is resumed, {own.get(name)!r}"
            raise ValueError(f"{name} must be {rule}, got {value!r}")
        changes[name] = getattr(asked, name)
    if asked.out is not None and Path(asked.out).absolute() != Path(asked.resume or "").absolute():
        raise ValueError(
            f"out must be the run's own where it is resumed, {asked.resume!r}, got {asked.out!r}"
        )
    return dataclasses.replace(run.config, **changes)


def check_corpus(config: TrainConfig, sha256: str) -> None:
    """Refuse to go on with another text than a run began with.

    Raises:
        ValueError: if the text cannot be had, or is another one.
    """
    try:
        corpus = load_corpus(config.corpus)
    except CorpusError as error:
        raise ValueError(
            f"{error}; where the run's text lies elsewhere now, say where with --corpus"
        ) from error
    if corpus.sha256 != sha256:
        raise ValueError(
            f"corpus must be the text that the run began with, of sha256 {sha256[:12]}..., got "
            f"{corpus.name!r} of {corpus.sha256[:12]}..."
        )


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings by their dotted names; surgeon_options and score are one each."""

    def walk(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if isinstance(value, dict) and name not in ("surgeon_options", "score"):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(settings, ""))
