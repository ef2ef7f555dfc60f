"""What a recipe adds to an estimator's loss and reward: entropy, a KL to bigrams, partial credit.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.grpo import objectives
from agents.grpo.config import RegularizerConfig
from avatarl_env.text.ngram import NGramReference


class Regularizer:
    """Adds what `RegularizerConfig` asks for, and adapts the KL term's coefficient."""

    def __init__(
        self, config: RegularizerConfig, tokens: NDArray[np.int64], vocab_size: int
    ) -> None:
        """Count bigrams, where they are needed.

        Args:
            config: what is added.
            tokens: (T,) the training split.
            vocab_size: V.
        """
        self.config = config
        self.kl_coefficient = config.kl_coefficient
        self._bigrams: Tensor | None = None
        if config.kl_coefficient or config.partial_credit:
            self._bigrams = bigram_log_probs(tokens, vocab_size)

    def credit(self, context: Tensor) -> Tensor | None:
        """Return each action's partial credit (N, V) after the characters `context`, if any."""
        if not self.config.partial_credit:
            return None
        return self.config.partial_credit * self._reference(context).exp()

    def entropy_loss(self, log_probs: Tensor) -> Tensor:
        """Return what entropy H adds to a loss, `-bonus H + max(0, floor - H)`, of (..., V)."""
        extra = self.config
        if not (extra.entropy_bonus or extra.entropy_floor):
            return log_probs.new_zeros(())
        entropy = objectives.entropy(log_probs)
        return (extra.entropy_floor - entropy).relu() - extra.entropy_bonus * entropy

    def kl(self, log_probs: Tensor, context: Tensor) -> Tensor:
        """Return the KL from the bigrams, to be weighed by `kl_coefficient`; 0 where that is 0.

        Args:
            log_probs: (N, V) of the policy.
            context: (N,) the characters before.
        """
        if not self.config.kl_coefficient:
            return log_probs.new_zeros(())
        return objectives.kl_divergence(log_probs, self._reference(context))

    def adapt(self, kl: float) -> None:
        """Let the coefficient follow what was measured, nats, if it has a target."""
        if self.config.kl_target:
            self.kl_coefficient = objectives.adapted(self.kl_coefficient, kl, self.config.kl_target)

    def _reference(self, context: Tensor) -> Tensor:
        """Return the bigrams' log-probabilities (N, V) after `context`, on its device."""
        assert self._bigrams is not None
        self._bigrams = self._bigrams.to(context.device)
        return self._bigrams[context]


def bigram_log_probs(tokens: NDArray[np.int64], vocab_size: int) -> Tensor:
    """Return log q(next | last) of a text's bigrams, interpolated Witten-Bell: (V, V)."""
    pairs = np.stack([np.arange(vocab_size)] * 2, axis=1)  # what follows does not count
    bigrams = NGramReference.fit(tokens, vocab_size, 2).next_log_probs(pairs, first=1)
    return torch.from_numpy(bigrams[:, 0])
