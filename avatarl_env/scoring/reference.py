"""The reference: an n-gram model and the trigram frequencies of the training text.

Shapes: B rows, N tokens of each, V vocabulary.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from avatarl_env.errors import shown
from avatarl_env.lm.protocols import Tokenizer, encode
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.text.corpus import Corpus
from avatarl_env.text.ngram import NGramReference

Array = NDArray[np.float64]
Splits = dict[str, NDArray[np.int64]]

LARGEST_VOCABULARY = 2**21
"""Largest vocabulary whose texts can be scored."""


class TextReference:
    """An n-gram model and trigram frequencies of the training text."""

    def __init__(
        self,
        tokens: NDArray[np.int64],
        vocab_size: int,
        order: int = 5,
        characters_per_token: float = 1.0,
    ) -> None:
        """Count n-grams and trigrams.

        Args:
            tokens: (T,) the training text, T >= max(order, 4).
            vocab_size: V, at most `LARGEST_VOCABULARY`, so that a trigram's code fits 63 bits.
            order: of the n-gram model.
            characters_per_token: characters of the text per token, > 0.

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
        """Return the nats (B, N) of a model's own tokens per character, (B,).

        The number of characters is that of N tokens of the training text.
        """
        n_characters = nats.shape[-1] * self.characters_per_token
        return np.asarray(nats.sum(-1, dtype=np.float64) / n_characters)

    def trigram_distance(self, tokens: NDArray[np.int64]) -> float:
        """Return 1000 times the unbiased squared L2 distance of trigram frequencies.

        `sum_g n_g (n_g - 1) / (n (n - 1)) - 2 sum_g (n_g / n) q_g + sum_g q_g^2`, a U-statistic:
        0 on average for text like the reference, of any length; about 100 for a loop of ten
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
    """Return a code for every n-gram of every row, (B * (N - n + 1),).

    Equal n-grams have equal codes; across calls too, if the vocabulary is at most `2**(63 // n)`.
    """
    width = tokens.shape[1] - n + 1
    codes = np.zeros((tokens.shape[0], width), dtype=np.int64)
    n_codes = 1
    for offset in range(n):
        if n_codes * vocab_size > 2**63:  # the code would overflow: renumber the prefixes
            seen, places = np.unique(codes, return_inverse=True)
            codes, n_codes = places.reshape(codes.shape), len(seen)
        codes = codes * vocab_size + tokens[:, offset : offset + width]
        n_codes *= vocab_size
    return codes.ravel()


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Splits, TextReference]:
    """Return a corpus's splits as tokens, and the reference counted on `train`.

    For our own tokenizer the result is cached per process: do not write to the splits.

    Raises:
        ValueError: if `corpus` is not a `Corpus`, the tokenizer's ids are out of range, or the text
            has too few tokens.
    """
    if not isinstance(corpus, Corpus):
        raise ValueError(  # noqa: TRY004 - as for every bad argument
            f"corpus must be one that load_corpus() returns, got {shown(corpus)}"
        )
    if type(tokenizer) is CharTokenizer:
        return _encode_once(corpus, tokenizer.characters)
    return _encode(corpus, tokenizer)


@functools.lru_cache(maxsize=4)
def _encode_once(corpus: Corpus, characters: str) -> tuple[Splits, TextReference]:
    return _encode(corpus, CharTokenizer(characters))


def _encode(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Splits, TextReference]:
    splits = {name: encode(tokenizer, text) for name, text in corpus.splits.items()}
    train = splits["train"]
    ratio = len(corpus.splits["train"]) / max(len(train), 1)
    return splits, TextReference(train, tokenizer.vocab_size, characters_per_token=ratio)
