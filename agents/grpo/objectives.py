"""Objectives at horizon 1: every position of a real text window is an episode of one action.

The state is the text so far, the action the next character, and K actions are sampled from one
forward. What this leaves out of GRPO as published (arXiv 2402.03300), and why:

1. No ratio and no clipping: each batch is used once, so the old policy is the policy.
2. No KL to a reference model: there is none to stay close to, training starts from random weights.
3. No length normalisation: every episode has length one.

Shapes: N positions, V vocabulary, K actions sampled at each position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from agents.grpo.advantages import group_normalised, leave_one_out
from agents.grpo.rewards import brier_reward, exact_match
from avatarl_env.choices import check_choice

SAMPLED, ALL_ACTIONS = "sampled", "all_actions"


def policy_loss(log_probs: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """Return the REINFORCE loss ``-mean(A_i log p(a_i))``.

    Args:
        log_probs: (N, V) of the policy; the gradient flows through them.
        actions: (N, K) sampled from it.
        advantages: (N, K), taken as constants.
    """
    return -(advantages.detach() * log_probs.gather(1, actions)).mean()


def brier_sampled(log_probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    """Return the loss of GRPO with :func:`~agents.grpo.rewards.brier_reward`, leave-one-out.

    Its expected gradient is exactly that of :func:`brier_all_actions`.

    Args:
        log_probs: (N, V).
        targets: (N,).
        actions: (N, K), K >= 3.
    """
    return policy_loss(log_probs, actions, leave_one_out(brier_reward(actions, targets)))


def brier_all_actions(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return minus the mean Brier score ``p_y - sum_a p_a^2 / 2``.

    The expectation of :func:`brier_sampled` over all actions, hence its limit without sampling
    noise; its gradient is also that of a supervised scoring-rule loss, so it is an oracle and an
    upper bound, not a result of sampled RL.

    Args:
        log_probs: (N, V).
        targets: (N,).
    """
    probs = log_probs.exp()
    return -(probs.gather(1, targets[:, None])[:, 0] - 0.5 * probs.square().sum(1)).mean()


def grpo_sampled(log_probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    """Return the loss of GRPO: exact match, group mean and standard deviation.

    From random weights its optimum is a policy of almost no entropy (its population weight is
    ``1 / sqrt(p (1 - p))``, MaxRL, arXiv 2602.02710): kept as the baseline to beat.

    Args:
        log_probs: (N, V).
        targets: (N,).
        actions: (N, K), K >= 2.
    """
    return policy_loss(log_probs, actions, group_normalised(exact_match(actions, targets)))


def cross_entropy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of ``-log p_y``: the supervised control, not reinforcement learning.

    Args:
        log_probs: (N, V).
        targets: (N,).
    """
    return -log_probs.gather(1, targets[:, None]).mean()


class Estimator(NamedTuple):
    """An estimator in its two forms; None where it has no such form."""

    sampled: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    """(log_probs, targets, actions) -> loss."""
    all_actions: Callable[[Tensor, Tensor], Tensor] | None
    """(log_probs, targets) -> loss."""
    least_group: int = 2
    """Smallest group size of the sampled form."""
    is_control: bool = False
    """Whether this is a supervised control."""


ESTIMATORS: dict[str, Estimator] = {
    "brier": Estimator(brier_sampled, brier_all_actions, least_group=3),
    "grpo": Estimator(grpo_sampled, None),
    "ce": Estimator(None, cross_entropy, is_control=True),
}
"""Estimators by name."""


def check_estimator(name: str, exploration: str, group_size: int) -> None:
    """Raise a ValueError unless there is such an estimator, it explores so, and K is enough."""
    check_choice("estimator", name, ESTIMATORS)
    estimator = ESTIMATORS[name]
    forms = {SAMPLED: estimator.sampled, ALL_ACTIONS: estimator.all_actions}
    possible = [form for form, function in forms.items() if function is not None]
    if exploration not in possible:
        raise ValueError(
            f"exploration must be {' or '.join(possible)} for {name}, got {exploration!r}"
        )
    if exploration == SAMPLED and group_size < estimator.least_group:
        raise ValueError(
            f"group_size must be at least {estimator.least_group} for {name}, got {group_size}"
        )
