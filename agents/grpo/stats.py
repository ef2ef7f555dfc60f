"""What an update is reported with, from one process or from several.

Shapes: N groups, K actions (or texts) sampled in each, R processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.distributed import Ranks
from agents.grpo.estimators import Lesson


class GRPOStats(NamedTuple):
    """One update, measured on its own batch before the step."""

    loss: float
    reward: float
    """Probability of sampling the right character, mean p(y); of rollouts their mean reward."""
    accuracy: float
    """Share of positions whose most probable character is right; of rollouts the share of leading
    characters that are."""
    entropy: float
    """Of the policy, nats per character."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    kl: float = 0.0
    """From the bigram model, nats; 0 where it does not count."""
    kl_coefficient: float = 0.0
    """Of that KL, in this update."""
    behavior_kl: float = 0.0
    """KL(who sampled || policy), nats per character; 0 where the policy samples itself."""
    policy_loss: float = 0.0
    """The estimator's part of the loss: what the regularizer adds is not in it."""
    entropy_loss: float = 0.0
    """What the regularizer's entropy terms add to the loss."""
    advantage_mean: float = 0.0
    """Over all groups; 0, like the next three, for closed forms that have no advantages."""
    advantage_std: float = 0.0
    """Over all groups, with N K degrees of freedom."""
    reward_min: float = 0.0
    """Smallest reward that was paid, after `reward_clip`."""
    reward_max: float = 0.0
    """Largest."""


class Reading(NamedTuple):
    """What a batch says: the loss, and what it is reported with, all single numbers but one."""

    loss: Tensor
    reward: Tensor
    accuracy: Tensor
    entropy: Tensor
    kl: Tensor
    behavior_kl: Tensor
    policy_loss: Tensor
    entropy_loss: Tensor
    spread: Tensor
    """(4,) from `spread`."""


@torch.no_grad()
def spread(lesson: Lesson) -> Tensor:
    """Return mean and variance of the advantages, least and largest reward: (4,).

    All zero where there are none.
    """
    if lesson.advantages is None or lesson.rewards is None:
        return torch.zeros(4, device=lesson.loss.device)
    variance, mean = torch.var_mean(lesson.advantages.float(), correction=0)
    least, largest = lesson.rewards.float().aminmax()
    return torch.stack([mean, variance, least, largest])


def packed(reading: Reading, ranks: Ranks) -> Tensor:
    """Return a reading as one row of numbers, to be averaged over processes and then unpacked.

    Losses and other means are averaged as they are. The spread cannot be averaged, so the row has
    one slot for the spread of each process: a process fills its own slot, scaled by the number of
    processes, and leaves the others at zero.
    """
    *means, spread = reading
    places = torch.zeros(ranks.count, len(spread), device=spread.device)
    places[ranks.rank] = spread * ranks.count
    return torch.cat([torch.stack([x.detach().float() for x in means]), places.flatten()])


def unpacked(numbers: Tensor, ranks: Ranks) -> dict[str, float]:
    """Return the fields of `GRPOStats` that a reading has."""
    n_means = len(Reading._fields) - 1
    means, places = torch.split(numbers.cpu(), [n_means, len(numbers) - n_means])
    mean, variance, least, largest = places.view(ranks.count, -1).unbind(1)
    # The variance of all: the mean of each share's, and that of the shares' means.
    total = variance.mean() + mean.var(correction=0)
    return {
        **dict(zip(Reading._fields[:-1], means.tolist(), strict=True)),
        "advantage_mean": mean.mean().item(),
        "advantage_std": total.sqrt().item(),
        "reward_min": least.min().item(),
        "reward_max": largest.max().item(),
    }
