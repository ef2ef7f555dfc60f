"""What a surgeon must be able to do, checked when it is made rather than hours later."""

from __future__ import annotations

import inspect
from typing import Any

from agents.state import check_state
from agents.surgeons.base import EpisodeRecord, Surgeon

METHODS = {
    "operate": ("n_operations",),
    "act": ("observations", "begins"),
    "stats": (),
    "save": ("folder",),
    "load": ("folder",),
    "get_state": (),
    "set_state": ("state",),
}


def check_contract(surgeon: object, name: str) -> None:
    """Raise a ValueError unless an object has the methods of `Surgeon`.

    And a state that a checkpoint can hold. Nothing is learned, and no generator is drawn from.

    Args:
        surgeon: as freshly made.
        name: it was made by.
    """
    missing = [method for method in METHODS if not _has(surgeon, method)]
    if missing:
        raise ValueError(
            f"surgeon {name!r} must have the methods {list(METHODS)}, got "
            f"{type(surgeon).__name__} without {', '.join(missing)}"
        )
    for method, arguments in METHODS.items():
        try:
            inspect.signature(getattr(surgeon, method)).bind(*arguments)
        except TypeError as error:
            call = f"{method}({', '.join(arguments)})"
            raise ValueError(f"surgeon {name!r} must take the call {call}: {error}") from error
    try:
        check_state(dict(surgeon.get_state()))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"surgeon {name!r} must return a dict of plain data and arrays from get_state: {error}"
        ) from error


def check_records(records: Any) -> None:
    """Raise a TypeError unless these are what `operate` is to return."""
    if not isinstance(records, list) or not all(isinstance(r, EpisodeRecord) for r in records):
        raise TypeError(f"operate must return a list of EpisodeRecord, got {records!r:.100}")


def _has(surgeon: object, method: str) -> bool:
    """Say whether an object has a method of its own: not the empty one of the Protocol."""
    found = getattr(surgeon, method, None)
    return callable(found) and getattr(found, "__func__", None) is not getattr(Surgeon, method)
