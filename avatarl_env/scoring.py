"""Scores of what a model wrote: named terms, their weighted sum, paired improvement.

Nats are per decoded character, whatever the tokens: total nats over total characters of an
operation's texts. Each row's nats are divided by the characters that its operation's rows have on
average (*pooled*), so that the mean over rows is that ratio, and a text that decodes to few
characters weighs no more than another. With one token per character, that is the mean over tokens.

Shapes: B prompts, P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatarl_env.choices import check_choice
from avatarl_env.text.ngram import NGramReference

Array = NDArray[np.float64]

BOUND = 1e3
"""Terms are clipped to [-BOUND, BOUND]; what is not a number becomes the bad end."""

MOST_TOKENS = 2**21
"""Largest vocabulary that texts can be scored in."""


@dataclass(frozen=True, eq=False)
class Writing:
    """What a model wrote after B prompts, and how well it read them."""

    tokens: NDArray[np.int64]
    """(B, P + N) prompts and what follows them."""
    n_prompt: int
    """P."""
    distributions: Array | None
    """(B, N, V) all log-probabilities there, nats; None for vocabularies over 256."""
    prompt_loss: Array
    """(B,) teacher-forced loss on the prompt's own tokens from the second on, nats per character of
    theirs."""
    log_probs: Array | None = None
    """(B, N) log-probability of each new token, nats, where distributions are not kept."""
    entropies: Array | None = None
    """(B, N) entropies of the distributions, nats, where they are not kept."""
    pooled: Array | None = None
    """(B,) characters of each new text, pooled; None for one per token."""
    pooled_prompt: Array | None = None
    """(B,) characters of each prompt from its second token on, pooled; None for one per token."""

    @property
    def new_tokens(self) -> NDArray[np.int64]:
        """(B, N) the new tokens alone."""
        return self.tokens[:, self.n_prompt :]

    @property
    def is_finite(self) -> bool:
        """Whether every probability and loss is a number."""
        kept = (self.distributions, self.log_probs, self.entropies, self.prompt_loss)
        return not any(np.isnan(array).any() for array in kept if array is not None)

    def per_character(self, nats: NDArray[np.floating]) -> Array:
        """Return nats per character of new text, (B,), from those of every new token (B, N)."""
        total = nats.sum(-1, dtype=np.float64)
        return np.asarray(total / (nats.shape[-1] if self.pooled is None else self.pooled))

    def split(self, n: int) -> list[Writing]:
        """Return the writings of n operations with as many rows each; they share memory."""
        columns = []
        for field in fields(self):
            value = getattr(self, field.name)
            columns.append(np.split(value, n) if isinstance(value, np.ndarray) else [value] * n)
        return [Writing(*values) for values in zip(*columns, strict=True)]


class TextReference:
    """What honest text looks like: an n-gram model and trigram frequencies of the training text."""

    def __init__(self, tokens: NDArray[np.int64], vocab_size: int, order: int = 5) -> None:
        """Count.

        Args:
            tokens: (T,) the training text, T >= max(order, 4).
            vocab_size: V, at most 2**21, so that a trigram's number fits 63 bits.
            order: of the n-gram model.

        Raises:
            ValueError: if the vocabulary is larger, or the text shorter.
        """
        if vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS}, got {vocab_size}")
        if len(tokens) < max(order, 4):
            raise ValueError(f"tokens must be at least {max(order, 4)} to count, got {len(tokens)}")
        self.ngram = NGramReference.fit(tokens, vocab_size, order)
        self.vocab_size = vocab_size
        self._codes, counts = np.unique(_codes(tokens[None], 3, vocab_size), return_counts=True)
        self._frequencies = counts / counts.sum()
        self._self_collision = float((self._frequencies**2).sum())

    def trigram_distance(self, tokens: NDArray[np.int64]) -> float:
        """Return 1000 times the unbiased squared L2 distance of trigram frequencies.

        ``sum_g n_g (n_g - 1) / (n (n - 1)) - 2 sum_g (n_g / n) q_g + sum_g q_g^2``, a U-statistic:
        0 on average for text like the reference whatever its length, about 100 for a loop of ten
        trigrams.

        Args:
            tokens: (B, N) rows; trigrams do not cross rows. N >= 3, at least two trigrams.
        """
        codes, counts = np.unique(_codes(tokens, 3, self.vocab_size), return_counts=True)
        n = counts.sum()
        place = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        expected = np.where(self._codes[place] == codes, self._frequencies[place], 0.0)
        collisions = (counts * (counts - 1)).sum() / (n * (n - 1))
        cross = (counts * expected).sum() / n
        return float(1e3 * (collisions - 2 * cross + self._self_collision))


def kl_ref(writing: Writing, reference: TextReference) -> Array:
    """Return minus the KL divergence from the reference on the model's own text, (B,), nats/char.

    Over the new tokens, ``sum_a p(a) (log q(a) - log p(a))``: the whole distribution at each
    position, not only the token drawn. At most 0, which only ``p = q`` reaches: loops and
    gibberish lower it. Sharpening lowers it for a model as sharp as the reference, but raises it
    for one that is flatter, so look at the held-out loss too.

    For vocabularies over 256, ``log q - log p`` of the tokens drawn: the same on average, and above
    0 by chance.
    """
    if writing.distributions is None:
        assert writing.log_probs is not None
        log_q = reference.ngram.target_log_probs(writing.tokens, writing.n_prompt)
        return writing.per_character(log_q - writing.log_probs)
    log_q = reference.ngram.next_log_probs(writing.tokens, writing.n_prompt)
    log_p = writing.distributions
    p = np.exp(log_p)
    # Nothing where p = 0; "p > 0" would take what is not a number for nothing too.
    gap = p * (log_q - np.where(p == 0, 0.0, log_p))
    return writing.per_character(gap.sum(-1))


def reference_prompt_loss(writing: Writing, reference: TextReference) -> Array:
    """Return the reference's own loss on the prompts, comparable to ``prompt_loss``: (B,)."""
    prompts = writing.tokens[:, : writing.n_prompt]
    nats = -reference.ngram.target_log_probs(prompts, 1).sum(-1, dtype=np.float64)
    characters = writing.n_prompt - 1 if writing.pooled_prompt is None else writing.pooled_prompt
    return np.asarray(nats / characters)


