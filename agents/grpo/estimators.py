"""Estimators by name: what is rewarded, against what, and which surrogate turns it into a gradient.

The state is the text so far, the action the next character (horizon 1) or the next H characters.
At horizon 1 every position of a real text window is an episode, and K actions are sampled from one
forward. What differs from GRPO as published (arXiv 2402.03300), and why:

1. Old policy: by default the policy itself, so ratios are 1 and nothing is clipped, since each
   batch is used once; `sync_every` keeps an older one.
2. No KL to a reference model by default: training starts from random weights, there is none to
   stay close to.
3. No length normalisation: all episodes are equally long.

What can be had of rewards of 0 and 1 where one action alone is right: the gradient of MaxRL is, at
a position where one of the K samples was right, that of cross-entropy, and elsewhere nothing. What
`proper_maxrl` adds is a sum over all actions of the policy's own probabilities, which asks the
text nothing.

`seed_sampled` and `seed_exhaustive` are the two recipes for this task that came before, kept
to show where they end. What had to be made differently:

1. Every position of a window is an episode, not its last one alone.
2. The partial credit is the bigram's probability of the character, which is never negative; the
   sources also had a log-probability in its place.
3. `seed_sampled` adapts its KL coefficient by PPO's rule; the sources have several schedules.
4. `seed_exhaustive` scales advantages by `min((V p)^0.7, 2)`: confidence relative to chance,
   to the power and with the bound that the source names; how it combines them is not known to us.
   Both are options, `confidence_power` and `confidence_clip`.
5. The entropy floor is a penalty of `max(0, floor - entropy)`.

Shapes: N positions, K actions at each, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agents.grpo import advantages, objectives
from agents.grpo.rewards import brier_reward, exact_match, within
from avatarl_env.errors import check_choice

SAMPLED, ALL_ACTIONS = "sampled", "all_actions"

Surrogate = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]

SEED_LEAST_STD = 0.1
CONFIDENCE_POWER, MOST_CONFIDENCE = 0.7, 2.0
MOST_ORDER = 128
"""Largest K of a closed form that is cut after K or K - 1 terms. Beyond 190 its weight would be
within 5 % of cross-entropy's even at chance level (p = 1 / 64): a control by another name."""


class Question(NamedTuple):
    """Where the policy stands at real positions, and what is right there."""

    log_probs: Tensor
    """(N, V) of the policy; the gradient flows through them."""
    targets: Tensor
    """(N,) the characters that follow."""
    order: int
    """K: closed forms of truncated likelihoods have the expected gradient of groups of K."""
    credit: Tensor | None = None
    """(N, V) partial credit for each action, or None."""
    reward_clip: float = 0.0
    """Largest absolute reward, credit included; 0: no bound."""
    confidence_power: float = CONFIDENCE_POWER
    """Of the confidence that `seed_exhaustive` weighs advantages by."""
    confidence_clip: float = MOST_CONFIDENCE
    """Largest such weight."""


class Lesson(NamedTuple):
    """What an estimator makes of a batch."""

    loss: Tensor
    """To be minimised, one number."""
    rewards: Tensor | None = None
    """(N, K) as they were paid; None for closed forms that need none."""
    advantages: Tensor | None = None
    """(N, K), with all weights."""


class Sampling(NamedTuple):
    """How an estimator makes a gradient of sampled actions or texts."""

    reward: Callable[[Tensor, Tensor], Tensor]
    """(actions (N, K), targets (N,)) -> (N, K); at horizon 1."""
    advantage: Callable[[Tensor], Tensor]
    """(N, K) -> (N, K)."""
    surrogate: Surrogate
    least_group: int = 2
    """Smallest K."""
    bonus: Callable[[Tensor, int], Tensor] | None = None
    """(log_probs (N, V), K) -> number: to be maximised too, a property of the policy alone."""


class Estimator(NamedTuple):
    """An estimator in its two forms; None where it has no such form."""

    sampled: Sampling | None
    all_actions: Callable[[Question], Tensor | Lesson] | None
    """The loss, or a lesson; its gradient is the sampled form's, expected over all actions."""
    horizons: str = "1"
    """"1", "many" (above 1) or "any"."""
    takes_credit: bool = False
    """Whether partial credit makes sense: where the optimum is not a distribution anyway."""
    most_order: int | None = None
    """Largest K of `all_actions`, where that depends on K."""
    is_control: bool = False
    """Whether this is a supervised control."""
    weighs_confidence: bool = False
    """Whether advantages are weighted by the policy's confidence."""

    @property
    def clips_rewards(self) -> bool:
        """Whether a bound on rewards makes sense: where they are more than right or wrong."""
        return self.takes_credit or self.horizons != "1"

    @property
    def is_off_policy(self) -> bool:
        """Whether somebody else may sample: an older policy, or the operated model."""
        return self.sampled is not None and self.sampled.surrogate is not objectives.reinforce


def _brier(question: Question) -> Tensor:
    return -objectives.brier_score(question.log_probs, question.targets)


def _cross_entropy(question: Question) -> Tensor:
    return -objectives.log_likelihood(question.log_probs, question.targets)


def _truncated(question: Question) -> Tensor:
    log_probs, targets, order, *_ = question
    return -objectives.truncated_log_likelihood(log_probs, targets, order)


def _maxrl(question: Question) -> Tensor:
    return _truncated(question._replace(order=question.order - 1))  # as its sampled form


def _proper_truncated(question: Question) -> Tensor:
    return _truncated(question) - objectives.rarity_bonus(question.log_probs, question.order)


