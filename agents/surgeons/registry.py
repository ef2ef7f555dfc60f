"""Surgeons by name."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agents.surgeons.base import EpisodeRecord, EpisodeRecorder, Surgeon
from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from agents.surgeons.contract import check_contract
from agents.surgeons.episodes import ReplaySurgeon
from agents.surgeons.sb3 import ALGORITHMS, SB3Surgeon
from agents.surgeons.search import CMAESSurgeon, EvolutionStrategySurgeon
from avatarl_env.errors import check_choice, takes_any_keyword
from avatarl_env.files import read_json, write_atomically
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

__all__ = [
    "NONE",
    "SURGEONS",
    "EpisodeRecord",
    "EpisodeRecorder",
    "Surgeon",
    "check_surgeon",
    "find_surgeon",
    "load_surgeon",
    "make_surgeon",
    "reading",
    "save_surgeon",
]

NONE = "none"
"""The name that means: no surgeon, no operations."""

ABOUT = "surgeon.json"

REFUSALS = (TypeError, AssertionError, RuntimeError, MemoryError, OverflowError)
"""How libraries refuse an option; the last three, networks or memories that are too large."""


def _replay(
    env: AttentionSurgeryVectorEnv,
    seed: int,
    *,
    source: str | Mapping[str, Any],
    n_operations: int = 1,
) -> Surgeon:
    """Build the control of the surgeon that was saved in the folder `source`.

    Of a saved replay the source is what the trained surgeon was made with: it is loaded later.
    """
    if isinstance(source, Mapping):
        about = source
        trained = make_surgeon(about["surgeon"], env, about["seed"], about["options"])
    else:
        folder = Path(str(source))  # a command line may have read digits as a number
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
"""Surgeons by name, of a vector environment, a seed and options; `SURGEONS["mine"] = ...` adds
one."""


def check_surgeon(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise a ValueError unless there is such a surgeon; no surgeon has no options."""
    check_choice("surgeon", name, [*SURGEONS, NONE])
    if name == NONE and options:
        raise ValueError(f"surgeon_options must be empty where surgeon is {NONE!r}, got {options}")


def make_surgeon(
    name: str,
    env: AttentionSurgeryVectorEnv,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> Surgeon:
    """Build the surgeon called `name`.

    Args:
        name: a key of `SURGEONS`.
        env: where it operates, on all rows at once; its autoreset mode becomes SAME_STEP.
        seed: of everything that it draws, and of the environment's prompts.
        options: its own, by name.

    Raises:
        ImportError: if it needs a library that is not installed; says which extra has it.
        ValueError: if there is none of that name, or it has no such option, with the closest, or
            if an option does not fit, or if what was registered is no `Surgeon`.
    """
    check_surgeon(name)
    if name == NONE:
        raise ValueError(f"surgeon {NONE!r} operates on nothing: there is nothing to make")
    options = dict(options or {})
    _check_options(name, options)
    try:
        surgeon = SURGEONS[name](env, seed, **options)
    except REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"surgeon {name!r} must be given options that fit, got {options}: {reason}"
        ) from error
    check_contract(surgeon, name)
    return surgeon


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a surgeon has not, and the lack of one that it must have."""
    parameters = inspect.signature(SURGEONS[name]).parameters.values()
    own = {p.name: p for p in parameters if p.kind == p.KEYWORD_ONLY}
    # Who takes any keyword checks them itself.
    for option in () if takes_any_keyword(SURGEONS[name]) else options:
        if not own:
            raise ValueError(f"surgeon {name!r} has no options, got {option!r}")
        check_choice(f"{name} option", option, own)
    for option, parameter in own.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"surgeon {name!r} must be given the option {option!r}, got none")


def save_surgeon(
    surgeon: Surgeon,
    folder: str | Path,
    name: str,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write what a surgeon learned, and what it takes to make it again, into an existing folder.

    Args:
        surgeon: to be saved.
        folder: where to.
        name: it was made with.
        seed: it was made with.
        options: it was made with; JSON must be able to hold them.
    """
    folder, options = Path(folder), dict(options or {})
    if isinstance(surgeon, ReplaySurgeon) and surgeon.about is not None:
        options["source"] = dict(surgeon.about)  # it is saved too: its own folder may go
    about = json.dumps({"surgeon": name, "seed": seed, "options": options})
    surgeon.save(folder)
    write_atomically(folder / ABOUT, about + "\n")


def find_surgeon(folder: Path) -> Path | None:
    """Return where in a surgeon's own folder, or in a run's, the surgeon is saved, if anywhere."""
    places = (folder, folder / "checkpoints" / "final")
    return next((place for place in places if os.path.isfile(place / ABOUT)), None)


def load_surgeon(folder: str | Path, env: AttentionSurgeryVectorEnv) -> Surgeon:
    """Make a saved surgeon again; it goes on learning where it was, in a new environment.

    Args:
        folder: that `save_surgeon` wrote, such as a run's `checkpoints/final`. Nothing in
            it is unpickled.
        env: where it operates, of the same observations and actions.

    Raises:
        ValueError: if there is no surgeon in the folder, or one that is damaged or does not fit.
    """
    about = _read_about(Path(folder))
    surgeon = make_surgeon(about["surgeon"], env, about["seed"], about["options"])
    with reading(folder):
        surgeon.load(Path(folder))
    return surgeon


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Let whatever a surgeon raises over damaged files in the body be a ValueError."""
    try:
        yield
    except (ValueError, ImportError):
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(
            f"surgeon must be stored whole, got {str(folder)!r}: {type(error).__name__}: {reason}"
        ) from error


def _read_about(folder: Path) -> dict[str, Any]:
    """Return the name, seed and options of the surgeon that is saved in a folder."""
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(f"folder must hold a saved surgeon's {ABOUT}, got {str(folder)!r}")
    try:
        about: dict[str, Any] = read_json(path)
        is_whole = (
            isinstance(about["surgeon"], str)
            and type(about["seed"]) is int
            and isinstance(about["options"], dict)
        )
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"folder must hold a readable {ABOUT} of a surgeon, got {str(path)!r}")
    return about
