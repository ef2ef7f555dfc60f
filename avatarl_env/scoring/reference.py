"""What honest text looks like: an n-gram model and the trigrams of the training text.

Shapes: B rows, N tokens of each, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avatarl_env.text.ngram import NGramReference

Array = NDArray[np.float64]

LARGEST_VOCABULARY = 2**21
"""Tokens that a vocabulary may have whose texts are scored."""


class TextReference:
    """What honest text looks like: an n-gram model and trigram frequencies of the training text."""

    def __init__(
        self,
        tokens: NDArray[np.int64],
        vocab_size: int,
        order: int = 5,
        characters_per_token: float = 1.0,
    ) -> None:
        """Count.

        Args:
            tokens: (T,) the training text, T >= max(order, 4).
            vocab_size: V, at most `LARGEST_VOCABULARY`, so that a trigram's number fits 63
                bits.
            order: of the n-gram model.
            characters_per_token: how many characters the text has for each of its tokens, > 0.

        Raises:
            ValueError: if the vocabulary is larger, or the text shorter.
        """
        if vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"vocab_size must be at most {LARGEST_VOCABULARY}, got {vocab_size}")
        if len(tokens) < max(order, 4):
            raise ValueError(f"tokens must be at least {max(order, 4)} to count, got {len(tokens)}")
        self.ngram = NGramReference.fit(tokens, vocab_size, order)
        self.vocab_size = vocab_size
        self.characters_per_token = characters_per_token
        codes = ngram_codes(tokens[None], 3, vocab_size)
        self._codes, counts = np.unique(codes, return_counts=True)
        self._frequencies = counts / counts.sum()
        self._self_collision = float((self._frequencies**2).sum())

    def per_character(self, nats: NDArray[np.floating]) -> Array:
        """Return nats per character, (B,), from those of a model's own tokens (B, N).

        Per character of as many tokens of the training text, whatever was written.
        """
        n_characters = nats.shape[-1] * self.characters_per_token
        return np.asarray(nats.sum(-1, dtype=np.float64) / n_characters)

    def trigram_distance(self, tokens: NDArray[np.int64]) -> float:
        """Return 1000 times the unbiased squared L2 distance of trigram frequencies.

        `sum_g n_g (n_g - 1) / (n (n - 1)) - 2 sum_g (n_g / n) q_g + sum_g q_g^2`, a U-statistic:
        0 on average for text like the reference whatever its length, about 100 for a loop of ten
        trigrams.

        Args:
            tokens: (B, N) rows; trigrams do not cross rows. N >= 3, at least two trigrams.
        """
        codes, counts = np.unique(ngram_codes(tokens, 3, self.vocab_size), return_counts=True)
        n = counts.sum()
        place = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        expected = np.where(self._codes[place] == codes, self._frequencies[place], 0.0)
        collisions = (counts * (counts - 1)).sum() / (n * (n - 1))
        cross = (counts * expected).sum() / n
        return float(1e3 * (collisions - 2 * cross + self._self_collision))


def ngram_codes(tokens: NDArray[np.int64], n: int, vocab_size: int) -> NDArray[np.int64]:
    """Number every n-gram of every row: (B * (N - n + 1),).

    Equal n-grams have equal numbers; in other calls too, if the vocabulary is at most
    `2**(63 // n)`.
    """
    width = tokens.shape[1] - n + 1
    codes = np.zeros((tokens.shape[0], width), dtype=np.int64)
    n_codes = 1
    for offset in range(n):
        if n_codes * vocab_size > 2**63:  # too long to be read as the digits of one number
            seen, places = np.unique(codes, return_inverse=True)
            codes, n_codes = places.reshape(codes.shape), len(seen)
        codes = codes * vocab_size + tokens[:, offset : offset + width]
        n_codes *= vocab_size
    return codes.ravel()
