"""Paired measurements of the effect of operations on unseen text.

There are two measures, both positive for a good operation, because one alone can mislead:
sharpening the model raises `kl_ref` but worsens the held-out loss.

Shapes: N operations, M prompts and as many windows for each, A coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.evaluation.statistics import Interval, interval
from avatarl_env.episode import EpisodeConfig
from avatarl_env.patient import Patient
from avatarl_env.scoring import Score, kl_ref
from avatarl_env.surgery import Operator

Array = NDArray[np.float64]


class Gains(NamedTuple):
    """Paired differences between the operated and the unoperated model."""

    kl_ref_gain: Array
    """(N, M) rise of `kl_ref` on the model's own texts, for each prompt, nats per character."""
    heldout_loss_fall: Array
    """(N, M) fall of the teacher-forced loss, for each window of real text, nats per character."""
    score_gain: Array
    """(N,) rise of the surgeon's score, over all M texts together."""


class PairedResult(NamedTuple):
    """Means over prompts and windows, with their confidence intervals."""

    kl_ref_gain: Interval
    heldout_loss_fall: Interval

    @property
    def is_improvement(self) -> bool:
        """Whether both one-sided 95 % lower bounds are above zero."""
        return self.kl_ref_gain.lower_bound > 0 and self.heldout_loss_fall.lower_bound > 0


class PairedEvaluation:
    """Fresh prompts and windows for each of N operations, and the unoperated model's results."""

    def __init__(
        self,
        patient: Patient,
        config: EpisodeConfig,
        *,
        split: str,
        n_operations: int,
        n_each: int,
        rng: np.random.Generator,
        score: Score | None = None,
    ) -> None:
        """Draw prompts and windows, and measure the unoperated model.

        Args:
            patient: the model.
            config: lengths of prompts and texts.
            split: of the text, source of prompts and windows.
            n_operations: N.
            n_each: M.
            rng: draws prompts and windows.
            score: the surgeon's; default `kl_ref`.
        """
        self._patient = patient
        self._score = score or Score()
        sizes = (n_each, config.prompt_length, config.n_new)
        self._prompts = [patient.prompts(split, *sizes, rng) for _ in range(n_operations)]
        length = patient.model.context + 1
        windows = patient.windows(split, n_operations * n_each, length, rng)
        self._windows = windows.reshape(n_operations, n_each, length)
        self._written, self._scores = self._write(None, ())
        self._loss = patient.losses(self._windows)

    def gains(self, operator: Operator, coefficients: Array) -> Gains:
        """Measure N operations, each on its own prompts and windows, and undo them.

        Args:
            operator: turns coefficients into edits.
            coefficients: (N, A).
        """
        if not coefficients.any():  # the exact identity
            return Gains(*map(np.zeros_like, (self._written, self._loss, self._scores)))
        written, scores = self._write(operator, coefficients)
        loss = self._patient.losses(self._windows, operator, coefficients)
        return Gains(written - self._written, self._loss - loss, scores - self._scores)

    def _write(
        self, operator: Operator | None, coefficients: Array | tuple[()]
    ) -> tuple[Array, Array]:
        """Return `kl_ref` of every text, (N, M), and the score of each operation, (N,)."""
        evaluations = self._patient.evaluate_many(self._prompts, operator, coefficients)
        kl = np.stack([kl_ref(e.generations, self._patient.reference) for e in evaluations])
        return kl, np.array([self._score(e.terms) for e in evaluations])


def compare_pairs(
    patient: Patient,
    operator: Operator,
    coefficients: Array,
    config: EpisodeConfig,
    *,
    n_prompts: int,
    rng: np.random.Generator,
) -> PairedResult:
    """Measure one operation on fresh prompts of the `surgeon` split.

    Args:
        patient: the model.
        operator: turns coefficients into edits.
        coefficients: (A,).
        config: lengths of prompts and texts.
        n_prompts: prompts, and as many windows.
        rng: draws them.
    """
    pairs = PairedEvaluation(
        patient, config, split="surgeon", n_operations=1, n_each=n_prompts, rng=rng
    )
    gains = pairs.gains(operator, coefficients[None])
    return PairedResult(interval(gains.kl_ref_gain[0]), interval(gains.heldout_loss_fall[0]))
