"""The n-gram reference: interpolated Witten-Bell smoothing, every position at once.

An n-gram model is counted in a moment, the same on every machine, and predicts far better than
a language model in its first steps: the yardstick for what that model writes. With `h` a context
of `k` tokens, `h'` the same context without its oldest token, `c` counts and `N(h)` the
number of distinct tokens seen after `h` (Witten and Bell 1991, in the recursive form of Chen and
Goodman 1998, Harvard TR-10-98):

    p_k(a | h) = (c(h, a) + N(h) * p_{k-1}(a | h')) / (c(h) + N(h)),    p_{-1}(a) = 1 / V

A context that was never followed by anything has `p_k = p_{k-1}`.

How the counts are kept is told in `avatarl_env.text.ngram_counts`.

Shapes: `B` rows, `T` tokens a row, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from avatarl_env.text.ngram_counts import Level, count_level, ready_distributions

_IntArray = npt.NDArray[np.int64]
_FloatArray = npt.NDArray[np.float64]

_CELLS_PER_CHUNK = 2**20
"""Probabilities that `NGramReference.evaluate` holds at a time (8 MiB)."""


class ReferenceMetrics(NamedTuple):
    """How well the reference predicts a text.

    Attributes:
        loss: Mean of `-log p(token)`, nats per token.
        bits_per_token: The same in bits.
        accuracy: Share of the tokens that were the most probable one, in [0, 1].
        entropy: Mean entropy of the predicted distributions, nats per token.
    """

    loss: float
    bits_per_token: float
    accuracy: float
    entropy: float


class NGramReference:
    """An interpolated Witten-Bell n-gram model over token ids.

    Every probability is positive, and each distribution sums to one. Build it with `fit`: the
    constructor takes what `fit` has counted, one level for each length of context.

    Attributes:
        vocab_size: Number of token ids, `V`.
        order: Longest n-gram counted; contexts have up to `order - 1` tokens.
    """

    def __init__(self, levels: tuple[Level, ...], vocab_size: int) -> None:
        self.vocab_size: int = vocab_size
        self.order: int = len(levels)
        self._levels: tuple[Level, ...] = levels
        self._ready: _FloatArray
        self._first_ready: list[int]
        self._ready, self._first_ready = ready_distributions(levels, vocab_size)

    @classmethod
    def fit(cls, tokens: npt.ArrayLike, vocab_size: int, order: int = 5) -> NGramReference:
        """Count the n-grams of a text.

        Args:
            tokens: Shape `(T,)`, integers in `[0, vocab_size)`, at least `order` of them.
            vocab_size: `V`, at least 1; tokens that never occur still get some probability.
            order: Longest n-gram to count, at least 1.

        Returns:
            The fitted model.

        Raises:
            TypeError: If `tokens` are not integers.
            ValueError: If an argument breaks the rules above.
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
        return cls(tuple(levels), vocab_size)

    def next_log_probs(self, tokens: npt.ArrayLike, first: int = 0) -> npt.NDArray[np.float32]:
        """Return the whole distribution before each token from position `first` on.

        Row `j` of the result predicts `tokens[:, first + j]` from `tokens[:, :first + j]`, of
        which the last `order - 1` count; at the start of a row the context is shorter. To score
        what a model wrote after prompts of `P` tokens, give prompt and new text and `first=P`.

        Args:
            tokens: Shape `(B, T)`, integers in `[0, V)`.
            first: First position to predict, in `[0, T)`.

        Returns:
            Natural logarithms, shape `(B, T - first, V)`.

        Raises:
            TypeError: If `tokens` are not integers.
            ValueError: If an argument breaks the rules above.
        """
        rows, first = self._checked_rows(tokens, first)
        probs = self._next_probs(rows, first)
        log_probs = np.log(probs, out=probs).astype(np.float32)
        return log_probs.reshape(rows.shape[0], rows.shape[1] - first, self.vocab_size)

    def target_log_probs(self, tokens: npt.ArrayLike, first: int = 0) -> npt.NDArray[np.float32]:
        """Return the log-probability of each token from position `first` on.

        The same numbers as `next_log_probs` at the tokens themselves, with neither time nor memory
        spent on the rest of the vocabulary.

        Args:
            tokens: Shape `(B, T)`, integers in `[0, V)`.
            first: First position to predict, in `[0, T)`.

        Returns:
            Natural logarithms, shape `(B, T - first)`.

        Raises:
            TypeError: If `tokens` are not integers.
            ValueError: If an argument breaks the rules above.
        """
        rows, first = self._checked_rows(tokens, first)
        grams = self._number_grams(rows, self.order)
        probs = np.full((rows.shape[0], rows.shape[1] - first), 1.0 / self.vocab_size)
        for length, level in enumerate(self._levels):
            probs *= level.backoffs[_starting_before(grams[length], length, first, probs.shape)]
            probs += level.shares[_starting_before(grams[length + 1], length, first, probs.shape)]
        return np.log(probs).astype(np.float32)

    def evaluate(self, tokens: npt.ArrayLike) -> ReferenceMetrics:
        """Predict a whole text, each token from all that stands before it.

        Args:
            tokens: Shape `(T,)`, integers in `[0, V)`, at least one.

        Returns:
            Means over the `T` tokens.

        Raises:
            TypeError: If `tokens` are not integers.
            ValueError: If `tokens` is empty, not one-dimensional or out of range.
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

    def _next_probs(self, rows: _IntArray, first: int) -> _FloatArray:
        """Return the distributions of `next_log_probs` as probabilities, `(B*(T-first), V)`."""
        shape = (rows.shape[0], rows.shape[1] - first)
        grams = self._number_grams(rows, self.order - 1)
        # Begin with what is kept ready after the longest context that was seen.
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

    def _number_grams(self, rows: _IntArray, longest: int) -> list[_IntArray]:
        """Number the n-grams of 0 to `longest` tokens that start at each position.

        Returns:
            For each length `k` an array `(B, T - k + 1)` (no columns if `k > T`).
        """
        n_rows, width = rows.shape
        grams = [np.zeros((n_rows, width + 1), dtype=np.int64)]
        for length in range(longest):
            shorter = grams[-1][:, : max(0, width - length)]
            tokens = rows[:, length:]
            grams.append(self._levels[length].find(shorter, tokens, self.vocab_size))
        return grams

    def _checked_rows(self, tokens: npt.ArrayLike, first: int) -> tuple[_IntArray, int]:
        """Check the arguments; drop the leading columns that no prediction looks at."""
        rows = _checked_tokens(tokens, self.vocab_size, n_dims=2)
        if not 0 <= first < rows.shape[1]:
            raise ValueError(f"first must lie in [0, {rows.shape[1]}), got {first}")
        unused = max(0, first - (self.order - 1))
        return rows[:, unused:], first - unused


def _starting_before(
    grams: _IntArray, distance: int, first: int, shape: tuple[int, int]
) -> _IntArray:
    """Pick the n-gram that starts `distance` tokens before each predicted position.

    Args:
        grams: `(B, .)` numbers of the n-grams by the position where they start.
        distance: How far back to look.
        first: First predicted position.
        shape: Rows and predicted positions.

    Returns:
        The numbers, of the given shape; -1 where the n-gram would start before the row does.
    """
    picked = np.full(shape, -1, dtype=np.int64)
    missing = min(max(0, distance - first), shape[1])
    begin = max(0, first - distance)
    picked[:, missing:] = grams[:, begin : begin + shape[1] - missing]
    return picked


def _checked_tokens(tokens: npt.ArrayLike, vocab_size: int, n_dims: int) -> _IntArray:
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
