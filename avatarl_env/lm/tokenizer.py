"""Characters to token ids and back, exactly.

Text is handled as an array of Unicode code points (UTF-32), so encoding and decoding are one table
look-up each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from avatarl_env.files import is_utf8

UNKNOWN = "\ufffd"
"""The replacement character: stands for every character outside the vocabulary."""

_FORMAT = "char"
# "surrogatepass": a Python string may hold lone surrogates, which must survive a round trip.
_CODEC, _ERRORS = "utf-32-le", "surrogatepass"


class CharTokenizer:
    r"""One token per character, plus one for all unknown characters.

    Decoding an encoded text returns the text with each unknown character replaced by `"\ufffd"`, so
    its length never changes.

    Args:
        characters: distinct characters in the order of their ids, `"\ufffd"` among them.

    Attributes:
        characters: the vocabulary as one string; the character at index `i` has token id `i`.
        unknown_id: token id of `"\ufffd"`.

    Raises:
        ValueError: if a character is repeated or `"\ufffd"` is missing.

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
        # Indexed by code point; the last entry stands for all code points beyond the table.
        self._ids: npt.NDArray[np.int64] = np.full(
            int(self._code_points.max()) + 2, self.unknown_id, dtype=np.int64
        )
        self._ids[self._code_points] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer for the distinct characters of a text, in code point order.

        The unknown symbol has the last id, or its place in the order if the text contains it.
        """
        known = set(text)
        tail = "" if UNKNOWN in known else UNKNOWN
        return cls("".join(sorted(known)) + tail)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> CharTokenizer:
        """Rebuild a tokenizer from the result of `to_dict`.

        Raises:
            TypeError: if the characters are missing or not strings.
            ValueError: if `state` describes something else, or the characters are not allowed.
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
        """Return the token ids of a text, (T,) for T characters; unknown ones get `unknown_id`."""
        beyond = np.uint32(len(self._ids) - 1)
        return self._ids[np.minimum(_code_points(text), beyond)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor) -> str:
        """Return the text of token ids.

        Args:
            ids: (T,) integers in `[0, vocab_size)`; a tensor may be on any device.

        Raises:
            TypeError: if `ids` are not integers.
            ValueError: if `ids` are not one-dimensional or an id is out of range.
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
        """Count the characters of a text that are not in the vocabulary."""
        return int(np.count_nonzero(self.encode(text) == self.unknown_id)) - text.count(UNKNOWN)

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON: `"type"` (`"char"`) and `"characters"`.

        The characters are a string, or a list if there are lone surrogates: JSON would read two
        adjacent ones as a single character.
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