def seed_exhaustive(question: Question) -> Lesson:
    """Return the older recipe's loss over all actions, `-mean_a(s_a A_a log p_a)`.

    `A_a = r_a - mean r` with r exact match plus credit, and `s_a = min((V p_a)^w, c)`, w the
    `confidence_power` and c the `confidence_clip`. No weight p_a: without s the loss is linear
    in the logits and its gradient never vanishes, so that nothing but an entropy floor keeps it
    from diverging.
    """
    log_probs, targets = question.log_probs, question.targets
    vocab_size = log_probs.size(1)
    every = torch.arange(vocab_size, device=targets.device).expand_as(log_probs)
    rewards = exact_match(every, targets)
    if question.credit is not None:
        rewards = rewards + question.credit
    rewards = within(rewards, question.reward_clip)
    confidence = (vocab_size * log_probs.detach().exp()) ** question.confidence_power
    weights = confidence.clamp_max(question.confidence_clip) * advantages.centred(rewards)
    return Lesson(-(weights * log_probs).mean(), rewards, weights)


def sampled_loss(
    sampling: Sampling,
    question: Question,
    actions: Tensor,
    behavior_log_probs: Tensor,
    clip: float,
    clip_high: float,
) -> Lesson:
    """Return the loss of sampled next characters: rewarded, held against each other, weighed.

    Args:
        sampling: the estimator's row.
        question: where the policy stands, and what is right there.
        actions: (N, K) int64, what was sampled.
        behavior_log_probs: (N, V) of who sampled it.
        clip: how far below 1 a ratio counts.
        clip_high: how far above.
    """
    rewards = sampling.reward(actions, question.targets)
    if question.credit is not None:
        rewards = rewards + question.credit.gather(1, actions)
    rewards = within(_of_samples("rewards", rewards, actions), question.reward_clip)
    taken = question.log_probs.gather(1, actions)[:, :, None]  # (N, K, 1)
    sampled_with = behavior_log_probs.gather(1, actions)[:, :, None]
    relative = _of_samples("advantages", sampling.advantage(rewards), actions)
    loss = sampling.surrogate(taken, sampled_with, relative, clip, clip_high)
    if sampling.bonus is not None:
        loss = loss - sampling.bonus(question.log_probs, question.order)
    return Lesson(loss, rewards, relative)


def closed_form(estimator: Estimator, question: Question) -> Lesson:
    """Return what an estimator makes of a batch over all actions."""
    assert estimator.all_actions is not None
    made = estimator.all_actions(question)
    return made if isinstance(made, Lesson) else Lesson(made)


def _of_samples(what: str, values: Tensor, actions: Tensor) -> Tensor:
    """Return one number for each sample, checked: another shape would broadcast unnoticed."""
    if values.shape != actions.shape:
        raise ValueError(
            f"{what} of an estimator must be of shape {tuple(actions.shape)}, one for each sample, "
            f"got {tuple(values.shape)}"
        )
    return values


_grpo = Sampling(exact_match, advantages.group_normalised, objectives.clipped)

ESTIMATORS: dict[str, Estimator] = {
    "proper_maxrl": Estimator(
        Sampling(
            exact_match,
            advantages.share_of_success,
            objectives.reinforce,
            least_group=1,
            bonus=objectives.rarity_bonus,
        ),
        _proper_truncated,
        most_order=MOST_ORDER,
    ),
    "brier": Estimator(
        Sampling(brier_reward, advantages.leave_one_out, objectives.reinforce, least_group=3),
        _brier,
    ),
    "maxrl": Estimator(
        Sampling(exact_match, advantages.mean_normalised, objectives.reinforce),
        _maxrl,
        most_order=MOST_ORDER,
    ),
    "grpo": Estimator(_grpo, None, horizons="any", takes_credit=True),
    "dr_grpo": Estimator(
        _grpo._replace(advantage=advantages.centred), None, horizons="any", takes_credit=True
    ),
    "rloo": Estimator(
        _grpo._replace(advantage=advantages.leave_one_out), None, horizons="any", takes_credit=True
    ),
    "gspo": Estimator(_grpo._replace(surrogate=objectives.clipped_by_text), None, horizons="many"),
    "cispo": Estimator(
        _grpo._replace(surrogate=objectives.clipped_importance), None, horizons="many"
    ),
    "seed_sampled": Estimator(
        _grpo._replace(
            advantage=functools.partial(advantages.group_normalised, least_std=SEED_LEAST_STD)
        ),
        None,
        takes_credit=True,
    ),
    "seed_exhaustive": Estimator(None, seed_exhaustive, takes_credit=True, weighs_confidence=True),
    "ce": Estimator(None, _cross_entropy, is_control=True),
}
"""Estimators by name."""


def check_estimator(name: str, exploration: str, group_size: int, horizon: int = 1) -> None:
    """Raise a ValueError unless there is such an estimator, and it explores so, so far, with K."""
    check_choice("estimator", name, ESTIMATORS)
    estimator = ESTIMATORS[name]
    forms = {SAMPLED: estimator.sampled, ALL_ACTIONS: estimator.all_actions}
    possible = [form for form, function in forms.items() if function is not None]
    if exploration not in possible:
        raise ValueError(
            f"exploration must be {' or '.join(possible)} for {name}, got {exploration!r}"
        )
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if estimator.horizons == "1" and horizon > 1:
        raise ValueError(f"horizon must be 1 for {name}, got {horizon}")
    if estimator.horizons == "many" and horizon == 1:
        raise ValueError(f"horizon must be above 1 for {name}, got {horizon}")
    least = 0 if estimator.sampled is None else estimator.sampled.least_group
    if exploration == SAMPLED and group_size < least:
        raise ValueError(f"group_size must be at least {least} for {name}, got {group_size}")
    most = estimator.most_order
    if exploration == ALL_ACTIONS and most is not None and not least <= group_size <= most:
        raise ValueError(
            f"group_size must be within {least} and {most} for {name} over all actions, "
            f"got {group_size}"
        )
