"""Resuming a run: its stored configuration, its progress, and what must be unchanged."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.errors import BadCheckpoint
from agents.evaluation.surgeon_effect import Effect
from agents.tracking.environment import versions
from agents.training.config import TrainConfig, from_settings, preset, to_settings
from avatarl_env.files import read_json
from avatarl_env.text.corpus import Corpus, CorpusError, load_corpus

HARMLESS = ("checkpoint_seconds", "track", "tensorboard")
"""Settings that no result depends on; they may be changed when a run is resumed."""
PLACES = ("resume", "out", "corpus")
"""Paths, which may change too; the corpus is compared by its text."""


@dataclass
class Progress:
    """How much of a run is done."""

    phase: int = 0
    """Index of the current phase."""
    steps: int = 0
    """Steps done in it; 0 if it has not started."""
    total: int = 0
    """Steps done in all phases."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """Records of the phases that have ended."""
    effects: list[Effect] = field(default_factory=list)
    """The surgeon's effect after each phase that measured it."""

    def get_state(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        effects = [effect.as_summary() for effect in self.effects]
        return {**dataclasses.asdict(self), "effects": effects}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Rebuild it from `get_state`."""
        return cls(**{**state, "effects": [Effect.from_summary(x) for x in state["effects"]]})


class StoredRun(NamedTuple):
    """Contents of the `config.json` of an unfinished run."""

    config: TrainConfig
    corpus_sha256: str
    n_ranks: int


def stored_run(folder: Path) -> StoredRun:
    """Read the configuration of a run to resume.

    Raises:
        ValueError: if there is no such run, it has finished, or its configuration cannot be read.
    """
    path = folder / "config.json"
    given = str(folder)
    if not os.path.isfile(path):  # pathlib raises if the name is too long
        raise ValueError(f"resume must be a run folder with a config.json, got {given!r}")
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
    """Return the configuration to resume a run with: its own, with the harmless changes asked for.

    Args:
        asked: the requested configuration. If its `out` is the run's folder, every setting counts
            as a request; otherwise only those that differ from the preset.
        run: the stored run.

    Raises:
        ValueError: if a requested setting differs from the run's own and may change its results.
    """
    wanted, own, usual = (flat(to_settings(x)) for x in (asked, run.config, preset(asked.preset)))
    usual["preset"] = TrainConfig.preset
    changes = {}
    for name, value in wanted.items():
        if name in ("resume", "out") or value == own.get(name):
            continue
        if value == usual.get(name) and (name == "corpus" or asked.out is None):
            continue  # the default, not a request
        if name not in (*HARMLESS, *PLACES):
            raise ValueError(
                f"{name} must be that of the resumed run, {own.get(name)!r}, got {value!r}"
            )
        changes[name] = getattr(asked, name)
    if asked.out is not None and Path(asked.out).absolute() != Path(asked.resume or "").absolute():
        raise ValueError(
            f"out must be that of the resumed run, {asked.resume!r}, got {asked.out!r}"
        )
    return dataclasses.replace(run.config, **changes)


def corpus_to_resume(name: str, sha256: str) -> Corpus:
    """Load the text of a run to resume.

    Raises:
        ValueError: if the text cannot be loaded, or differs from the run's.
    """
    try:
        corpus = load_corpus(name)
    except CorpusError as error:
        raise ValueError(f"{error}; if the run's text has moved, name it with --corpus") from error
    if corpus.sha256 != sha256:
        raise ValueError(
            f"corpus must be the text that the run started with, of sha256 {sha256[:12]}..., got "
            f"{corpus.name!r} of {corpus.sha256[:12]}..."
        )
    return corpus


def describe(config: TrainConfig, corpus_sha256: str, n_ranks: int) -> dict[str, Any]:
    """Return what a run must match to resume from its checkpoints."""
    left_out = (*HARMLESS, *PLACES)
    settings = {name: x for name, x in to_settings(config).items() if name not in left_out}
    about = {"settings": settings, "corpus_sha256": corpus_sha256, "versions": versions()}
    return {**about, "threads": torch.get_num_threads(), "processes": n_ranks}


def check(about: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another configuration, corpus or set of versions.

    Args:
        about: stored with the checkpoint.
        here: `describe` of the run that resumes.
        path: the checkpoint's folder.

    Raises:
        BadCheckpoint: (a ValueError) names the difference.
    """
    check_ranks(about["processes"], here["processes"], path)
    theirs, ours = (flat(x["settings"]) for x in (about, here))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise BadCheckpoint(
                f"{name} must be {ours.get(name)!r} in the checkpoint, as in config.json, got "
                f"{theirs.get(name)!r} in {path}"
            )
    if about["corpus_sha256"] != here["corpus_sha256"]:
        raise BadCheckpoint(f"checkpoint must be of this corpus, got another in {path}")
    for name, number in about["versions"].items():
        if here["versions"].get(name) != number:
            raise BadCheckpoint(
                f"checkpoint must be of the installed versions, got {name} {number} in {path} and "
                f"{here['versions'].get(name)} here"
            )


def check_ranks(stored: int, n_ranks: int, path: Path) -> None:
    """Refuse to resume with another number of ranks, whose sums would round differently.

    Raises:
        BadCheckpoint: if the numbers differ.
    """
    if stored != n_ranks:
        raise BadCheckpoint(
            f"processes must be as many as when the run started, {stored}, got {n_ranks} for "
            f"{path} (torchrun --nproc-per-node)"
        )


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted names; `surgeon_options` and `score` are not split."""

    def walk(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if isinstance(value, dict) and name not in ("surgeon_options", "score"):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(settings, ""))
