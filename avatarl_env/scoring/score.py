"""The score: a weighted sum of terms, and the measuring of terms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from avatarl_env.errors import check_choice, check_mapping, check_number
from avatarl_env.scoring.generations import Generations
from avatarl_env.scoring.reference import Array, TextReference
from avatarl_env.scoring.terms import TERMS, Term

BOUND = 1e3
"""Terms are clipped to [-BOUND, BOUND]; NaN becomes the bad end."""
DEFAULT_WEIGHTS: Mapping[str, float] = {"kl_ref": 1.0}
GRID = 2.0**32
"""Scores are multiples of 1 / GRID, so that their differences and sums are exact."""


class Score:
    """A weighted sum of terms, fixed for life: later changes of `TERMS` do not alter it."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """Choose the weights.

        Args:
            weights: by term name; default `{"kl_ref": 1.0}`.

        Raises:
            ValueError: if a name is unknown (the message offers the closest) or a weight is not a
                number in [-1e6, 1e6].
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


def measure_many(
    generations: Generations,
    reference: TextReference,
    n: int = 1,
    terms: Mapping[str, Term] | None = None,
) -> list[tuple[Generations, dict[str, float]]]:
    """Return each of n operations' generations and terms.

    Terms are always finite, and equal those of each operation measured alone to the last bit.

    Args:
        generations: equal numbers of texts of each operation, one operation after the other.
        reference: compared with the texts.
        n: number of operations.
        terms: terms to measure, by name; default `TERMS`.

    Raises:
        ValueError: if a term's measure returns values of the wrong shape.
    """
    terms = TERMS if terms is None else terms
    measured = []
    with np.errstate(invalid="ignore", over="ignore"):
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
    """Return a term's values, checked: (B,), or (1,) if it is not by row."""
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
    """Return a term's mean, clipped; NaN becomes the bad end."""
    mean = float(np.mean(values))
    return -term.sign * BOUND if math.isnan(mean) else min(max(mean, -BOUND), BOUND)
