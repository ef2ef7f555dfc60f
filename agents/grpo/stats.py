"""The statistics of an update, over all processes.

Shapes: N groups, K actions or texts in each, R processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.distributed import Ranks
from agents.grpo.losses import Loss


class GRPOStats(NamedTuple):
    """Statistics of one update, measured on its batch before the step: the `grpo/*` metrics."""

    loss: float
    reward: float
    """Probability of sampling the right character, mean p(y); of texts their mean reward."""
    accuracy: float
    """Share of positions whose most probable character is right; of texts the share of leading
    characters that are right."""
    entropy: float
    """Mean entropy of the policy, nats per character."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of AdamW."""
    kl: float = 0.0
    """KL(policy || bigram model), nats; 0 if the regularizer does not use it."""
    kl_coefficient: float = 0.0
    """Weight of that KL in this update."""
    behavior_kl: float = 0.0
    """KL(behaviour policy || policy), nats per character; 0 on-policy."""
    policy_loss: float = 0.0
    """The estimator's part of the loss."""
    entropy_loss: float = 0.0
    """The regularizer's entropy terms."""
    advantage_mean: float = 0.0
    """Mean over all groups; like the next three, 0 for closed forms without advantages."""
    advantage_std: float = 0.0
    """Standard deviation over all groups, with N K degrees of freedom."""
    reward_min: float = 0.0
    """Smallest reward after clipping."""
    reward_max: float = 0.0
    """Largest reward after clipping."""


class Reading(NamedTuple):
    """The loss of a batch and its figures: scalars, except for `spread`."""

    loss: Tensor
    reward: Tensor
    accuracy: Tensor
    entropy: Tensor
    kl: Tensor
    behavior_kl: Tensor
    policy_loss: Tensor
    entropy_loss: Tensor
    spread: Tensor
    """(4,), see `spread`."""


@torch.no_grad()
def spread(loss: Loss) -> Tensor:
    """Return mean and variance of the advantages, smallest and largest reward: (4,).

    All zero if there are none.
    """
    if loss.advantages is None or loss.rewards is None:
        return torch.zeros(4, device=loss.value.device)
    variance, mean = torch.var_mean(loss.advantages.float(), correction=0)
    least, largest = loss.rewards.float().aminmax()
    return torch.stack([mean, variance, least, largest])


def packed(reading: Reading, ranks: Ranks) -> Tensor:
    """Return a reading as one vector, to be averaged over processes and then unpacked.

    A spread cannot be averaged, so the vector has a slot for the spread of each process. A process
    fills its own slot, scaled by R, and leaves the others zero.
    """
    *means, spread = reading
    slots = torch.zeros(ranks.count, len(spread), device=spread.device)
    slots[ranks.rank] = spread * ranks.count
    return torch.cat([torch.stack([x.detach().float() for x in means]), slots.flatten()])


def unpacked(numbers: Tensor, ranks: Ranks) -> dict[str, float]:
    """Return the fields of `GRPOStats` that an averaged reading determines."""
    n_means = len(Reading._fields) - 1
    means, slots = torch.split(numbers.cpu(), [n_means, len(numbers) - n_means])
    mean, variance, least, largest = slots.view(ranks.count, -1).unbind(1)
    # Total variance: the mean of the shares' variances plus the variance of their means.
    total = variance.mean() + mean.var(correction=0)
    return {
        **dict(zip(Reading._fields[:-1], means.tolist(), strict=True)),
        "advantage_mean": mean.mean().item(),
        "advantage_std": total.sqrt().item(),
        "reward_min": least.min().item(),
        "reward_max": largest.max().item(),
    }
