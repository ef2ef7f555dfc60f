"""What is printed, made fit for where it goes."""

from __future__ import annotations

import re
from typing import TextIO

# All but the line break and the tab. A carriage return does no harm before a line break.
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def defused(text: str, stream: TextIO) -> str:
    r"""Return a text whose control characters are escapes, such as ``\x1b``, for a terminal.

    A terminal would obey them, and a model may have learned them from anybody's text. A file or a
    pipe gets the text as it is.
    """
    if not stream.isatty():
        return text
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: str, stream: TextIO) -> str:
    """Return a defused text, with a question mark for what the stream's encoding does not have."""
    encoding = stream.encoding or "utf-8"
    return defused(text, stream).encode(encoding, "replace").decode(encoding)
