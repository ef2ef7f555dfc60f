"""A warning when a model has overtaken the reference that its texts are held against.

`kl_ref` is highest for a model that equals its reference. One that predicts real text better is
pulled back by it, so it should be scored by its held-out loss then.
"""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
from numpy.typing import NDArray

N_ERRORS = 5.0
"""Standard errors that the lead must exceed, since the comparison is made again and again."""
MIN_TEXTS = 32
MOST_TEXTS = 2**16
"""Texts after which a lead that did not show is not looked for any more."""

_NOT_CALLERS = ("avatarl_env", "gymnasium")


class OvertakenWarning(UserWarning):
    """The model predicts real text better than the reference of its score."""


class Race:
    """The model's loss on real text against the reference's, text by text.

    Evidence adds up until the model changes; a text that was seen before is no more of it. The
    comparison is on the prompts that are drawn anyway, in which both have the same short history.
    """

    def __init__(self) -> None:
        """Begin without evidence."""
        self.has_warned = False
        self._begin(0)

    def _begin(self, n_changes: int) -> None:
        self._n_changes = n_changes
        self._seen: set[int] = set()  # hashes of texts
        self._n, self._sum, self._squares = 0, 0.0, 0.0  # of leads

    def watch(
        self,
        tokens: NDArray[np.int64],
        model_loss: NDArray[np.float64],
        reference_loss: NDArray[np.float64],
        n_changes: int,
    ) -> None:
        """Take note of losses on the same texts; warn, once, if the model is surely ahead.

        The mean lead must be above `N_ERRORS` of its standard errors, over at least
        `MIN_TEXTS` texts.

        Args:
            tokens: (B, T) the texts.
            model_loss: (B,) nats per character.
            reference_loss: (B,) the same of the reference.
            n_changes: how often the model has changed; evidence from before is dropped.
        """
        if self.has_warned:
            return
        if n_changes != self._n_changes:
            self._begin(n_changes)
        if self._n >= MOST_TEXTS:
            return
        leads = (reference_loss - model_loss)[self._new(tokens)]
        self._n += len(leads)
        self._sum += float(leads.sum())
        self._squares += float(np.square(leads).sum())
        if self._n < MIN_TEXTS:
            return
        mean = self._sum / self._n
        variance = (self._squares - self._n * mean**2) / (self._n - 1)
        if mean > N_ERRORS * math.sqrt(max(variance, 0.0) / self._n):  # never, if it is no number
            self.has_warned = True
            warnings.warn(
                f"the model predicts real text better than its n-gram reference, by {mean:.3f} "
                f"nats per character on {self._n} prompts: kl_ref would make it worse; score it "
                "by its loss, score={'heldout_loss': 1.0}",
                OvertakenWarning,
                stacklevel=_caller(),
            )

    def _new(self, tokens: NDArray[np.int64]) -> list[int]:
        """Return the rows of texts that were not seen before, and remember them."""
        rows = []
        for row, text in enumerate(tokens):
            key = hash(text.tobytes())
            if key not in self._seen:
                self._seen.add(key)
                rows.append(row)
        return rows


def _caller() -> int:
    """Return the stacklevel, for a warning by who calls this, of the first line that is not ours.

    (Python 3.12 has `skip_file_prefixes` for that.)
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_CALLERS:
            break
        level, frame = level + 1, frame.f_back
    return level
