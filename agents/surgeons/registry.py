"""Surgeons by name: build, save and load them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agents.surgeons.base import Surgeon, check_interface, check_options, options_of, reading
from agents.surgeons.baselines import RandomSurgeon, ReplaySurgeon, ZeroSurgeon
from agents.surgeons.episodes import EpisodeRecord
from agents.surgeons.sb3 import ALGORITHMS, SB3Surgeon
from agents.surgeons.search import CMAESSurgeon, EvolutionStrategySurgeon
from avatarl_env.errors import check_choice, takes_any_keyword
from avatarl_env.files import read_json, write_atomically
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

__all__ = [
    "NONE",
    "SURGEONS",
    "EpisodeRecord",
    "Surgeon",
    "check_surgeon",
    "find_surgeon",
    "load_surgeon",
    "make_surgeon",
    "save_surgeon",
]

NONE = "none"
"""The name for no surgeon, and so no operations."""

ABOUT = "surgeon.json"

REFUSALS = (TypeError, AssertionError, RuntimeError, MemoryError, OverflowError)
"""Errors that libraries raise for a bad option; the last three for networks that are too large."""


def _replay(
    env: AttentionSurgeryVectorEnv,
    seed: int,
    *,
    source: str | int | Path | Mapping[str, Any],
    n_operations: int = 1,
) -> Surgeon:
    """Build the control of the surgeon that is saved in the folder `source`.

    For a saved replay, `source` is the name, seed and options of its trained surgeon, whose files
    are loaded later. (A folder may be a number, since command lines parse digits.)
    """
    if isinstance(source, Mapping):
        about = source
        trained = make_surgeon(about["surgeon"], env, about["seed"], about["options"])
    else:
        folder = Path(str(source))
        folder = find_surgeon(folder) or folder
        about = _read_about(folder)
        trained = load_surgeon(folder, env)
    return ReplaySurgeon(env, seed, source=trained, n_operations=n_operations, about=about)


SURGEONS: dict[str, Callable[..., Surgeon]] = {
    "random": RandomSurgeon,
    "zero": ZeroSurgeon,
    "replay": _replay,
    "cma_es": CMAESSurgeon,
    "es": EvolutionStrategySurgeon,
    **{name: functools.partial(SB3Surgeon, name) for name in ALGORITHMS},
}
"""Classes (or factories) of surgeons by name, called with a vector environment, a seed and options.

Add your own with `SURGEONS["mine"] = MySurgeon`, a subclass of `agents.surgeons.base.Surgeon`.
"""


def check_surgeon(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise a ValueError if the surgeon is unknown, or `NONE` has options."""
    check_choice("surgeon", name, [*SURGEONS, NONE])
    if name == NONE and options:
        raise ValueError(f"surgeon_options must be empty if surgeon is {NONE!r}, got {options}")


def make_surgeon(
    name: str,
    env: AttentionSurgeryVectorEnv,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> Surgeon:
    """Build a surgeon.

    Args:
        name: a key of `SURGEONS`.
        env: its environment, whose autoreset mode becomes SAME_STEP.
        seed: of the surgeon's own random numbers and of the environment's prompts.
        options: of the surgeon, by name.

    Raises:
        ImportError: if it needs a library that is not installed; names the extra.
        ValueError: if the name or an option is unknown (offers the closest), a value does not fit,
            or the result is not a `Surgeon`.
    """
    check_surgeon(name)
    if name == NONE:
        raise ValueError(f"surgeon must be one that operates, got {NONE!r}")
    options = dict(options or {})
    if not takes_any_keyword(SURGEONS[name]):  # otherwise it checks its options itself
        check_options(name, options, options_of(SURGEONS[name]))
    try:
        surgeon = SURGEONS[name](env, seed, **options)
    except REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"surgeon {name!r} cannot be built with options {options}: {reason}"
        ) from error
    check_interface(surgeon, name)
    return surgeon


def save_surgeon(
    surgeon: Surgeon,
    folder: str | Path,
    name: str,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write a surgeon's parameters, name, seed and options into an existing folder.

    Args:
        surgeon: built by `make_surgeon`.
        folder: to write into.
        name: argument of `make_surgeon`.
        seed: argument of `make_surgeon`.
        options: argument of `make_surgeon`, in JSON types.
    """
    folder, options = Path(folder), dict(options or {})
    if isinstance(surgeon, ReplaySurgeon) and surgeon.about is not None:
        options["source"] = dict(surgeon.about)  # saved here too: its own folder may be deleted
    about = json.dumps({"surgeon": name, "seed": seed, "options": options})
    surgeon.save(folder)
    write_atomically(folder / ABOUT, about + "\n")


def find_surgeon(folder: Path) -> Path | None:
    """Return the folder of the surgeon saved in `folder` itself or in a run's folder, if any."""
    places = (folder, folder / "checkpoints" / "final")
    return next((place for place in places if os.path.isfile(place / ABOUT)), None)


def load_surgeon(folder: str | Path, env: AttentionSurgeryVectorEnv) -> Surgeon:
    """Build a saved surgeon, which can continue to learn.

    Args:
        folder: written by `save_surgeon`, like a run's `checkpoints/final`. Nothing is unpickled.
        env: its new environment, with the same observation and action spaces.

    Raises:
        ValueError: if the folder has no surgeon, or one that is damaged or does not fit.
    """
    about = _read_about(Path(folder))
    surgeon = make_surgeon(about["surgeon"], env, about["seed"], about["options"])
    with reading(folder):
        surgeon.load(Path(folder))
    return surgeon


def _read_about(folder: Path) -> dict[str, Any]:
    """Return the name, seed and options of the surgeon saved in a folder."""
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(f"folder must hold a saved surgeon's {ABOUT}, got {str(folder)!r}")
    try:
        about: dict[str, Any] = read_json(path)
        kinds = [type(about[key]) for key in ("surgeon", "seed", "options")]
    except (OSError, ValueError, KeyError, TypeError):
        kinds = []
    if kinds != [str, int, dict]:
        raise ValueError(f"folder must hold a readable {ABOUT} of a surgeon, got {str(path)!r}")
    return about
