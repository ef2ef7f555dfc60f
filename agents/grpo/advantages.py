"""Advantages: rewards held against the rest of their group.

Shapes: N positions, K actions sampled at each.
"""

from __future__ import annotations

from torch import Tensor

STD_EPSILON = 1e-4  # as in TRL; keeps a group of equal rewards at exactly zero advantage


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of the others'.

    ``A_i = r_i - mean_{j != i} r_j = K / (K - 1) (r_i - mean r)`` (RLOO, arXiv 2402.14740).

    Args:
        rewards: (N, K), K >= 2.

    Returns:
        (N, K); each row sums to zero up to rounding, and is exactly zero where all are equal.
    """
    group_size = rewards.size(1)
    return _centred(rewards) * (group_size / (group_size - 1))


def group_normalised(rewards: Tensor) -> Tensor:
    """Return rewards centred and divided by their group's standard deviation.

    ``A_i = (r_i - mean r) / (std r + 1e-4)``, std with K - 1 degrees of freedom (GRPO,
    arXiv 2402.03300).

    Args:
        rewards: (N, K), K >= 2.

    Returns:
        (N, K); exactly zero where all rewards of a group are equal.
    """
    centred = _centred(rewards)
    return centred / (centred.std(1, keepdim=True) + STD_EPSILON)


def _centred(rewards: Tensor) -> Tensor:
    """Subtract each row's mean.

    The mean of equal numbers is not always that number in floating point (ten times 0.1, say).
    Their differences from the first are exactly zero, and so is the mean of those.
    """
    relative = rewards - rewards[:, :1]
    return relative - relative.mean(1, keepdim=True)
