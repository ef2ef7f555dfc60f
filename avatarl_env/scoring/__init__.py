"""Scores of what a model wrote: named terms, their weighted sum, paired improvement.

Nats are per character, whatever the tokens. What a model says about real text is divided by the
characters of that text. What it says about its own is divided by those that as many tokens of the
training text stand for (*characters_per_token*, a constant of the reference): an operation chooses
the tokens it writes, and were it paid by the characters of those, it would be paid for long ones.
With one token per character, both are the mean over tokens.

Shapes: B prompts, P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avatarl_env.errors import check_choice, check_mapping, check_number
from avatarl_env.scoring.reference import Array, TextReference, ngram_codes

BOUND = 1e3
"""Terms are clipped to [-BOUND, BOUND]; what is not a number becomes the bad end."""


@dataclass(frozen=True, eq=False)
class Generations:
    """What a model wrote after B prompts, and how well it read them."""

    tokens: NDArray[np.int64]
    """(B, P + N) prompts and what follows them."""
    n_prompt: int
    """P."""
    distributions: Array | None
    """(B, N, V) all log-probabilities there, nats; None for vocabularies of more than
    `WHOLE_UP_TO` tokens."""
    prompt_loss: Array
    """(B,) teacher-forced loss on the prompt's own tokens from the second on, nats per character of
    theirs."""
    log_probs: Array | None = None
    """(B, N) log-probability of each new token, nats, where distributions are not kept."""
    entropies: Array | None = None
    """(B, N) entropies of the distributions, nats, where they are not kept."""
    prompt_characters: Array | None = None
    """(B,) characters of the prompts from their second token on, on average over the prompts of
    an operation, so that one that decodes to few weighs no more than another; None for one per
    token."""

    @property
    def new_tokens(self) -> NDArray[np.int64]:
        """(B, N) the new tokens alone."""
        return self.tokens[:, self.n_prompt :]

    @property
    def has_no_nan(self) -> bool:
        """Whether every probability and loss is a number (an infinite loss is one)."""
        kept = (self.distributions, self.log_probs, self.entropies, self.prompt_loss)
        return not any(np.isnan(array).any() for array in kept if array is not None)

    def split(self, n: int) -> list[Generations]:
        """Return the writings of n operations with as many rows each; they share memory."""
        columns = []
        for field in fields(self):
            value = getattr(self, field.name)
            columns.append(np.split(value, n) if isinstance(value, np.ndarray) else [value] * n)
        return [Generations(*values) for values in zip(*columns, strict=True)]


def kl_ref(generations: Generations, reference: TextReference) -> Array:
    """Return minus the KL divergence from the reference on the model's own text, (B,), nats/char.

    Over the new tokens, `sum_a p(a) (log q(a) - log p(a))`: the whole distribution at each
    position, not only the token drawn. At most 0, which only `p = q` reaches: loops and
    gibberish lower it. Sharpening lowers it for a model as sharp as the reference, but raises it
    for one that is flatter, so look at the held-out loss too.

    Where distributions are not kept, `log q - log p` of the tokens drawn: the same on average,
    and above 0 by chance.
    """
    if generations.distributions is None:
        assert generations.log_probs is not None
        log_q = reference.ngram.target_log_probs(generations.tokens, generations.n_prompt)
        return reference.per_character(log_q - generations.log_probs)
    log_q = reference.ngram.next_log_probs(generations.tokens, generations.n_prompt)
    log_p = generations.distributions
    p = np.exp(log_p)
    # Nothing where p = 0; "p > 0" would take what is not a number for nothing too.
    gap = p * (log_q - np.where(p == 0, 0.0, log_p))
    return reference.per_character(gap.sum(-1))


def reference_prompt_loss(generations: Generations, reference: TextReference) -> Array:
    """Return the reference's own loss on the prompts, comparable to `prompt_loss`: (B,)."""
    prompts = generations.tokens[:, : generations.n_prompt]
    nats = -reference.ngram.target_log_probs(prompts, 1).sum(-1, dtype=np.float64)
    given = generations.prompt_characters
    return np.asarray(nats / (generations.n_prompt - 1 if given is None else given))


def heldout_loss(generations: Generations, reference: TextReference) -> Array:
    """Return the teacher-forced loss on the prompts, real held-out text: (B,), nats/char."""
    return generations.prompt_loss


def ref_loglik(generations: Generations, reference: TextReference) -> Array:
    """Return the mean log-likelihood of the new tokens under the reference: (B,), nats/char.

    Hackable: loops of common words score above real text. For comparison only.
    """
    log_q = reference.ngram.target_log_probs(generations.tokens, generations.n_prompt)
    return reference.per_character(log_q)


