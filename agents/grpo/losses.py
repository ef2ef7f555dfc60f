"""Rewards, advantages, surrogates and scores of GRPO: pure functions, no state.

Shapes: N groups (positions of real text, or prompts), K actions or texts sampled in each group,
H characters in each episode (1 for actions), V vocabulary. All texts are H characters long, so
there is no mask.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from agents.grpo.config import GRPOConfig

STD_EPSILON = 1e-4  # as in TRL
EMPTY = torch.empty(0)


class Batch(NamedTuple):
    """A batch of episodes, the argument of surrogates and closed forms. Unused fields are empty."""

    config: GRPOConfig
    """All settings: `clip`, `clip_high`, `group_size` (K), `regularizer`, ..."""
    policy: Tensor
    """Log-probabilities of all characters under the policy, with gradient: (N, V) at real
    positions, or (N K, H, V) along sampled texts."""
    targets: Tensor = EMPTY
    """(N,) the real next characters; horizon 1 only."""
    bigrams: Tensor = EMPTY
    """(N, V) bigram log-probabilities of the next character; only if the regularizer needs them."""
    actions: Tensor = EMPTY
    """(N, K) sampled characters; horizon 1 only."""
    log_probs: Tensor = EMPTY
    """(N, K, H) of the sampled characters, under the policy, with gradient."""
    behavior_log_probs: Tensor = EMPTY
    """(N, K, H) of the sampled characters, under the policy that sampled them."""
    rewards: Tensor = EMPTY
    """(N, K)."""
    advantages: Tensor = EMPTY
    """(N, K)."""


class Loss(NamedTuple):
    """The result of an estimator on a batch."""

    value: Tensor
    """To be minimised, a scalar."""
    rewards: Tensor | None = None
    """(N, K) after partial credit and clipping; None for closed forms without rewards."""
    advantages: Tensor | None = None
    """(N, K) including all weights; None for closed forms without advantages."""


# Rewards.


def exact_match(actions: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where a sampled character (N, K) is the real one (N,), else 0: (N, K) float32."""
    return (actions == targets[:, None]).float()


def agreement(actions: Tensor) -> Tensor:
    """Return, for each sample, the share of the group's other samples that are the same.

    `f_i = #{j != i: a_j = a_i} / (K - 1)`, an unbiased estimate of the policy's p(a_i).

    Args:
        actions: (N, K) int64, K >= 2.

    Returns:
        (N, K) float32 in [0, 1].
    """
    same = actions[:, :, None] == actions[:, None, :]  # (N, K, K)
    return (same.sum(-1) - 1).float() / (actions.size(1) - 1)


def brier_reward(actions: Tensor, targets: Tensor) -> Tensor:
    """Return a reward whose expectation is largest when the policy is the data distribution.

    `r_i = 1[a_i = y] - (K - 1) / (K - 2) f_i`, with `f_i` from `agreement`. With the leave-one-out
    baseline the expected gradient is that of the Brier score `p_y - sum_a p_a^2 / 2`, a strictly
    proper scoring rule (Gneiting and Raftery 2007; for language models Shao et al., arXiv
    2405.18906). Plain exact match is not proper: its optimum puts all probability on one character.
    The factor corrects for the sample's own collisions inside the baseline; without it the optimum
    is sharper than the data.

    Args:
        actions: (N, K) int64, K >= 3.
        targets: (N,) int64.

    Returns:
        (N, K) float32.
    """
    group_size = actions.size(1)
    correction = (group_size - 1) / (group_size - 2)
    return exact_match(actions, targets) - correction * agreement(actions)


def paid(batch: Batch, rewards: Tensor, actions: Tensor) -> Tensor:
    """Add the partial credit of the actions (N, K) to their rewards, then clip: (N, K)."""
    extra = batch.config.regularizer
    if extra.partial_credit:
        credit = extra.partial_credit * batch.bigrams.exp()  # (N, V)
        rewards = rewards + credit.gather(1, actions)
    return clip_rewards(rewards, extra.reward_clip)


def clip_rewards(rewards: Tensor, bound: float) -> Tensor:
    """Clip rewards to `[-bound, bound]`; a bound of 0 means no clipping."""
    return rewards.clamp(-bound, bound) if bound else rewards


