"""Scores of texts that a model wrote: named terms and their weighted sum.

Nats are per character, not per token. A loss on real text is divided by the characters of
that text. A statistic of the model's own text is divided by the number of characters that the same
number of tokens has in the training text, a constant of the reference: dividing by the characters
written would reward an operation for choosing long tokens. With one token per character both are
the mean over tokens.
"""

from __future__ import annotations

from avatarl_env.scoring.generations import Generations
from avatarl_env.scoring.reference import TextReference
from avatarl_env.scoring.score import BOUND, DEFAULT_WEIGHTS, Score, measure_many
from avatarl_env.scoring.terms import TERMS, Term, kl_ref

__all__ = [
    "BOUND",
    "DEFAULT_WEIGHTS",
    "TERMS",
    "Generations",
    "Score",
    "Term",
    "TextReference",
    "kl_ref",
    "measure_many",
]