def heldout_loss(writing: Writing, reference: TextReference) -> Array:
    """Return the teacher-forced loss on the prompts, real held-out text: (B,), nats/char."""
    return writing.prompt_loss


def ref_loglik(writing: Writing, reference: TextReference) -> Array:
    """Return the mean log-likelihood of the new tokens under the reference: (B,), nats/char.

    Hackable: loops of common words score above real text. For comparison only.
    """
    log_q = reference.ngram.target_log_probs(writing.tokens, writing.n_prompt)
    return writing.per_character(log_q)


def entropy(writing: Writing, reference: TextReference) -> Array:
    """Return the mean entropy of the model's own distributions: (B,), nats/char."""
    if writing.distributions is None:
        assert writing.entropies is not None
        return writing.per_character(writing.entropies)
    log_p = writing.distributions
    p = np.exp(log_p)
    return writing.per_character(-(p * np.where(p == 0, 0.0, log_p)).sum(-1))


def distinct(writing: Writing, reference: TextReference) -> Array:
    """Return the share of distinct 4-grams among all 4-grams written, (1,), in (0, 1]."""
    codes = _codes(writing.new_tokens, min(4, writing.new_tokens.shape[1]), reference.vocab_size)
    return np.array([np.unique(codes).size / codes.size])


def collision_l2(writing: Writing, reference: TextReference) -> Array:
    """Return 1000 times the squared L2 distance of trigram frequencies to real text's, (1,)."""
    return np.array([reference.trigram_distance(writing.new_tokens)])


