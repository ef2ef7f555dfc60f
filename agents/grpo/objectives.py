"""Objectives: what is minimised, given advantages. Pure functions.

A surrogate takes log-probabilities of what was sampled, under the policy and under the behaviour
policy that sampled it, and advantages. At horizon 1 the H axis has length 1.

Shapes: N groups (positions, or prompts), K actions or texts sampled in each, H characters of each,
V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reinforce(
    log_probs: Tensor, behavior_log_probs: Tensor, advantages: Tensor, clip: float, clip_high: float
) -> Tensor:
    """Return the REINFORCE loss `-mean(A log p(a))`, for what the policy itself sampled.

    Args:
        log_probs: (N, K, H) of what was sampled; the gradient flows through them.
        behavior_log_probs: (N, K, H), not used: each batch is used once, by who sampled it.
        advantages: (N, K), taken as constants.
        clip: not used.
        clip_high: not used.
    """
    return -(advantages.detach()[:, :, None] * log_probs).mean()


def clipped(
    log_probs: Tensor, behavior_log_probs: Tensor, advantages: Tensor, clip: float, clip_high: float
) -> Tensor:
    """Return PPO's clipped surrogate, ratios taken character by character.

    `-mean(min(r A, clip(r, 1 - clip, 1 + clip_high) A))`, `r = p(a) / b(a)` (PPO,
    arXiv 1707.06347; two bounds, "clip-higher", DAPO, arXiv 2503.14476). Where the policy itself
    sampled, r is exactly 1 and the gradient is REINFORCE's. All texts being H long, the mean over
    characters is also that over texts (GRPO) and that over a constant length (Dr. GRPO).

    Args:
        log_probs: (N, K, H) under the policy.
        behavior_log_probs: (N, K, H) under who sampled, taken as constants.
        advantages: (N, K), taken as constants.
        clip: how far below 1 a ratio may count.
        clip_high: how far above.
    """
    ratio = (log_probs - behavior_log_probs.detach()).exp()
    return -_pessimistic(ratio, advantages.detach()[:, :, None], clip, clip_high).mean()


def clipped_by_text(
    log_probs: Tensor, behavior_log_probs: Tensor, advantages: Tensor, clip: float, clip_high: float
) -> Tensor:
    """Return GSPO's surrogate: one ratio for a whole text, `r = (p(text) / b(text))^(1 / H)`.

    `-mean(min(r A, clip(r, 1 - clip, 1 + clip_high) A))` (GSPO, arXiv 2507.18071). Such ratios
    stay far closer to 1 than those of single characters, and so must the bounds.

    Args:
        log_probs: (N, K, H) under the policy.
        behavior_log_probs: (N, K, H) under who sampled, taken as constants.
        advantages: (N, K), taken as constants.
        clip: how far below 1 a ratio may count.
        clip_high: how far above.
    """
    ratio = (log_probs - behavior_log_probs.detach()).mean(2).exp()  # (N, K)
    return -_pessimistic(ratio, advantages.detach(), clip, clip_high).mean()


def clipped_importance(
    log_probs: Tensor, behavior_log_probs: Tensor, advantages: Tensor, clip: float, clip_high: float
) -> Tensor:
    """Return CISPO's objective: REINFORCE, weighted by a ratio that is clipped and held constant.

    `-mean(min(r, 1 + clip_high) A log p(a))`, no gradient through r (CISPO, arXiv 2506.13585):
    unlike PPO's surrogate it drops no character.

    Args:
        log_probs: (N, K, H) under the policy.
        behavior_log_probs: (N, K, H) under who sampled, taken as constants.
        advantages: (N, K), taken as constants.
        clip: not used.
        clip_high: how far above 1 a ratio may count.
    """
    ratio = (log_probs - behavior_log_probs).detach().exp().clamp_max(1 + clip_high)
    return -(ratio * advantages.detach()[:, :, None] * log_probs).mean()


def _pessimistic(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)


def rarity_bonus(log_probs: Tensor, order: int) -> Tensor:
    """Return what keeps rare actions possible: `mean(-sum_a (1 - p_a)^(N + 1) / (N + 1))`.

    It depends on the policy alone. With it, the log-likelihood truncated after N terms,
    `f(p) = -sum_{k <= N} (1 - p)^k / k` with `f'(p) = (1 - (1 - p)^N) / p`, becomes a strictly
    proper scoring rule: `q f'(p) + (1 - p)^N` is the same for all actions where `p = q`, and
    nowhere else (Gneiting and Raftery 2007). Order 1 is the Brier score, infinity the log score.

    Args:
        log_probs: (P, V) of the policy.
        order: N >= 1.
    """
    return -((1 - log_probs.exp()) ** (order + 1)).sum(1).mean() / (order + 1)


def truncated_log_likelihood(log_probs: Tensor, targets: Tensor, order: int) -> Tensor:
    """Return the mean of `f(p_y) = -sum_{k <= N} (1 - p_y)^k / k`, `log p_y` cut after N terms.

    The objective whose gradient MaxRL estimates (arXiv 2602.02710), from groups of N without its
    baseline and of N + 1 with it. Plain: its optimum is sharper than the data.

    Args:
        log_probs: (P, V).
        targets: (P,).
        order: N >= 1.
    """
    log_p = log_probs.gather(1, targets[:, None])[:, 0]
    # The slope in closed form, on a value that is exact: a sum of N powers is neither fast nor
    # needed for the gradient, which is w(p) p = 1 - (1 - p)^N in terms of log p.
    miss = 1 - log_p.detach().exp()
    powers = torch.arange(1, order + 1, device=miss.device)
    value = -(miss[:, None] ** powers / powers).sum(1)
    slope = 1 - miss**order
    return (value + slope * (log_p - log_p.detach())).mean()


def brier_score(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean Brier score `p_y - sum_a p_a^2 / 2`.

    The expectation of GRPO with `brier_reward` over all actions, hence
    its limit without sampling noise; its gradient is also that of a supervised scoring-rule loss,
    so it is an oracle and an upper bound, not a result of sampled RL.

    Args:
        log_probs: (P, V).
        targets: (P,).
    """
    probs = log_probs.exp()
    return (probs.gather(1, targets[:, None])[:, 0] - 0.5 * probs.square().sum(1)).mean()


def log_likelihood(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of `log p_y`: the supervised control, not reinforcement learning.

    Args:
        log_probs: (P, V).
        targets: (P,).
    """
    return log_probs.gather(1, targets[:, None]).mean()


def entropy(log_probs: Tensor) -> Tensor:
    """Return the mean entropy of (..., V) log-probabilities, nats."""
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def kl_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Return the mean of `KL(policy || reference) = sum_a p_a (log p_a - log q_a)`, nats.

    Args:
        log_probs: (P, V) of the policy.
        reference_log_probs: (P, V).
    """
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1).mean()


def adapted(coefficient: float, kl: float, target: float) -> float:
    """Return the next coefficient of a KL term: doubled if the KL is too large, halved if small.

    PPO's rule (arXiv 1707.06347, section 4): too large is over 1.5 times the target, too small
    under two thirds of it. Kept within [1e-4, 10].

    Args:
        coefficient: so far.
        kl: what was measured, nats.
        target: what it should be, nats, > 0.
    """
    if not math.isfinite(kl):
        return coefficient
    factor = 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
    return min(10.0, max(1e-4, coefficient * factor))
