"""The counts of an n-gram model, one level for each length of context.

The counts form a tree of n-grams. The `k`-grams seen are numbered from 0, a `k+1`-gram is found
under the key `number of its first k tokens * V + last token`, and its own number is the place of
that key among all sorted keys. So keys stay below `(tokens counted) * V` for every order, memory
is proportional to the n-grams seen, and what followed one context is one contiguous range.

Shapes: `E` n-grams and `C` contexts of one length, `P` positions, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Level:
    """The n-grams that follow the contexts of one length.

    Contexts and n-grams that were never seen have the number -1. Arrays with an extra entry end in
    one for them (share 0, length 0, back-off 1), which index -1 selects.
    """

    keys: IntArray
    """`(E,)` sorted, `context * V + follower`."""
    followers: IntArray
    """`(E,)` last token of each n-gram."""
    shares: FloatArray
    """`(E+1,)` `c(h, a) / (c(h) + N(h))`."""
    starts: IntArray
    """`(C+1,)` place of a context's first n-gram."""
    lengths: IntArray
    """`(C+1,)` number of a context's n-grams, `N(h)`."""
    backoffs: FloatArray
    """`(C+1,)` `N(h) / (c(h) + N(h))`, the weight of the shorter context."""

    def find(self, contexts: IntArray, tokens: IntArray, vocab_size: int) -> IntArray:
        """Return the numbers of the n-grams `context + token`, -1 for one never seen."""
        wanted = contexts * vocab_size + tokens  # negative, so never found, if the context is -1
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, places, -1)


def count_level(keys: IntArray, n_contexts: int, vocab_size: int) -> tuple[Level, IntArray]:
    """Count the n-grams of one length.

    Args:
        keys: `(P,)` key of the n-gram that starts at each position.
        n_contexts: number of contexts (n-grams one shorter).
        vocab_size: `V`.

    Returns:
        The level, and for each position the number of its n-gram, `(P,)`.
    """
    unique_keys, numbers, counts = _tally(keys, n_contexts * vocab_size)
    contexts, followers = np.divmod(unique_keys, vocab_size)
    lengths = np.bincount(contexts, minlength=n_contexts)
    totals = np.bincount(contexts, weights=counts, minlength=n_contexts) + lengths
    # If nothing follows the text's last tokens, the shorter context has all the weight.
    backoffs = np.divide(lengths, totals, out=np.ones(n_contexts), where=totals > 0)
    level = Level(
        keys=unique_keys,
        followers=followers,
        shares=np.append(counts / totals[contexts], 0.0),
        starts=np.append(np.cumsum(lengths) - lengths, 0),
        lengths=np.append(lengths, 0),
        backoffs=np.append(backoffs, 1.0),
    )
    return level, numbers


def ready_distributions(
    levels: tuple[Level, ...], vocab_size: int, most_cells: int
) -> tuple[FloatArray, list[int]]:
    """Compute the distributions after all contexts of the shortest lengths.

    Args:
        levels: the counts.
        vocab_size: `V`.
        most_cells: most probabilities to compute; those of the empty context always are.

    Returns:
        The distributions, `(contexts of these lengths, V)`, and the first row of each length.
    """
    table = np.full((1, vocab_size), levels[0].backoffs[0] / vocab_size)
    table[0, levels[0].followers] += levels[0].shares[:-1]
    tables, begins, n_rows = [table], [0], 1
    shorter = np.zeros(1, dtype=np.int64)  # the number of each context without its oldest token
    for length in range(1, len(levels)):
        contexts, level = levels[length - 1], levels[length]
        if (n_rows + len(contexts.keys)) * vocab_size > most_cells:
            break
        if length == 1:
            shorter = np.zeros(len(contexts.keys), dtype=np.int64)
        else:
            prefixes = contexts.keys // vocab_size
            shorter = levels[length - 2].find(shorter[prefixes], contexts.followers, vocab_size)
        table = table[shorter] * level.backoffs[:-1, None]
        table.reshape(-1)[level.keys] += level.shares[:-1]  # keys are distinct places
        tables.append(table)
        begins.append(n_rows)
        n_rows += len(table)
    return np.concatenate(tables), begins


def _tally(keys: IntArray, n_keys: int) -> tuple[IntArray, IntArray, IntArray]:
    """Return the distinct keys sorted, the place of each key among them, and their counts."""
    if n_keys > 4 * len(keys):
        return np.unique(keys, return_inverse=True, return_counts=True)
    # Few possible keys (short n-grams): a table is several times faster than sorting.
    counts = np.bincount(keys, minlength=n_keys)
    unique_keys = np.flatnonzero(counts)
    places = np.cumsum(counts > 0) - 1
    return unique_keys, places[keys], counts[unique_keys]
