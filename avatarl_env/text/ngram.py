"""The n-gram reference: interpolated Witten-Bell smoothing, vectorised over all positions.

An n-gram model takes a moment to count, is the same on every machine, and predicts far better than
a language model early in its training, so it can judge that model's texts. With `h` a context
of `k` tokens, `h'` the same context without its oldest token, `c` counts and `N(h)` the number of
distinct tokens seen after `h` (Witten and Bell 1991, in the recursive form of Chen and Goodman
1998, Harvard TR-10-98):

    p_k(a | h) = (c(h, a) + N(h) * p_{k-1}(a | h')) / (c(h) + N(h)),    p_{-1}(a) = 1 / V

A context that nothing ever followed has `p_k = p_{k-1}`. The counts are stored as
described in `avatarl_env.text.ngram_counts`.

Shapes: `B` rows, `T` tokens a row, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from avatarl_env.text.ngram_counts import (
    FloatArray,
    IntArray,
    Level,
    count_level,
    ready_distributions,
)

READY_CELLS = 2**20
"""Most probabilities after short contexts that a reference precomputes (8 MiB)."""
_CELLS_PER_CHUNK = 2**20
"""Most probabilities that `NGramReference.evaluate` holds at a time (8 MiB)."""


class ReferenceMetrics(NamedTuple):
    """How well the reference predicts a text."""

    loss: float
    """Mean of `-log p(token)`, nats per token."""
    bits_per_token: float
    """The same in bits."""
    accuracy: float
    """Fraction of the tokens that were the most probable one, in [0, 1]."""
    entropy: float
    """Mean entropy of the predicted distributions, nats per token."""


class NGramReference:
    """An interpolated Witten-Bell n-gram model over token ids.

    Every probability is positive, and each distribution sums to one. Build it with `fit`; the
    constructor takes the counts, one level for each length of context.

    Attributes:
        vocab_size: number of token ids, `V`.
        order: longest n-gram counted; contexts have up to `order - 1` tokens.
    """

    def __init__(
        self, levels: tuple[Level, ...], vocab_size: int, ready_cells: int = READY_CELLS
    ) -> None:
        self.vocab_size: int = vocab_size
        self.order: int = len(levels)
        self._levels: tuple[Level, ...] = levels
        self._ready, self._first_ready = ready_distributions(levels, vocab_size, ready_cells)

    @classmethod
    def fit(
        cls,
        tokens: npt.ArrayLike,
        vocab_size: int,
        order: int = 5,
        *,
        ready_cells: int = READY_CELLS,
    ) -> NGramReference:
        """Count the n-grams of a text.

        Args:
            tokens: shape `(T,)`, integers in `[0, vocab_size)`, at least `order` of them.
            vocab_size: `V`, at least 1; tokens that never occur have a positive probability too.
            order: longest n-gram to count, at least 1.
            ready_cells: most probabilities to precompute; affects speed and memory only.

        Raises:
            TypeError: if `tokens` are not integers.
            ValueError: if an argument breaks the rules above.
        """
        for name, value in (("vocab_size", vocab_size), ("order", order)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        text = _checked_tokens(tokens, vocab_size, n_dims=1)
        if len(text) < order:
            raise ValueError(f"tokens must hold at least order = {order} tokens, got {len(text)}")
        levels: list[Level] = []
        grams, n_grams = np.zeros(len(text), dtype=np.int64), 1  # the empty context, everywhere
        for length in range(order):
            keys = grams[: len(text) - length] * vocab_size + text[length:]
            level, grams = count_level(keys, n_grams, vocab_size)
            n_grams = len(level.keys)
            levels.append(level)
        return cls(tuple(levels), vocab_size, ready_cells)

    def next_log_probs(self, tokens: npt.ArrayLike, first: int = 0) -> npt.NDArray[np.float32]:
        """Return the predicted distribution of each token from position `first` on.

        Column `j` of the result predicts `tokens[:, first + j]` from the (up to) `order - 1` tokens
        before it. To score text that a model wrote after prompts of `P` tokens, pass prompts and
        new text, and `first=P`.

        Args:
            tokens: shape `(B, T)`, integers in `[0, V)`.
            first: first position to predict, in `[0, T)`.

        Returns:
            Natural logarithms, shape `(B, T - first, V)`.

        Raises:
            TypeError: if `tokens` are not integers.
            ValueError: if an argument breaks the rules above.
        """
        rows, first = self._checked_rows(tokens, first)
        probs = self._next_probs(rows, first)
        log_probs = np.log(probs, out=probs).astype(np.float32)
        return log_probs.reshape(rows.shape[0], rows.shape[1] - first, self.vocab_size)

    def target_log_probs(self, tokens: npt.ArrayLike, first: int = 0) -> npt.NDArray[np.float32]:
        """Return the log-probability of each token from position `first` on.

        These are the values of `next_log_probs` at the tokens themselves, without the cost of the
        rest of the vocabulary; arguments and errors are the same.

        Returns:
            Natural logarithms, shape `(B, T - first)`.
        """
        rows, first = self._checked_rows(tokens, first)
        grams = self._number_grams(rows, self.order)
        probs = np.full((rows.shape[0], rows.shape[1] - first), 1.0 / self.vocab_size)
        for length, level in enumerate(self._levels):
            probs *= level.backoffs[_starting_before(grams[length], length, first, probs.shape)]
            probs += level.shares[_starting_before(grams[length + 1], length, first, probs.shape)]
        return np.log(probs).astype(np.float32)

    def evaluate(self, tokens: npt.ArrayLike) -> ReferenceMetrics:
        """Predict each token of a text from the tokens before it.

        Args:
            tokens: shape `(T,)`, integers in `[0, V)`, at least one.

        Returns:
            Means over the `T` tokens.

        Raises:
            TypeError: if `tokens` are not integers.
            ValueError: if `tokens` is empty, not one-dimensional or out of range.
        """
        text = _checked_tokens(tokens, self.vocab_size, n_dims=1)
        if len(text) == 0:
            raise ValueError("tokens must hold at least one token, got none")
        loss = hits = entropy = 0.0
        step = max(1, _CELLS_PER_CHUNK // self.vocab_size)
        for begin in range(0, len(text), step):
            targets = text[begin : begin + step]
            context = min(begin, self.order - 1)
            probs = self._next_probs(text[None, begin - context : begin + step], context)
            log_probs = np.log(probs)
            loss -= float(log_probs[np.arange(len(targets)), targets].sum())
            hits += float(np.count_nonzero(probs.argmax(axis=1) == targets))
            entropy -= float(np.vdot(probs, log_probs))
        loss, hits, entropy = (total / len(text) for total in (loss, hits, entropy))
        return ReferenceMetrics(loss, loss / float(np.log(2.0)), hits, entropy)

    def _next_probs(self, rows: IntArray, first: int) -> FloatArray:
        """Return the distributions of `next_log_probs` as probabilities, `(B*(T-first), V)`."""
        shape = (rows.shape[0], rows.shape[1] - first)
        grams = self._number_grams(rows, self.order - 1)
        # Begin with the precomputed distribution after the longest context that was seen.
        places = np.zeros(shape, dtype=np.int64)
        for length, begin in enumerate(self._first_ready):
            contexts = _starting_before(grams[length], length, first, shape)
            places = np.where(contexts >= 0, begin + contexts, places)
        probs = self._ready[places.ravel()]
        cells = probs.reshape(-1)  # a view
        for length in range(len(self._first_ready), self.order):
            level = self._levels[length]
            contexts = _starting_before(grams[length], length, first, shape).ravel()
            probs *= level.backoffs[contexts, None]
            # The n-grams after each context, all ranges end to end: (sum of their lengths,).
            lengths = level.lengths[contexts]
            ends = np.cumsum(lengths)
            shifts = level.starts[contexts] - (ends - lengths)
            seen = np.arange(ends[-1]) + np.repeat(shifts, lengths)
            row_begins = np.repeat(np.arange(len(contexts)) * self.vocab_size, lengths)
            cells[row_begins + level.followers[seen]] += level.shares[seen]  # cells are distinct
        return probs

    def _number_grams(self, rows: IntArray, longest: int) -> list[IntArray]:
        """Number the n-grams of 0 to `longest` tokens that start at each position.

        The result has, for each length `k`, an array `(B, T - k + 1)` (no columns if `k > T`).
        """
        n_rows, width = rows.shape
        grams = [np.zeros((n_rows, width + 1), dtype=np.int64)]
        for length in range(longest):
            shorter = grams[-1][:, : max(0, width - length)]
            tokens = rows[:, length:]
            grams.append(self._levels[length].find(shorter, tokens, self.vocab_size))
        return grams

    def _checked_rows(self, tokens: npt.ArrayLike, first: int) -> tuple[IntArray, int]:
        """Check the arguments; drop the leading columns that no prediction depends on."""
        rows = _checked_tokens(tokens, self.vocab_size, n_dims=2)
        if not 0 <= first < rows.shape[1]:
            raise ValueError(f"first must lie in [0, {rows.shape[1]}), got {first}")
        unused = max(0, first - (self.order - 1))
        return rows[:, unused:], first - unused


def _starting_before(
    grams: IntArray, distance: int, first: int, shape: tuple[int, int]
) -> IntArray:
    """Pick the n-gram that starts `distance` tokens before each predicted position.

    The result has the given shape (rows, predicted positions); it is -1 where the n-gram would
    start before its row does. `grams` (B, .) are numbers by the position where n-grams start.
    """
    picked = np.full(shape, -1, dtype=np.int64)
    missing = min(max(0, distance - first), shape[1])
    begin = max(0, first - distance)
    picked[:, missing:] = grams[:, begin : begin + shape[1] - missing]
    return picked


def _checked_tokens(tokens: npt.ArrayLike, vocab_size: int, n_dims: int) -> IntArray:
    """Return `tokens` as int64 if they are integers in range with `n_dims` axes."""
    array: npt.NDArray[Any] = np.asarray(tokens)
    if array.ndim != n_dims:
        raise ValueError(f"tokens must have {n_dims} dimension(s), got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got dtype {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(
            f"tokens must lie in [0, {vocab_size}), got values from {array.min()} to {array.max()}"
        )
    return array.astype(np.int64, copy=False)
