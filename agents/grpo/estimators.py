"""The table of estimators: reward, advantage and surrogate, and the settings that each allows.

To add one, add a row to `ESTIMATORS`, and new functions to `losses.py`. From outside the package:
`ESTIMATORS["mine"] = Estimator(Sampling(reward, advantage, surrogate))`.

Shapes: N groups, K actions or texts in each, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from agents.grpo import losses
from agents.grpo.losses import Batch, Loss

SAMPLED, ALL_ACTIONS = "sampled", "all_actions"
ANY = 2**31  # no upper limit
MAX_ORDER = 128
"""Largest K of a truncated closed form. Above 190, its weight would be within 5 % of that of
cross-entropy even at chance level (p = 1 / 64), making it supervised learning in effect."""

OPTIONAL = ("sync_every", "partial_credit", "reward_clip", "confidence_power", "confidence_clip")
"""Settings that must have their defaults unless the row allows them."""
_OFF_POLICY = frozenset({"sync_every", "reward_clip"})
_CREDIT = frozenset({"partial_credit", "reward_clip"})
_CONFIDENCE = frozenset({"confidence_power", "confidence_clip"})


class Sampling(NamedTuple):
    """How sampled actions or texts become a loss."""

    reward: Callable[[Tensor, Tensor], Tensor]
    """(actions (N, K), targets (N,)) -> (N, K); horizon 1. Texts have one reward, `roll_out`'s."""
    advantage: Callable[[Tensor], Tensor]
    """Rewards (N, K) -> advantages (N, K)."""
    surrogate: Callable[[Batch], Tensor]
    """Scalar loss."""
    min_group_size: int = 2


class Estimator(NamedTuple):
    """A row of the table: one or two forms of a loss, and the settings that they support."""

    sampled: Sampling | None
    """None if nothing is sampled."""
    all_actions: Callable[[Batch], Loss] | None = None
    """The loss over all actions, without sampling; None if there is no such form. Its gradient is
    the expectation of the sampled form's."""
    horizons: tuple[int, int] = (1, 1)
    """Smallest and largest horizon."""
    allows: frozenset[str] = frozenset()
    """Names from `OPTIONAL`; "sync_every" also stands for sampling by the operated model."""
    max_order: int | None = None
    """Largest K of an `all_actions` form that depends on K."""
    is_control: bool = False
    """Whether this is supervised learning."""


def policy_loss(batch: Batch) -> Loss:
    """Compute rewards, advantages and surrogate of a batch, by the estimator's row.

    Args:
        batch: without advantages; with rewards at horizons above 1.

    Raises:
        ValueError: if a reward or an advantage is not of shape (N, K).
    """
    config = batch.config
    estimator = ESTIMATORS[config.estimator]
    if config.exploration == ALL_ACTIONS:
        assert estimator.all_actions is not None
        return estimator.all_actions(batch)
    sampling = estimator.sampled
    assert sampling is not None
    if config.horizon == 1:
        rewards = sampling.reward(batch.actions, batch.targets)
        rewards = losses.paid(batch, _checked("rewards", rewards, batch), batch.actions)
    else:
        rewards = losses.clip_rewards(batch.rewards, config.regularizer.reward_clip)
    advantages = _checked("advantages", sampling.advantage(rewards), batch)
    value = sampling.surrogate(batch._replace(rewards=rewards, advantages=advantages))
    return Loss(value, rewards, advantages)


def _checked(what: str, values: Tensor, batch: Batch) -> Tensor:
    """Check that there is one value per sample; another shape could broadcast silently."""
    shape = batch.log_probs.shape[:2]
    if values.shape != shape:
        raise ValueError(
            f"{what} of an estimator must have shape {tuple(shape)}, one for each sample, "
            f"got {tuple(values.shape)}"
        )
    return values


def _proper_truncated(batch: Batch) -> Loss:
    order = batch.config.group_size
    score = losses.truncated_log_likelihood(batch.policy, batch.targets, order)
    return Loss(-score - losses.rarity_bonus(batch.policy, order))


def _truncated(batch: Batch) -> Loss:
    order = batch.config.group_size - 1  # the sampled form's baseline costs one term
    return Loss(-losses.truncated_log_likelihood(batch.policy, batch.targets, order))


def _brier(batch: Batch) -> Loss:
    return Loss(-losses.brier_score(batch.policy, batch.targets))


def _cross_entropy(batch: Batch) -> Loss:
    return Loss(-losses.log_likelihood(batch.policy, batch.targets))


_grpo = Sampling(losses.exact_match, losses.group_normalised, losses.clipped)
_floored = functools.partial(losses.group_normalised, min_std=0.1)

ESTIMATORS: dict[str, Estimator] = {
    "proper_maxrl": Estimator(
        Sampling(
            losses.exact_match,
            losses.share_of_success,
            losses.proper_reinforce,
            min_group_size=1,
        ),
        _proper_truncated,
        max_order=MAX_ORDER,
    ),
    "brier": Estimator(
        Sampling(losses.brier_reward, losses.leave_one_out, losses.reinforce, min_group_size=3),
        _brier,
    ),
    "maxrl": Estimator(
        Sampling(losses.exact_match, losses.mean_normalised, losses.reinforce),
        _truncated,
        max_order=MAX_ORDER,
    ),
    "grpo": Estimator(_grpo, horizons=(1, ANY), allows=_OFF_POLICY | _CREDIT),
    "dr_grpo": Estimator(
        _grpo._replace(advantage=losses.centred), horizons=(1, ANY), allows=_OFF_POLICY | _CREDIT
    ),
    "rloo": Estimator(
        _grpo._replace(advantage=losses.leave_one_out),
        horizons=(1, ANY),
        allows=_OFF_POLICY | _CREDIT,
    ),
    "gspo": Estimator(
        _grpo._replace(surrogate=losses.clipped_by_text), horizons=(2, ANY), allows=_OFF_POLICY
    ),
    "cispo": Estimator(
        _grpo._replace(surrogate=losses.clipped_importance), horizons=(2, ANY), allows=_OFF_POLICY
    ),
    "seed_sampled": Estimator(_grpo._replace(advantage=_floored), allows=_OFF_POLICY | _CREDIT),
    "seed_exhaustive": Estimator(None, losses.confidence_weighted, allows=_CREDIT | _CONFIDENCE),
    "ce": Estimator(None, _cross_entropy, is_control=True),
}
"""All estimators by name."""
