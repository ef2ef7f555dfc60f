"""What an operation changed in a text, marked word by word."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from agents.report.parts import Html, escape

_PIECES = re.compile(r"\w+|\s+|[^\w\s]")
_LONGEST = 2000  # pieces; the time that the comparison takes grows with the square


class MarkedTexts(NamedTuple):
    """Two versions of a text with marks.

    Attributes:
        before: The first; what the second lacks is marked as deleted.
        after: The second; what it has anew is marked as inserted.
        changed: Share of the words of both that are marked, 0 to 1.
    """

    before: Html
    after: Html
    changed: float


def mark_changes(before: str, after: str) -> MarkedTexts:
    """Mark what differs between two texts.

    Words stay whole, and so do stretches of changed words: a blank or a comma that both texts
    happen to have between two changes is taken for a part of the change.

    Args:
        before: The first text.
        after: The second text.
    """
    left, right = _PIECES.findall(before), _PIECES.findall(after)
    sides: tuple[list[str], list[str]] = ([], [])
    n_changed = 0
    for same, old, new in _blocks(left, right):
        if same:
            text = escape("".join(old))
            for side in sides:
                side.append(text)
            continue
        n_changed += _n_words(old) + _n_words(new)
        for side, tag, pieces in zip(sides, ("del", "ins"), (old, new), strict=True):
            if pieces:
                side.append(f"<{tag}>{escape(''.join(pieces))}</{tag}>")
    n_words = _n_words(left) + _n_words(right)
    changed = n_changed / n_words if n_words else float(before != after)
    return MarkedTexts(Html("".join(sides[0])), Html("".join(sides[1])), changed)


def _blocks(left: list[str], right: list[str]) -> list[tuple[bool, list[str], list[str]]]:
    """Cut two lists into stretches that are the same or differ; no two that differ are neighbours.

    Returns:
        Whether the stretch is the same in both, and its pieces in either list.
    """
    if max(len(left), len(right)) > _LONGEST:
        return [(left == right, left, right)]
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    steps = [(name == "equal", left[i:j], right[k:m]) for name, i, j, k, m in matcher.get_opcodes()]
    blocks: list[tuple[bool, list[str], list[str]]] = []
    for index, (same, old, new) in enumerate(steps):
        is_inside = 0 < index < len(steps) - 1
        same = same and not (is_inside and _n_words(old) == 0)  # noqa: PLW2901
        if blocks and blocks[-1][0] == same:
            blocks[-1] = (same, blocks[-1][1] + old, blocks[-1][2] + new)
        else:
            blocks.append((same, old, new))
    return blocks


def _n_words(pieces: list[str]) -> int:
    return sum(piece[0].isalnum() or piece[0] == "_" for piece in pieces)
