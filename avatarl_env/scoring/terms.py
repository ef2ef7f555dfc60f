"""Score terms: named statistics of generated texts. Add one as a row of `TERMS`.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from avatarl_env.scoring.generations import Generations
from avatarl_env.scoring.reference import Array, TextReference, ngram_codes


def kl_ref(generations: Generations, reference: TextReference) -> Array:
    """Return minus the KL divergence from the reference on the model's own text, (B,), nats/char.

    Over the new tokens, `sum_a p(a) (log q(a) - log p(a))`: the whole distribution at each
    position, not only the token drawn. At most 0, and 0 only at `p = q`: loops and gibberish lower
    it. Sharpening lowers it for a model as sharp as the reference, but raises it for a flatter one.

    `kl_ref` rewards damage to a model that is better than its reference: it is highest for a model
    that equals the n-gram, so making a better model worse raises it. Guard it with the held-out
    loss then: `score={"kl_ref": 1, "heldout_loss": 20}`.

    If distributions are not kept, it is `log q - log p` of the tokens drawn: the same on
    average, and above 0 by chance.
    """
    if generations.distributions is None:
        assert generations.log_probs is not None
        log_q = reference.ngram.target_log_probs(generations.tokens, generations.n_prompt)
        return reference.per_character(log_q - generations.log_probs)
    log_q = reference.ngram.next_log_probs(generations.tokens, generations.n_prompt)
    log_p = generations.distributions
    p = np.exp(log_p)
    # Zero where p = 0; a test for "p > 0" would also zero the NaNs.
    gap = p * (log_q - np.where(p == 0, 0.0, log_p))
    return reference.per_character(gap.sum(-1))


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
    """Return the fraction of distinct 4-grams among all 4-grams written, (1,), in (0, 1]."""
    new = generations.new_tokens
    codes = ngram_codes(new, min(4, new.shape[1]), reference.vocab_size)
    return np.array([np.unique(codes).size / codes.size])


def collision_l2(generations: Generations, reference: TextReference) -> Array:
    """Return 1000 times the squared L2 distance of trigram frequencies to real text's, (1,)."""
    return np.array([reference.trigram_distance(generations.new_tokens)])


class Term(NamedTuple):
    """A named statistic of a batch of texts."""

    measure: Callable[[Generations, TextReference], ArrayLike]
    """One value per prompt (B,) or one for the whole batch (1,); the term is the mean."""
    sign: float
    """+1 if more is better, -1 if less is; a positive weight always rewards improvement."""
    by_row: bool = False
    """Whether a row's value depends on that row alone. The measure then gets the texts of many
    operations at once, which is faster, and must return one value per row."""


TERMS: dict[str, Term] = {
    "kl_ref": Term(kl_ref, 1.0, by_row=True),
    "heldout_loss": Term(heldout_loss, -1.0, by_row=True),
    "distinct": Term(distinct, 1.0),
    "collision_l2": Term(collision_l2, -1.0),
    "ref_loglik": Term(ref_loglik, 1.0, by_row=True),
    "entropy": Term(entropy, 1.0, by_row=True),
}
"""Score terms by name; add one with `TERMS["mine"] = Term(measure, sign)`.

An environment measures the terms that are registered when it is made.
"""
