"""The learner: one update of the language model per call.

Shapes: B windows, T characters, N = B * T positions, K actions each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.grpo.objectives import ESTIMATORS, SAMPLED, check_estimator
from agents.ranks import ALONE, Ranks
from avatarl_env.choices import check_choice
from avatarl_env.lm.generation import inverse_cdf
from avatarl_env.lm.gpt import GPT

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """How the language model learns.

    Raises:
        ValueError: if a value is unknown or out of range, or a combination does not exist.
    """

    estimator: str = "brier"
    """brier, grpo, or ce (the supervised control, not RL)."""
    exploration: str = "sampled"
    """sampled (K characters per position) or all_actions (the limit without sampling noise)."""
    group_size: int = 16
    """K, characters sampled at each position."""
    batch_size: int = 16
    """B, windows per update; each is a whole context long."""
    learning_rate: float = 6e-3
    """Peak of AdamW's learning rate."""
    warmup_updates: int = 30
    """Updates of linear warm-up, on top of a cosine from the peak down to a tenth of it."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    precision: str = "float32"
    """Of the forward's matrix products: float32, or bfloat16 by autocast."""

    def __post_init__(self) -> None:
        check_estimator(self.estimator, self.exploration, self.group_size)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_updates", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class GRPOStats(NamedTuple):
    """One update, measured on its own batch before the step."""

    loss: float
    reward: float
    """Probability of sampling the right character: mean p(y)."""
    accuracy: float
    """Share of positions whose most probable character is right."""
    entropy: float
    """Of the policy, nats per character."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float


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
            ValueError: if the text is not longer than the context, or the processes cannot have
                equal shares of a batch.
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
        self._tokens = tokens
        self._n_updates = n_updates
        self._rng = rng
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    @property
    def tokens_per_update(self) -> int:
        """Positions of one batch, N, those of all processes."""
        return self.config.batch_size * self.model.context

    def learning_rate(self) -> float:
        """Return the rate of the next update: linear warm-up times a cosine down to a tenth."""
        config = self.config
        warm = min(1.0, (self.n_done + 1) / max(1, config.warmup_updates))
        progress = min(1.0, self.n_done / max(1, self._n_updates))
        return config.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * progress))

    def update(self) -> GRPOStats:
        """Read a batch, sample actions, reward them, step."""
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self._batch()  # (B, T), (N,)
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(inputs).float()  # (B, T, V)
        log_probs = torch.log_softmax(logits, dim=-1).flatten(0, 1)  # (N, V)
        loss = self._loss(log_probs, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        readings = _readings(loss, log_probs.detach(), targets)  # (4,)
        # One sum of everything, not DistributedDataParallel: that wraps a forward, which rollouts,
        # theaters and the optimizer would have to know; what its overlap hides is little here. With
        # the readings in it, a loss that is no number in one process is none in all.
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.ranks.average([*grads, readings])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        stats = GRPOStats._make([*readings.tolist(), norm.item(), rate])
        # A step along what is no number would leave no number anywhere.
        if math.isfinite(stats.loss) and math.isfinite(stats.grad_norm):
            self.optimizer.step()
            self.n_bad_in_a_row = 0
        else:
            self.n_skipped += 1
            self.n_bad_in_a_row += 1
        self.n_done += 1
        return stats

    def get_state(self) -> dict[str, Any]:
        """Return the optimizer's state, the counters and the dice; the weights are the model's."""
        moments = {
            name: dict(self.optimizer.state[p])
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
        }
        return {
            "n_done": self.n_done,
            "n_skipped": self.n_skipped,
            "n_bad_in_a_row": self.n_bad_in_a_row,
            "rng": dict(self._rng.bit_generator.state),
            "optimizer": moments,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from what ``get_state`` returned."""
        self.n_done, self.n_skipped = state["n_done"], state["n_skipped"]
        self.n_bad_in_a_row = state["n_bad_in_a_row"]
        self._rng.bit_generator.state = state["rng"]
        self.optimizer.state.clear()
        for name, p in self.model.named_parameters():
            if name in state["optimizer"]:
                moments = state["optimizer"][name]
                self.optimizer.state[p] = {key: x.to(p.device) for key, x in moments.items()}

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Read this process's share of a batch.

        Every process draws all of it, and so all generators stand where the one of a single
        process would.
        """
        context = self.model.context
        starts = self._rng.integers(0, len(self._tokens) - context, self.config.batch_size)
        starts = self.ranks.mine(starts)
        windows = torch.from_numpy(self._tokens[starts[:, None] + np.arange(context + 1)])
        windows = windows.to(self.model.embed.weight.device)
        return windows[:, :-1], windows[:, 1:].flatten()

    def _loss(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        estimator = ESTIMATORS[self.config.estimator]
        if self.config.exploration == SAMPLED:
            assert estimator.sampled is not None
            return estimator.sampled(log_probs, targets, self._sample(log_probs.detach()))
        assert estimator.all_actions is not None
        return estimator.all_actions(log_probs, targets)

    def _sample(self, log_probs: Tensor) -> Tensor:
        """Sample K actions for each position of this process's share: (N, K)."""
        shape = (log_probs.size(0) * self.ranks.count, self.config.group_size)
        uniforms = torch.from_numpy(self.ranks.mine(self._rng.random(shape, dtype=np.float32)))
        return inverse_cdf(log_probs, uniforms.to(log_probs.device))


@torch.no_grad()
def _readings(loss: Tensor, log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return loss, reward, accuracy and entropy."""
    probs = log_probs.exp()
    return torch.stack(
        [
            loss.detach(),
            probs.gather(1, targets[:, None]).mean(),
            (log_probs.argmax(1) == targets).float().mean(),
            -(probs * log_probs).sum(1).mean(),
        ]
    )
