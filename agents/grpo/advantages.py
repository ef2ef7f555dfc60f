"""Advantages: rewards held against the rest of their group.

Shapes: N groups, K actions (or texts) sampled in each.
"""

from __future__ import annotations

from torch import Tensor

STD_EPSILON = 1e-4  # as in TRL; keeps a group of equal rewards at exactly zero advantage


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of the others'.

    `A_i = r_i - mean_{j != i} r_j = K / (K - 1) (r_i - mean r)` (RLOO, arXiv 2402.14740).

    Args:
        rewards: (N, K), K >= 2.

    Returns:
        (N, K); each row sums to zero up to rounding, and is exactly zero where all are equal.
    """
    group_size = rewards.size(1)
    return centred(rewards) * (group_size / (group_size - 1))


def group_normalised(rewards: Tensor, least_std: float = 0.0) -> Tensor:
    """Return rewards centred and divided by their group's standard deviation.

    `A_i = (r_i - mean r) / (std r + 1e-4)`, std with K - 1 degrees of freedom (GRPO,
    arXiv 2402.03300).

    Args:
        rewards: (N, K), K >= 2.
        least_std: a smaller standard deviation counts as this much.

    Returns:
        (N, K); exactly zero where all rewards of a group are equal.
    """
    differences = centred(rewards)
    std = differences.std(1, keepdim=True).clamp_min(least_std)
    return differences / (std + STD_EPSILON)


def share_of_success(rewards: Tensor) -> Tensor:
    """Return each reward divided by its group's mean.

    `A_i = r_i / mean r`, zero where nobody succeeded (the estimator of MaxRL, arXiv 2602.02710,
    without its control variate). Its expected gradient at rewards of 0 and 1 is that of the
    log-likelihood of success, truncated after K terms: `w(p) = (1 - (1 - p)^K) / p` times that
    of `p`.

    Args:
        rewards: (N, K), none negative.

    Returns:
        (N, K); a row sums to K, or is zero.
    """
    mean = rewards.mean(1, keepdim=True)
    return rewards / mean.where(mean > 0, 1.0)


def mean_normalised(rewards: Tensor) -> Tensor:
    """Return rewards centred and divided by their group's mean.

    `A_i = (r_i - mean r) / mean r`, zero where nobody succeeded (MaxRL, arXiv 2602.02710).
    The baseline does not count in groups without success, which costs one term: the expected
    gradient at rewards of 0 and 1 is that of `share_of_success` with K - 1 actions.

    Args:
        rewards: (N, K), none negative.

    Returns:
        (N, K); each row sums to zero up to rounding.
    """
    mean = rewards.mean(1, keepdim=True)
    return centred(rewards) / mean.where(mean > 0, 1.0)


def centred(rewards: Tensor) -> Tensor:
    """Return rewards minus their group's mean (Dr. GRPO, arXiv 2503.20783).

    The mean of equal numbers is not always that number in floating point (ten times 0.1, say).
    Their differences from the first are exactly zero, and so is the mean of those.

    Args:
        rewards: (N, K).

    Returns:
        (N, K); exactly zero where all rewards of a group are equal.
    """
    relative = rewards - rewards[:, :1]
    return relative - relative.mean(1, keepdim=True)
