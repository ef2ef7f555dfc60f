"""One way to refuse an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``; it names the closest."""
    known = sorted(choices)
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{argument} must be one of {known}, got {value!r}{hint}")