class Term(NamedTuple):
    """A named property of a batch of texts."""

    measure: Callable[[Writing, TextReference], Array]
    """Per prompt (B,) or for the whole batch (1,); the term is the mean."""
    sign: float
    """+1 if more is better, -1 if less is: a positive weight always rewards the better."""
    by_row: bool = False
    """Whether a row's value depends on that row alone: then it may be given the texts of many
    operations at once, which is faster, and has to return one value for each."""


TERMS: dict[str, Term] = {
    "kl_ref": Term(kl_ref, 1.0, by_row=True),
    "heldout_loss": Term(heldout_loss, -1.0, by_row=True),
    "distinct": Term(distinct, 1.0),
    "collision_l2": Term(collision_l2, -1.0),
    "ref_loglik": Term(ref_loglik, 1.0, by_row=True),
    "entropy": Term(entropy, 1.0, by_row=True),
}
"""Score terms by name; add one with ``TERMS["mine"] = Term(measure, sign)``."""

DEFAULT_WEIGHTS: Mapping[str, float] = {"kl_ref": 1.0}

GRID = 2.0**32
"""Scores are multiples of 1 / GRID, so that differences and sums of them have no rounding."""


class Score:
    """A weighted sum of terms, fixed for life."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """Choose the weights.

        Args:
            weights: by term name; default ``{"kl_ref": 1.0}``.

        Raises:
            ValueError: if a name is unknown (names the closest) or a weight is not finite.
        """
        chosen = DEFAULT_WEIGHTS if weights is None else weights
        if not chosen:
            raise ValueError("score must weigh at least one term, got none")
        for name, weight in chosen.items():
            check_choice("score", name, TERMS)
            if not math.isfinite(weight):
                raise ValueError(f"score weights must be finite, got {name}={weight}")
        self.weights = {name: float(weight) for name, weight in chosen.items()}

    def __call__(self, terms: Mapping[str, float]) -> float:
        """Return the weighted sum; more is better."""
        total = sum(w * TERMS[name].sign * terms[name] for name, w in self.weights.items())
        return round(total * GRID) / GRID


def measure_terms(
    writing: Writing, reference: TextReference, known: Mapping[str, Array] | None = None
) -> dict[str, float]:
    """Return every term of :data:`TERMS`, finite whatever the model did.

    Args:
        writing: the texts of one operation.
        reference: what they are held against.
        known: values of terms that were measured before, by name, as :func:`measure_rows` does.
    """
    known = known or {}
    terms = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for name, term in TERMS.items():
            values = known[name] if name in known else term.measure(writing, reference)
            value = float(np.mean(values))
            bad = -term.sign * BOUND
            terms[name] = bad if math.isnan(value) else min(max(value, -BOUND), BOUND)
    return terms


def measure_rows(writing: Writing, reference: TextReference) -> dict[str, Array]:
    """Measure the terms that go row by row, for the texts of many operations: (B,) each."""
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            name: term.measure(writing, reference) for name, term in TERMS.items() if term.by_row
        }


class Interval(NamedTuple):
    """A mean of independent differences and how sure it is (Student's t)."""

    mean: float
    low: float
    """Lower end of the two-sided 95 % interval."""
    high: float
    """Upper end of it."""
    lower_bound: float
    """One-sided 95 % lower bound."""
    n: int
    """Differences."""


def interval(differences: NDArray[np.floating]) -> Interval:
    """Return the mean of paired differences with its 95 % intervals.

    Args:
        differences: (n,) independent, n >= 2.

    Raises:
        ValueError: if there are fewer than two.
    """
    from scipy.special import stdtrit

    n = len(differences)
    if n < 2:
        raise ValueError(f"differences must be at least two, got {n}")
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    two_sided, one_sided = (float(stdtrit(n - 1, level)) * error for level in (0.975, 0.95))
    return Interval(mean, mean - two_sided, mean + two_sided, mean - one_sided, n)


def _codes(tokens: NDArray[np.int64], n: int, vocab_size: int) -> NDArray[np.int64]:
    """Number every n-gram of every row: (B * (N - n + 1),).

    Equal n-grams have equal numbers; in other calls too, if the vocabulary is at most
    ``2**(63 // n)``.
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
