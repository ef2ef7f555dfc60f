"""GRPO for a character-level language model: one update per call of `GRPOLearner.update`.

The state is the text so far; the action is the next character (horizon 1), or the next H
characters. Deviations from GRPO as published (arXiv 2402.03300), and why:

1. At horizon 1 every position of a window of real text is an episode, and K actions are sampled
   from the same forward: the reward of a single character needs no generation.
2. No old policy by default, so ratios are 1 and nothing is clipped: each batch is used once.
   `sync_every` keeps an old policy.
3. No KL to a reference model by default: training starts from random weights, so there is no model
   to stay close to.
4. No length normalisation and no mask: all episodes of a batch are equally long.
5. The default estimator is `proper_maxrl`, whose optimum is the data distribution; GRPO's sharpens
   the policy until its entropy vanishes. With rewards of 0 and 1 and a single right action, MaxRL's
   gradient is that of cross-entropy at positions where one of the K samples was right, and zero
   elsewhere; `proper_maxrl` adds a sum over all actions of the policy's own probabilities, which
   does not use the text.

`seed_sampled` and `seed_exhaustive` are two older recipes for this task, kept for comparison. They
deviate from their sources:

6. Every position of a window is an episode, not only the last.
7. Partial credit is the bigram probability of the character, which is never negative; the sources
   also used a log-probability.
8. `seed_sampled` adapts its KL coefficient by PPO's rule; the sources have several schedules.
9. `seed_exhaustive` scales advantages by `min((V p)^0.7, 2)`, confidence relative to chance with
   the source's exponent and bound; the source does not document how it combines them. Both are
   settings.
10. The entropy floor is a penalty of `max(0, floor - entropy)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.distributed import ALONE, Ranks, average_gradients
from agents.grpo import losses
from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.estimators import policy_loss
from agents.grpo.optimizer import Optimizer
from agents.grpo.rollouts import Operated, Sampler
from agents.grpo.stats import GRPOStats, Reading, packed, spread, unpacked
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_weights

__all__ = ["GRPOConfig", "GRPOLearner", "GRPOStats", "RegularizerConfig"]


class GRPOLearner:
    """Updates a model on windows of text; with the theater, the only writer of parameters."""

    def __init__(
        self,
        model: GPT,
        tokens: NDArray[np.int64],
        config: GRPOConfig,
        *,
        n_updates: int,
        rng: np.random.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        """Prepare sampler and optimizer.

        Args:
            model: trained in place, on its own device.
            tokens: (n,) the training split.
            config: the settings.
            n_updates: length of the learning-rate schedule.
            rng: draws windows and sampling noise; not shared.
            ranks: the processes that share each batch.

        Raises:
            ValueError: if the text is not longer than the context, the context not longer than the
                horizon, or the batch cannot be split into equal shares.
        """
        self.model = model
        self.config = config
        self.ranks = ranks
        self.n_done = 0
        """Updates so far."""
        self.n_skipped = 0
        """Updates so far without a step, because loss or gradient was not finite."""
        self.n_bad_in_a_row = 0
        """Skipped updates since the last step."""
        self.kl_coefficient = config.regularizer.kl_coefficient
        """Weight of the KL to the bigram model in the next update."""
        self.optimizer = Optimizer(
            model,
            config.optimizer,
            rate=config.learning_rate,
            matrix_rate=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
        )
        self._sampler = Sampler(model, tokens, config, rng, ranks)
        self._n_updates = n_updates

    def update(self, operated: Operated = None) -> GRPOStats:
        """Sample a batch and make one step, or skip the step if loss or gradient is not finite.

        Args:
            operated: a context in which the model is operated on, to sample from the operated
                model. The update is of the unoperated model.

        Raises:
            ValueError: if the estimator or the precision does not allow another policy to sample.
        """
        if operated is not None:
            self.config.check_off_policy("operated must be None", "a context")
        if self.n_done % self.config.sync_every == 0:
            self._sampler.sync()
        reading = self._read(operated)  # sample, reward, advantage, surrogate, regularise
        self.optimizer.zero_grad()
        reading.loss.backward()  # type: ignore[no-untyped-call]
        numbers = packed(reading, self.ranks)
        average_gradients(self.ranks, self.model, numbers)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        factor = schedule(self.n_done, self._n_updates, self.config.warmup_updates)
        stats = GRPOStats(
            **unpacked(numbers, self.ranks),
            grad_norm=norm.item(),
            learning_rate=self.config.learning_rate * factor,
            kl_coefficient=self.kl_coefficient,
        )
        self.n_done += 1
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            # Skip the step: a non-finite gradient would make every parameter NaN.
            self.n_skipped += 1
            self.n_bad_in_a_row += 1
            return stats
        self.n_bad_in_a_row = 0
        self.optimizer.step(factor)
        if target := self.config.regularizer.kl_target:
            self.kl_coefficient = losses.adapted_coefficient(self.kl_coefficient, stats.kl, target)
        return stats

    def _read(self, operated: Operated) -> Reading:
        """Return the regularised loss of a new batch, and the reported figures."""
        batch, reward, accuracy, behavior_kl = self._sampler.sample(operated)
        loss = policy_loss(batch)  # reward, advantage, surrogate
        extra = self.config.regularizer
        entropy_loss = losses.entropy_loss(batch.policy, extra.entropy_bonus, extra.entropy_floor)
        kl = batch.policy.new_zeros(())
        if extra.kl_coefficient:
            kl = losses.kl_divergence(batch.policy, batch.bigrams)
        total = loss.value + entropy_loss + self.kl_coefficient * kl
        with torch.no_grad():
            entropy = losses.entropy(batch.policy)
        figures = reward, accuracy, entropy, kl, behavior_kl
        return Reading(total, *figures, loss.value, entropy_loss, spread(loss))

    @property
    def tokens_per_update(self) -> int:
        """Characters that an update learns from, over all processes."""
        config = self.config
        if config.horizon > 1:
            return config.batch_size * config.group_size * config.horizon
        return config.batch_size * self.model.context

    @property
    def forward_tokens(self) -> int:
        """Compute of all processes so far: 1 per token of a forward, 3 if a backward follows."""
        return self._sampler.forward_tokens

    def model_changed(self) -> None:
        """Update the old policy after an external change of the weights."""
        self._sampler.sync()

    def get_state(self) -> dict[str, Any]:
        """Return counters, optimizer state, random state and old policy; not the weights."""
        old = self._sampler.old
        return {
            "n_done": self.n_done,
            "n_skipped": self.n_skipped,
            "n_bad_in_a_row": self.n_bad_in_a_row,
            "forward_tokens": self.forward_tokens,
            "kl_coefficient": self.kl_coefficient,
            "rng": dict(self._sampler.rng.bit_generator.state),
            "optimizer": self.optimizer.get_state(),
            "old": None if old is None else dict(old.named_parameters()),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore exactly what `get_state` returned."""
        self.n_done, self.n_skipped = state["n_done"], state["n_skipped"]
        self.n_bad_in_a_row = state["n_bad_in_a_row"]
        self.kl_coefficient = state["kl_coefficient"]
        self.optimizer.set_state(state["optimizer"])
        self._sampler.forward_tokens = state["forward_tokens"]
        self._sampler.rng.bit_generator.state = state["rng"]
        if self._sampler.old is not None:
            load_weights(self._sampler.old, state["old"])


def schedule(n_done: int, n_updates: int, warmup_updates: int) -> float:
    """Return the next update's share of the peak rates: linear warm-up times a cosine to 0.1."""
    warm = min(1.0, (n_done + 1) / max(1, warmup_updates))
    progress = min(1.0, n_done / max(1, n_updates))
    return warm * (0.55 + 0.45 * math.cos(math.pi * progress))
