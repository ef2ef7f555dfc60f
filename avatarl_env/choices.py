"""One way to refuse an unknown name, and to say which was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``; it names the closest."""
    known = sorted(choices)
    if value not in known:
        hint = closest(str(value), known)
        raise ValueError(f"{argument} must be one of {known}, got {value!r}{hint}")


def closest(value: str, choices: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" with the choice that is like ``value``, or nothing."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
