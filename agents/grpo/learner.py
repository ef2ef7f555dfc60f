"""The learner: one update of the language model per call.

Shapes: B windows, T characters, N = B * T positions, K actions each, V vocabulary; or B prompts,
K texts of H characters each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.distributed import ALONE, Ranks, average_gradients
from agents.grpo import objectives
from agents.grpo.config import PRECISIONS, GRPOConfig, RegularizerConfig
from agents.grpo.estimators import (
    ESTIMATORS,
    SAMPLED,
    Lesson,
    Question,
    closed_form,
    sampled_loss,
)
from agents.grpo.optimizer import Optimizer
from agents.grpo.regularizer import Regularizer
from agents.grpo.rewards import within
from agents.grpo.rollouts import prompt_length, roll_out
from agents.grpo.stats import GRPOStats, Reading, packed, spread, unpacked
from avatarl_env.lm.cuda_graphs import GraphedGeneration
from avatarl_env.lm.generation import inverse_cdf
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_weights
from avatarl_env.text.ngram import NGramReference

__all__ = ["PRECISIONS", "GRPOConfig", "GRPOLearner", "GRPOStats", "RegularizerConfig"]

TRAINING_COST = 3  # a forward and backward costs about as much as three forwards


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
        """Prepare the optimizer.

        Args:
            model: trained in place, on its own device.
            tokens: (T,) the training split.
            config: the recipe.
            n_updates: length of the learning-rate schedule.
            rng: draws windows and actions; nothing else does.
            ranks: the processes that share each batch.

        Raises:
            ValueError: if the text is not longer than the context, the context not longer than the
                horizon, or the processes cannot have equal shares of a batch.
        """
        if len(tokens) <= model.context:
            raise ValueError(
                f"context must be less than {len(tokens)} (train), got {model.context}"
            )
        if config.batch_size % ranks.count:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {ranks.count}, "
                f"got {config.batch_size}"
            )
        self.model = model
        self.config = config
        self.ranks = ranks
        self.n_done = 0
        """Updates so far."""
        self.n_skipped = 0
        """Of these, updates whose loss or gradient was not finite: no step was made."""
        self.n_bad_in_a_row = 0
        """Of these, the latest without a good one since."""
        self.forward_tokens = 0
        """Compute so far: 1 for each token of a forward, 3 where a backward follows."""
        self.regularizer = Regularizer(config.regularizer, tokens, model.vocab_size)
        self.optimizer = Optimizer(
            model,
            config.optimizer,
            rate=config.learning_rate,
            matrix_rate=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
        )
        self._tokens = tokens
        self._n_updates = n_updates
        self._rng = rng
        self._write = GraphedGeneration()
        self._old: GPT | None = copy.deepcopy(model) if config.sync_every > 1 else None
        self._reference: NGramReference | None = None
        self._n_prompt = 0
        if config.horizon > 1:
            self._n_prompt = prompt_length(model.context, config.horizon)
            self._reference = NGramReference.fit(tokens, model.vocab_size)

    @property
    def tokens_per_update(self) -> int:
        """Characters of one batch, of all processes, that are learned from: N, or all texts'."""
        config = self.config
        if config.horizon > 1:
            return config.batch_size * config.group_size * config.horizon
        return config.batch_size * self.model.context

    def learning_rate(self) -> float:
        """Return AdamW's rate of the next update; Muon's has the same schedule."""
        return self.config.learning_rate * self._schedule()

    def update(self, operated: AbstractContextManager[object] | None = None) -> GRPOStats:
        """Read a batch, sample actions, reward them, step.

        Args:
            operated: a context in which the model is operated on: there the actions are sampled,
                by what the model then is. The update is on the model as it stands outside.

        Raises:
            ValueError: if others may not sample for the estimator, or not in this precision.
        """
        if operated is not None:
            self.config.check_off_policy("operated must be None", "a context")
        rate, factor = self.learning_rate(), self._schedule()
        self._sync()
        read = self._read_positions if self.config.horizon == 1 else self._read_rollouts
        reading = read(operated)
        self.optimizer.zero_grad()
        reading.loss.backward()  # type: ignore[no-untyped-call]
        numbers = packed(reading, self.ranks)
        average_gradients(self.ranks, self.model, numbers)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        stats = GRPOStats(
            **unpacked(numbers, self.ranks),
            grad_norm=norm.item(),
            learning_rate=rate,
            kl_coefficient=self.regularizer.kl_coefficient,
        )
        # A step along what is no number would leave no number anywhere.
        if math.isfinite(stats.loss) and math.isfinite(stats.grad_norm):
            self.optimizer.schedule(factor)
            self.optimizer.step()
            self.regularizer.adapt(stats.kl)
            self.n_bad_in_a_row = 0
        else:
            self.n_skipped += 1
            self.n_bad_in_a_row += 1
        self.n_done += 1
        return stats

    def model_changed(self) -> None:
        """Take note that somebody else wrote the model: the old policy is what it now is."""
        if self._old is not None:
            self._old.load_state_dict(self.model.state_dict())

    def get_state(self) -> dict[str, Any]:
        """Return the optimizer's state, the counters and the dice; the weights are the model's."""
        return {
            "n_done": self.n_done,
            "n_skipped": self.n_skipped,
            "n_bad_in_a_row": self.n_bad_in_a_row,
            "forward_tokens": self.forward_tokens,
            "kl_coefficient": self.regularizer.kl_coefficient,
            "rng": dict(self._rng.bit_generator.state),
            "optimizer": self.optimizer.get_state(self._names),
            "old": None if self._old is None else dict(self._old.named_parameters()),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from what `get_state` returned."""
        self.n_done, self.n_skipped = state["n_done"], state["n_skipped"]
        self.n_bad_in_a_row = state["n_bad_in_a_row"]
        self.forward_tokens = state["forward_tokens"]
        self.regularizer.kl_coefficient = state["kl_coefficient"]
        self._rng.bit_generator.state = state["rng"]
        self.optimizer.set_state(state["optimizer"], self._names)
        if self._old is not None:
            load_weights(self._old, state["old"])

    def _read_positions(self, operated: AbstractContextManager[object] | None) -> Reading:
        """Take every position of a batch of windows for an episode of one character."""
        config, estimator = self.config, ESTIMATORS[self.config.estimator]
        inputs, targets = self._batch()  # (B, T), (N,)
        context = inputs.flatten()
        # Before the forward to be learned from: a theater that opens after it voids its graph.
        behavior = self._behavior(inputs, operated)
        log_probs = self._log_probs(inputs)  # (N, V)
        self._spend(TRAINING_COST * targets.numel())
        question = Question(
            log_probs,
            targets,
            config.group_size,
            self.regularizer.credit(context),
            config.regularizer.reward_clip,
            config.regularizer.confidence_power,
            config.regularizer.confidence_clip,
        )
        if config.exploration == SAMPLED:
            assert estimator.sampled is not None
            sampler = log_probs.detach() if behavior is None else behavior
            actions = self._sample(sampler)  # (N, K)
            bounds = config.clip, config.clip_high
            lesson = sampled_loss(estimator.sampled, question, actions, sampler, *bounds)
        else:
            lesson = closed_form(estimator, question)
        entropy_loss = self.regularizer.entropy_loss(log_probs)
        kl = self.regularizer.kl(log_probs, context)
        loss = lesson.loss + entropy_loss + self.regularizer.kl_coefficient * kl
        with torch.no_grad():
            right = log_probs.gather(1, targets[:, None]).exp().mean()
            accuracy = (log_probs.argmax(1) == targets).float().mean()
            distance = torch.zeros_like(loss)
            if behavior is not None:
                distance = objectives.kl_divergence(behavior, log_probs)
            means = right, accuracy, objectives.entropy(log_probs), kl, distance
            return Reading(loss, *means, lesson.loss, entropy_loss, spread(lesson))

    def _read_rollouts(self, operated: AbstractContextManager[object] | None) -> Reading:
        """Let the behaviour policy write K texts after each prompt; learn from them."""
        config, sampling = self.config, ESTIMATORS[self.config.estimator].sampled
        assert sampling is not None
        assert self._reference is not None
        windows = self._windows(self._n_prompt + config.horizon)
        uniforms = self._uniforms(config.batch_size, config.group_size, config.horizon)
        with operated or nullcontext():
            rollouts = roll_out(
                self._old if self._old is not None and operated is None else self.model,
                windows,
                uniforms,
                self._reference,
                temperature=config.temperature,
                match_bonus=config.match_bonus,
                write=self._write,
            )
        texts = rollouts.tokens
        n_read = texts[:, 1:].numel()
        self._spend((1 + TRAINING_COST) * n_read)  # written once, read once
        log_probs = self._log_probs(texts[:, :-1]).view(len(texts), -1, self.model.vocab_size)
        log_probs = log_probs[:, -config.horizon :]  # (B * K, H, V)
        taken = log_probs.gather(2, texts[:, -config.horizon :, None])[:, :, 0]
        behavior = rollouts.behavior_log_probs
        if self._old is None and operated is None:
            # The very same numbers, not those that a cache rounds its own way: the ratio is 1.
            behavior = taken.detach().view(behavior.shape)
        rewards = within(rollouts.rewards, config.regularizer.reward_clip)
        advantages = sampling.advantage(rewards)
        taken = taken.view(behavior.shape)
        loss = sampling.surrogate(taken, behavior, advantages, config.clip, config.clip_high)
        entropy_loss = self.regularizer.entropy_loss(log_probs)
        with torch.no_grad():
            distance = (behavior - taken).mean()
            means = rollouts.rewards.mean(), rollouts.matched.mean(), objectives.entropy(log_probs)
            kls = torch.zeros_like(distance), distance  # none from bigrams is charged
        paid = spread(Lesson(loss, rewards, advantages))
        return Reading(loss + entropy_loss, *means, *kls, loss, entropy_loss, paid)

    def _spend(self, n_tokens: int) -> None:
        """Count so many tokens of this process, and as many of each other one."""
        self.forward_tokens += n_tokens * self.ranks.count

    def _behavior(
        self, inputs: Tensor, operated: AbstractContextManager[object] | None
    ) -> Tensor | None:
        """Return the log-probabilities (N, V) of who samples, if it is not the policy itself."""
        if operated is None and self._old is None:
            return None
        self._spend(inputs.numel())
        with torch.no_grad(), operated or nullcontext():
            return self._log_probs(inputs, self._old if operated is None else None)

    def _log_probs(self, inputs: Tensor, model: GPT | None = None) -> Tensor:
        """Return the policy's log-probabilities (N, V) at every position of (B, T) inputs."""
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
            logits = (model or self.model)(inputs).float()  # (B, T, V)
        return torch.log_softmax(logits / self.config.temperature, dim=-1).flatten(0, 1)

    def _batch(self) -> tuple[Tensor, Tensor]:
        windows = self._windows(self.model.context + 1)
        return windows[:, :-1], windows[:, 1:].flatten()

    def _windows(self, length: int) -> Tensor:
        """Draw B windows of the training text; return this process's share of them: (B, length).

        Every process draws all: all generators stand where the one of a single process would.
        """
        starts = self._rng.integers(0, len(self._tokens) - length + 1, self.config.batch_size)
        starts = self.ranks.shard(starts)
        windows = self._tokens[starts[:, None] + np.arange(length)]
        return torch.from_numpy(windows).to(self._device)

    def _sample(self, log_probs: Tensor) -> Tensor:
        """Sample K actions for each position of this process's share: (N, K)."""
        n_all = log_probs.size(0) * self.ranks.count
        return inverse_cdf(log_probs, self._uniforms(n_all, self.config.group_size))

    def _uniforms(self, *shape: int) -> Tensor:
        """Draw uniforms for all processes; return this one's rows."""
        uniforms = self.ranks.shard(self._rng.random(shape, dtype=np.float32))
        return torch.from_numpy(uniforms).to(self._device)

    def _sync(self) -> None:
        if self.n_done % self.config.sync_every == 0:
            self.model_changed()

    def _schedule(self) -> float:
        """Return the next update's share of the peak rates: linear warm-up times a cosine."""
        warm = min(1.0, (self.n_done + 1) / max(1, self.config.warmup_updates))
        progress = min(1.0, self.n_done / max(1, self._n_updates))
        return warm * (0.55 + 0.45 * math.cos(math.pi * progress))

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def _names(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.model.named_parameters()}
