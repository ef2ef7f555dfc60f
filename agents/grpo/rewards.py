"""Rewards of sampled next characters, and of sampled texts.

Shapes: N positions, K actions (characters) sampled at each; or B prompts, K texts of H characters.
"""

from __future__ import annotations

from torch import Tensor


def exact_match(actions: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where the sampled character is the one that stands in the text, else 0.

    Args:
        actions: (N, K) int64.
        targets: (N,) int64.

    Returns:
        (N, K) float32.
    """
    return (actions == targets[:, None]).float()


def others_that_agree(actions: Tensor) -> Tensor:
    """Return for each sample the share of the group's other samples that chose the same.

    `f_i = #{j != i: a_j = a_i} / (K - 1)`, an unbiased estimate of the policy's own p(a_i).

    Args:
        actions: (N, K) int64, K >= 2.

    Returns:
        (N, K) float32 in [0, 1].
    """
    same = actions[:, :, None] == actions[:, None, :]  # (N, K, K)
    return (same.sum(-1) - 1).float() / (actions.size(1) - 1)


def brier_reward(actions: Tensor, targets: Tensor) -> Tensor:
    """Return a reward that is maximal, on average, when the policy is the data distribution.

    `r_i = 1[a_i = y] - c f_i` with `f_i` from `others_that_agree` and
    `c = (K - 1) / (K - 2)`. Being right pays, and saying what everyone says costs: the expected
    gradient, with the leave-one-out baseline, is that of the Brier score `p_y - sum_a p_a^2 / 2`,
    a strictly proper scoring rule (Gneiting and Raftery 2007; as a training loss for language
    models Shao et al., arXiv 2405.18906). Plain exact match is not proper: its optimum puts all
    probability on one character. The factor c makes up for the sample's own collisions inside the
    baseline; with c = 1 the optimum is sharper than the data.

    Args:
        actions: (N, K) int64, K >= 3.
        targets: (N,) int64.

    Returns:
        (N, K) float32.

    Raises:
        ValueError: if K < 3.
    """
    group_size = actions.size(1)
    if group_size < 3:
        raise ValueError(f"group_size must be at least 3 for brier, got {group_size}")
    correction = (group_size - 1) / (group_size - 2)
    return exact_match(actions, targets) - correction * others_that_agree(actions)


def within(rewards: Tensor, bound: float) -> Tensor:
    """Return rewards clipped to `[-bound, bound]`; 0: as they are."""
    return rewards.clamp(-bound, bound) if bound else rewards


def imitation_reward(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Return for each text how much likelier, per character, the reference finds it.

    `r = mean_t (log q(a_t | own text) - log p(a_t | own text))`; its mean over a policy's own
    texts is `-KL(policy || reference)` per character, largest where the two agree.

    Args:
        log_probs: (B, K, H) of what was written, under who wrote it.
        reference_log_probs: (B, K, H) of the same under the reference.

    Returns:
        (B, K) nats per character.
    """
    return (reference_log_probs - log_probs).mean(2)


def matching_prefix(written: Tensor, real: Tensor) -> Tensor:
    """Return the share of leading characters that equal the real continuation.

    Args:
        written: (B, K, H) int64.
        real: (B, H) int64.

    Returns:
        (B, K) float32 in [0, 1].
    """
    return (written == real[:, None]).long().cumprod(2).float().mean(2)