def entropy(generations: Generations, reference: TextReference) -> Array:
    """Return the mean entropy of the model's own distributions: (B,), nats/char."""
    if generations.distributions is None:
        assert generations.entropies is not None
        return reference.per_character(generations.entropies)
    log_p = generations.distributions
    p = np.exp(log_p)
    return reference.per_character(-(p * np.where(p == 0, 0.0, log_p)).sum(-1))


def distinct(generations: Generations, reference: TextReference) -> Array:
    """Return the share of distinct 4-grams among all 4-grams written, (1,), in (0, 1]."""
    new = generations.new_tokens
    codes = ngram_codes(new, min(4, new.shape[1]), reference.vocab_size)
    return np.array([np.unique(codes).size / codes.size])


def collision_l2(generations: Generations, reference: TextReference) -> Array:
    """Return 1000 times the squared L2 distance of trigram frequencies to real text's, (1,)."""
    return np.array([reference.trigram_distance(generations.new_tokens)])


class Term(NamedTuple):
    """A named property of a batch of texts."""

    measure: Callable[[Generations, TextReference], ArrayLike]
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
"""Score terms by name; add one with `TERMS["mine"] = Term(measure, sign)`.

An environment knows those that there are when it is made.
"""

DEFAULT_WEIGHTS: Mapping[str, float] = {"kl_ref": 1.0}

GRID = 2.0**32
"""Scores are multiples of 1 / GRID, so that differences and sums of them have no rounding."""


class Score:
    """A weighted sum of terms, fixed for life: whatever becomes of `TERMS` later."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """Choose the weights.

        Args:
            weights: by term name; default `{"kl_ref": 1.0}`.

        Raises:
            ValueError: if a name is unknown (names the closest) or a weight is not a number of at
                most 1e6.
        """
        chosen = check_mapping("score", DEFAULT_WEIGHTS if weights is None else weights)
        if not chosen:
            raise ValueError("score must weigh at least one term, got none")
        for name in chosen:
            check_choice("score", name, TERMS)
        self.weights = {name: check_number(f"score[{name!r}]", w) for name, w in chosen.items()}
        self._signed = {name: w * TERMS[name].sign for name, w in self.weights.items()}

    def __call__(self, terms: Mapping[str, float]) -> float:
        """Return the weighted sum; more is better."""
        total = sum(weight * terms[name] for name, weight in self._signed.items())
        return round(total * GRID) / GRID


def measure_terms(
    generations: Generations, reference: TextReference, terms: Mapping[str, Term] | None = None
) -> dict[str, float]:
    """Measure the texts of one operation, as `measure_many` does."""
    ((_, values),) = measure_many(generations, reference, 1, terms)
    return values


def measure_many(
    generations: Generations,
    reference: TextReference,
    n: int,
    terms: Mapping[str, Term] | None = None,
) -> list[tuple[Generations, dict[str, float]]]:
    """Measure the texts of n operations: each one's generations, and its terms.

    The terms are finite whatever the model did, and those of each operation alone to the last bit.

    Args:
        generations: as many texts of each operation, one after the other.
        reference: what they are held against.
        n: operations.
        terms: what to measure, by name; default `TERMS`.

    Raises:
        ValueError: if a term's measure returns something of another shape than it should.
    """
    terms = TERMS if terms is None else terms
    measured = []
    with np.errstate(invalid="ignore", over="ignore"):
        # What goes row by row is faster for all rows at once.
        rows = {
            name: np.split(_values(name, term, generations, reference), n)
            for name, term in terms.items()
            if term.by_row
        }
        for i, part in enumerate(generations.split(n)):
            values = {
                name: rows[name][i] if term.by_row else _values(name, term, part, reference)
                for name, term in terms.items()
            }
            measured.append((part, {name: _mean(terms[name], values[name]) for name in terms}))
    return measured


def _values(name: str, term: Term, generations: Generations, reference: TextReference) -> Array:
    """Let a term measure, and check what it returns: (B,), or (1,) if it does not go by row."""
    n_rows = len(generations.tokens)
    shapes = [(n_rows,)] if term.by_row else [(n_rows,), (1,)]
    rule = f"score term {name!r} must return numbers of shape {' or '.join(map(str, shapes))}"
    found = term.measure(generations, reference)
    try:
        values = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}, got {type(found).__name__}: {error}") from error
    if values.shape not in shapes:
        raise ValueError(f"{rule}, got {type(found).__name__} of shape {values.shape}")
    return values


def _mean(term: Term, values: Array) -> float:
    """Return a term's mean, clipped; if it is not a number, the bad end."""
    mean = float(np.mean(values))
    return -term.sign * BOUND if math.isnan(mean) else min(max(mean, -BOUND), BOUND)
