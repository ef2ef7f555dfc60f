"""Characters to token ids and back, exactly.

Text is handled as an array of Unicode code points (UTF-32), so both directions are one table
look-up however long the text is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from avatarl_env.files import is_utf8

UNKNOWN = "\ufffd"
"""The replacement character: what every character outside the vocabulary is encoded as."""

_FORMAT = "char"
# "surrogatepass": a Python string may hold lone surrogates, and they too must come back unchanged.
_CODEC, _ERRORS = "utf-32-le", "surrogatepass"


class CharTokenizer:
    r"""One token per character, plus one for everything unknown.

    Decoding what was encoded gives the same text for every text made of known characters; each
    unknown character comes back as `"\ufffd"`, so the length is always kept.

    Args:
        characters: Distinct characters in the order of their ids, `"\ufffd"` among them.

    Attributes:
        characters: The vocabulary as one string; the character at index `i` has token id `i`.
        unknown_id: Token id of `"\ufffd"`.

    Raises:
        ValueError: If a character is repeated or `"\ufffd"` is missing.

    Example:
        >>> tokenizer = CharTokenizer.from_text("to be")
        >>> tokenizer.encode("bet?").tolist()
        [1, 2, 4, 5]
        >>> tokenizer.decode([1, 2, 4])
        'bet'
    """

    def __init__(self, characters: str) -> None:
        if len(set(characters)) != len(characters):
            repeated = next(c for i, c in enumerate(characters) if c in characters[:i])
            raise ValueError(
                f"characters must be distinct, got {repeated!r} more than once; "
                "for the vocabulary of a text use CharTokenizer.from_text"
            )
        if UNKNOWN not in characters:
            raise ValueError(
                f"characters must hold the unknown symbol {UNKNOWN!r}, got {characters!r}"
            )
        self.characters: str = characters
        self.unknown_id: int = characters.index(UNKNOWN)
        self._code_points: npt.NDArray[np.uint32] = _code_points(characters)
        # Indexed by code point; the extra last entry stands for all code points beyond the table.
        self._ids: npt.NDArray[np.int64] = np.full(
            int(self._code_points.max()) + 2, self.unknown_id, dtype=np.int64
        )
        self._ids[self._code_points] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Collect the vocabulary of a text.

        Args:
            text: Any text, also an empty one.

        Returns:
            A tokenizer over the distinct characters in code point order. The unknown symbol takes
            the last id, unless the text holds it: then it keeps its place in the order.
        """
        known = set(text)
        tail = "" if UNKNOWN in known else UNKNOWN
        return cls("".join(sorted(known)) + tail)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CharTokenizer:
        """Rebuild a tokenizer from what `to_dict` gave.

        Args:
            state: A mapping with the keys `"type"` (`"char"`) and `"characters"`, a string
                or a list of strings.

        Raises:
            TypeError: If the characters are missing or not strings.
            ValueError: If `state` describes something else, or the characters are not allowed.
        """
        if state.get("type") != _FORMAT:
            raise ValueError(f"state['type'] must be {_FORMAT!r}, got {state.get('type')!r}")
        characters = state.get("characters")
        parts: list[Any] = characters if isinstance(characters, list) else [characters]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(f"state['characters'] must be a string, got {characters!r:.80}")
        return cls("".join(parts))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the unknown symbol included."""
        return len(self.characters)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Turn a text into token ids.

        Args:
            text: Any text; characters outside the vocabulary become `unknown_id`.

        Returns:
            Shape `(len(text),)`, values in `[0, vocab_size)`.
        """
        beyond = np.uint32(len(self._ids) - 1)
        return self._ids[np.minimum(_code_points(text), beyond)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor) -> str:
        """Turn token ids into text.

        Args:
            ids: Shape `(T,)`, integers in `[0, vocab_size)`; a tensor may be on any device.

        Returns:
            A text of `T` characters.

        Raises:
            TypeError: If `ids` are not integers.
            ValueError: If `ids` are not one-dimensional or an id is out of range.
        """
        array: npt.NDArray[Any] = np.asarray(
            ids.detach().cpu() if isinstance(ids, torch.Tensor) else ids
        )
        if array.ndim != 1:
            raise ValueError(f"ids must be one-dimensional, got shape {array.shape}")
        if array.size == 0:
            return ""
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"ids must be integers, got dtype {array.dtype}")
        if array.min() < 0 or array.max() >= self.vocab_size:
            raise ValueError(
                f"ids must lie in [0, {self.vocab_size}), "
                f"got values from {array.min()} to {array.max()}"
            )
        code_points: npt.NDArray[np.uint32] = self._code_points[array]
        return code_points.tobytes().decode(_CODEC, _ERRORS)

    def n_unknown(self, text: str) -> int:
        """Count the characters of `text` that `encode` cannot represent."""
        return int(np.count_nonzero(self.encode(text) == self.unknown_id)) - text.count(UNKNOWN)

    def to_dict(self) -> dict[str, Any]:
        """Return a description that JSON can hold and `from_dict` can read.

        The characters are one string. Where there are lone surrogates they are a list: JSON would
        read two of them that follow one another as one character.
        """
        characters = self.characters if is_utf8(self.characters) else list(self.characters)
        return {"type": _FORMAT, "characters": characters}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        return f"CharTokenizer(vocab_size={self.vocab_size}, characters={self.characters!r})"


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return the code points of a text, shape `(len(text),)`."""
    return np.frombuffer(text.encode(_CODEC, _ERRORS), dtype="<u4")
