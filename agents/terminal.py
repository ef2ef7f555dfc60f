"""What is printed, made fit for where it goes."""

from __future__ import annotations

import re
from typing import TextIO

# All but the line break and the tab. A carriage return does no harm before a line break.
_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def printable(text: str, stream: TextIO | None, errors: str = "replace") -> str:
    r"""Return a text in the form that a stream can take.

    Control characters become escapes, such as `\x1b`, for a terminal: it would obey them, and a
    model may have learned them from anybody's text. A file or a pipe gets them as they are.

    Args:
        text: to be printed.
        stream: where.
        errors: what becomes of characters that its encoding does not have: `"replace"` for a
            question mark, `"backslashreplace"` for an escape.
    """
    if stream is None:  # closed before Python started
        return text
    if stream.isatty():
        text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors).decode(encoding)