def imitation_reward(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Return how much likelier each text is under the reference, in nats per character.

    `r = mean_t (log q(a_t) - log p(a_t))`; its mean over a policy's own texts is
    `-KL(policy || reference)` per character.

    Args:
        log_probs: (N, K, H) of the sampled characters, under the policy that wrote them.
        reference_log_probs: (N, K, H) of the same characters under the reference.

    Returns:
        (N, K).
    """
    return (reference_log_probs - log_probs).mean(2)


def matching_prefix(written: Tensor, real: Tensor) -> Tensor:
    """Return the share of leading characters that equal the real continuation.

    Args:
        written: (N, K, H) int64.
        real: (N, H) int64.

    Returns:
        (N, K) float32 in [0, 1].
    """
    return (written == real[:, None]).long().cumprod(2).float().mean(2)


# Advantages: rewards (N, K) relative to their group.


def centred(rewards: Tensor) -> Tensor:
    """Return `r_i - mean r` (Dr. GRPO, arXiv 2503.20783): (N, K).

    Exactly zero where all rewards of a group are equal: the mean of ten times 0.1 is not 0.1 in
    floating point, but the differences from the first reward are exactly zero.
    """
    relative = rewards - rewards[:, :1]
    return relative - relative.mean(1, keepdim=True)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of the others, K >= 2 (RLOO, arXiv 2402.14740): (N, K).

    `A_i = r_i - mean_{j != i} r_j = K / (K - 1) (r_i - mean r)`.
    """
    group_size = rewards.size(1)
    return centred(rewards) * (group_size / (group_size - 1))


def group_normalised(rewards: Tensor, min_std: float = 0.0) -> Tensor:
    """Return `(r_i - mean r) / (std r + 1e-4)` (GRPO, arXiv 2402.03300): (N, K).

    Args:
        rewards: (N, K), K >= 2.
        min_std: lower bound of the standard deviation, which has K - 1 degrees of freedom.
    """
    differences = centred(rewards)
    std = differences.std(1, keepdim=True).clamp_min(min_std)
    return differences / (std + STD_EPSILON)


def share_of_success(rewards: Tensor) -> Tensor:
    """Return `r_i / mean r` of rewards >= 0, zero in groups without success: (N, K).

    MaxRL's estimator (arXiv 2602.02710) without its control variate. Its expected gradient for
    rewards of 0 and 1 is that of the log-likelihood of success truncated after K terms.
    """
    mean = rewards.mean(1, keepdim=True)
    return rewards / mean.where(mean > 0, 1.0)


def mean_normalised(rewards: Tensor) -> Tensor:
    """Return `(r_i - mean r) / mean r` of rewards >= 0 (MaxRL, arXiv 2602.02710): (N, K).

    Zero in groups without success. Since the baseline is dropped there, the expected gradient is
    that of `share_of_success` with K - 1 samples.
    """
    mean = rewards.mean(1, keepdim=True)
    return centred(rewards) / mean.where(mean > 0, 1.0)


# Surrogates: losses of sampled characters. Advantages and behaviour policy are constants.


def reinforce(batch: Batch) -> Tensor:
    """Return the on-policy REINFORCE loss `-mean(A log p(a))`."""
    return -(batch.advantages.detach()[:, :, None] * batch.log_probs).mean()


def proper_reinforce(batch: Batch) -> Tensor:
    """Return the REINFORCE loss minus `rarity_bonus`, which makes the optimum the data's."""
    return reinforce(batch) - rarity_bonus(batch.policy, batch.config.group_size)


def clipped(batch: Batch) -> Tensor:
    """Return PPO's clipped surrogate with one ratio per character.

    `-mean(min(r A, clip(r, 1 - clip, 1 + clip_high) A))`, `r = p(a) / b(a)` (PPO, arXiv 1707.06347;
    two bounds, "clip-higher": DAPO, arXiv 2503.14476). On-policy r is exactly 1 and the gradient is
    REINFORCE's.
    """
    ratio = (batch.log_probs - batch.behavior_log_probs.detach()).exp()  # (N, K, H)
    return -_pessimistic(ratio, batch.advantages.detach()[:, :, None], batch.config).mean()


def clipped_by_text(batch: Batch) -> Tensor:
    """Return GSPO's surrogate: one ratio per text, `r = (p(text) / b(text))^(1 / H)`.

    `-mean(min(r A, clip(r, 1 - clip, 1 + clip_high) A))` (GSPO, arXiv 2507.18071). These ratios
    stay much closer to 1 than those of single characters, and so should the bounds.
    """
    ratio = (batch.log_probs - batch.behavior_log_probs.detach()).mean(2).exp()  # (N, K)
    return -_pessimistic(ratio, batch.advantages.detach(), batch.config).mean()


def clipped_importance(batch: Batch) -> Tensor:
    """Return CISPO's loss: REINFORCE, weighted by a clipped ratio without gradient.

    `-mean(min(r, 1 + clip_high) A log p(a))` (CISPO, arXiv 2506.13585). Unlike PPO's surrogate it
    drops no character.
    """
    ratio = (batch.log_probs - batch.behavior_log_probs).detach().exp()  # (N, K, H)
    ratio = ratio.clamp_max(1 + batch.config.clip_high)
    return -(ratio * batch.advantages.detach()[:, :, None] * batch.log_probs).mean()


def _pessimistic(ratio: Tensor, advantages: Tensor, config: GRPOConfig) -> Tensor:
    bounded = ratio.clamp(1 - config.clip, 1 + config.clip_high)
    return torch.minimum(ratio * advantages, bounded * advantages)


# Scores of whole distributions: expectations over all actions, which surrogates estimate.


def truncated_log_likelihood(log_probs: Tensor, targets: Tensor, order: int) -> Tensor:
    """Return the mean of `f(p_y) = -sum_{k <= n} (1 - p_y)^k / k`: `log p_y` after n terms.

    The objective whose gradient MaxRL estimates (arXiv 2602.02710), from groups of n without its
    baseline and of n + 1 with it. Its optimum is sharper than the data.

    Args:
        log_probs: (N, V).
        targets: (N,).
        order: n >= 1.
    """
    log_p = log_probs.gather(1, targets[:, None])[:, 0]
    # The exact value, with the gradient in closed form: by log p it is 1 - (1 - p)^n. Autograd
    # through n powers would be slower and need n times the memory.
    miss = 1 - log_p.detach().exp()
    powers = torch.arange(1, order + 1, device=miss.device)
    value = -(miss[:, None] ** powers / powers).sum(1)
    slope = 1 - miss**order
    return (value + slope * (log_p - log_p.detach())).mean()


def rarity_bonus(log_probs: Tensor, order: int) -> Tensor:
    """Return `mean(-sum_a (1 - p_a)^(n + 1) / (n + 1))`, which keeps rare actions possible.

    Added to `truncated_log_likelihood` f of the same order, with `f'(p) = (1 - (1 - p)^n) / p`, it
    makes a strictly proper scoring rule: `q f'(p) + (1 - p)^n` is the same for all actions if and
    only if p = q (Gneiting and Raftery 2007). Order 1 is the Brier score, infinity the log score.

    Args:
        log_probs: (N, V) of the policy.
        order: n >= 1.
    """
    return -((1 - log_probs.exp()) ** (order + 1)).sum(1).mean() / (order + 1)


def brier_score(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean Brier score `p_y - sum_a p_a^2 / 2` of (N, V) and targets (N,)."""
    probs = log_probs.exp()
    return (probs.gather(1, targets[:, None])[:, 0] - 0.5 * probs.square().sum(1)).mean()


def log_likelihood(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of `log p_y` of (N, V) and targets (N,): supervised learning, not RL."""
    return log_probs.gather(1, targets[:, None]).mean()


def confidence_weighted(batch: Batch) -> Loss:
    """Return the loss of `seed_exhaustive`, `-mean_a(s_a A_a log p_a)` over all characters.

    `A_a = r_a - mean r` with r the exact match plus credit, and `s_a = min((V p_a)^w, c)` with w
    `confidence_power` and c `confidence_clip`. There is no weight p_a: without s the loss is linear
    in the logits and its gradient never vanishes.
    """
    log_probs, extra = batch.policy, batch.config.regularizer
    vocab_size = log_probs.size(1)
    actions = torch.arange(vocab_size, device=log_probs.device).expand_as(log_probs)  # (N, V)
    rewards = paid(batch, exact_match(actions, batch.targets), actions)
    confidence = (vocab_size * log_probs.detach().exp()) ** extra.confidence_power
    weights = confidence.clamp_max(extra.confidence_clip) * centred(rewards)
    return Loss(-(weights * log_probs).mean(), rewards, weights)


# Regularisation.


def entropy(log_probs: Tensor) -> Tensor:
    """Return the mean entropy of (..., V) log-probabilities, in nats."""
    return -(log_probs.exp() * log_probs).sum(-1).mean()


def entropy_loss(log_probs: Tensor, bonus: float, floor: float) -> Tensor:
    """Return `-bonus H + max(0, floor - H)`, H the entropy of (..., V) log-probabilities."""
    if not (bonus or floor):
        return log_probs.new_zeros(())
    mean = entropy(log_probs)
    return (floor - mean).relu() - bonus * mean


def kl_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Return the mean of `KL(p || q) = sum_a p_a (log p_a - log q_a)` of (N, V), in nats."""
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1).mean()


def adapted_coefficient(coefficient: float, kl: float, target: float) -> float:
    """Return the next coefficient of a KL term: doubled if the KL is too large, halved if small.

    PPO's rule (arXiv 1707.06347, section 4): too large is above 1.5 times the target, too small
    below two thirds of it. The result is within [1e-4, 10]; a KL that is not finite is ignored.
    """
    if not math.isfinite(kl):
        return coefficient
    factor = 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
    return min(10.0, max(1e-4, coefficient * factor))
