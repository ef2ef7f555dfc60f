"""Tests of agents/grpo/estimators.py: expected gradients by full enumeration, and the table.

With three tokens every target and every group can be enumerated, so expectations are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.grpo import losses
from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.estimators import (
    ALL_ACTIONS,
    ESTIMATORS,
    SAMPLED,
    Estimator,
    Sampling,
    policy_loss,
)
from agents.grpo.losses import Batch, Loss

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log_probs (N, V), targets (N,), actions (N, K)) -> loss."""
Score = Callable[[Tensor, Tensor], Tensor]

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TRUTH = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
"""The distribution of the real next character."""
SIZES = pytest.mark.parametrize("group_size", [3, 5])
ONE_CHARACTER = [
    name for name, row in ESTIMATORS.items() if row.sampled is not None and row.horizons[0] == 1
]
BOTH_FORMS = [name for name in ONE_CHARACTER if ESTIMATORS[name].all_actions is not None]


def lesson(
    name: str,
    log_probs: Tensor,
    targets: Tensor,
    actions: Tensor,
    behavior: Tensor | None = None,
    **settings: Any,
) -> Loss:
    """Return the sampled loss of an estimator as the learner has it, on-policy by default."""
    config = GRPOConfig(estimator=name, group_size=actions.size(1), **settings)
    behavior = log_probs.detach() if behavior is None else behavior
    taken, sampled_with = (x.gather(1, actions)[:, :, None] for x in (log_probs, behavior))
    batch = Batch(config, log_probs, targets, actions=actions, log_probs=taken)
    return policy_loss(batch._replace(behavior_log_probs=sampled_with))


def loss_of(name: str, **settings: Any) -> LossFn:
    return lambda *arguments: lesson(name, *arguments, **settings).value


def all_actions(name: str, group_size: int = 16) -> Score:
    """Return the loss of an estimator's closed form."""
    config = GRPOConfig(estimator=name, exploration=ALL_ACTIONS, group_size=group_size)
    return lambda log_probs, targets: policy_loss(Batch(config, log_probs, targets)).value


def truncated(order: int) -> Score:
    return lambda log_probs, targets: -losses.truncated_log_likelihood(log_probs, targets, order)


def chance_of_success(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.exp().gather(1, targets[:, None]).mean()


def gradients_by_logits(loss: LossFn, probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    """Return each position's own gradient of a loss that is a mean over positions: (N, V)."""
    log_probs = probs.log().expand(len(targets), -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(log_probs, targets, actions), log_probs)
    gradient = gradient * len(targets)
    return gradient - probs * gradient.sum(-1, keepdim=True)  # through the softmax


def expected_gradient(
    loss: LossFn, probs: Tensor, truth: Tensor, group_size: int, behavior: Tensor | None = None
) -> Tensor:
    """Average the gradient over every target and every possible group: (V,)."""
    groups = torch.tensor(list(itertools.product(range(len(probs)), repeat=group_size)))
    chances = (probs if behavior is None else behavior)[groups].prod(1)  # (V ** K,)
    assert chances.sum().item() == pytest.approx(1.0)
    total = torch.zeros_like(probs)
    for target, chance in enumerate(truth):
        targets = torch.full((len(groups),), target)
        gradients = gradients_by_logits(loss, probs, targets, groups)
        total += chance * (chances[:, None] * gradients).sum(0)
    return total


def exact_gradient(score: Score, probs: Tensor, truth: Tensor) -> Tensor:
    """Return the gradient by logits of a score's expectation over targets: (V,)."""
    logits = probs.log().clone().requires_grad_()
    log_probs = logits.log_softmax(-1)[None]
    scores = [score(log_probs, torch.tensor([target])) for target in range(len(probs))]
    (gradient,) = torch.autograd.grad((truth * torch.stack(scores)).sum(), logits)
    return gradient


def towards(wish: Tensor, probs: Tensor) -> Tensor:
    """Return `-sum_a p_a w_a (e_a - p)`: the gradient by logits if token a has advantage w_a."""
    return -(probs * wish) @ (torch.eye(len(probs), dtype=torch.float64) - probs)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# By hand.


def credited(name: str, credit: list[float], actions: list[int], **extra: float) -> Loss:
    """Return the loss where character 0 is right and characters have partial credit."""
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    form = SAMPLED if ESTIMATORS[name].sampled else ALL_ACTIONS
    regularizer = RegularizerConfig(partial_credit=1.0, **extra)
    config = GRPOConfig(estimator=name, exploration=form, regularizer=regularizer)
    taken = log_probs.gather(1, torch.tensor([actions]))[:, :, None]
    batch = Batch(config, log_probs, torch.tensor([0]), torch.tensor([credit]).log())
    batch = batch._replace(actions=torch.tensor([actions]), log_probs=taken)
    return policy_loss(batch._replace(behavior_log_probs=taken))


@pytest.mark.parametrize("name", ["dr_grpo", "seed_exhaustive"])
def test_credit_is_added_and_then_clipped(name: str) -> None:
    extra = {"confidence_power": 0.0} if name == "seed_exhaustive" else {}
    loss = credited(name, [0.1, 0.2, 0.7], [0, 1, 2], reward_clip=0.5, **extra)
    assert loss.rewards is not None
    assert loss.advantages is not None
    torch.testing.assert_close(loss.rewards, torch.tensor([[0.5, 0.2, 0.5]]))  # from 1.1, 0.2, 0.7
    torch.testing.assert_close(loss.advantages, torch.tensor([[0.1, -0.2, 0.1]]))


def test_seed_sampled_has_a_floor_under_the_standard_deviation() -> None:
    advantages = credited("seed_sampled", [0.001, 0.04, 0.06], [1, 2]).advantages
    assert advantages is not None
    # +-0.01 over 0.1, not over their own 0.014
    torch.testing.assert_close(advantages, torch.tensor([[-0.1, 0.1]]), rtol=2e-3, atol=0)


# In expectation.


@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("name", BOTH_FORMS)
def test_sampling_has_the_gradient_of_all_actions(name: str, extra: int) -> None:
    row = ESTIMATORS[name].sampled
    assert row is not None
    group_size = row.min_group_size + extra
    exact = exact_gradient(all_actions(name, group_size), POLICY, TRUTH)
    assert exact.abs().max() > 0.05
    assert_close(expected_gradient(loss_of(name), POLICY, TRUTH, group_size), exact)


@SIZES
def test_the_expected_gradients_of_the_others(group_size: int) -> None:
    success = exact_gradient(chance_of_success, POLICY, TRUTH)
    assert_close(success, towards(TRUTH, POLICY))
    expected = {
        "rloo": success,
        "dr_grpo": (group_size - 1) / group_size * success,
        "brier": towards(TRUTH - POLICY, POLICY),
        # MaxRL's baseline is dropped in groups without success, which costs one term.
        "maxrl": exact_gradient(truncated(group_size - 1), POLICY, TRUTH),
    }
    for name, gradient in expected.items():
        assert_close(expected_gradient(loss_of(name), POLICY, TRUTH, group_size), gradient)
    plain = expected_gradient(loss_of("proper_maxrl"), POLICY, TRUTH, group_size)
    bonus = exact_gradient(lambda p, _: losses.rarity_bonus(p, group_size), POLICY, TRUTH)
    assert_close(plain + bonus, exact_gradient(truncated(group_size), POLICY, TRUTH))


@SIZES
@pytest.mark.parametrize("name", ["grpo", "seed_sampled"])
def test_group_normalisation_weighs_a_success_by_how_rare_it_is(name: str, group_size: int) -> None:
    # For n successes of probability p: sqrt(n (K - n) / (K (K - 1))), over p (1 - p) in all.
    gradient = expected_gradient(loss_of(name), POLICY, TRUTH, group_size)
    expected = torch.zeros(3, dtype=torch.float64)
    for target in range(3):
        p, weight = float(POLICY[target]), 0.0
        for n in range(1, group_size):
            std = math.sqrt(n * (group_size - n) / (group_size * (group_size - 1)))
            moved = n * (group_size - n) / group_size**2 / (std + 1e-4)
            chance = math.comb(group_size, n) * p**n * (1 - p) ** (group_size - n)
            weight += chance * moved / (p * (1 - p))
        one = torch.eye(3, dtype=torch.float64)[target]
        expected += TRUTH[target] * weight * towards(one, POLICY)
    assert_close(gradient, expected)


@SIZES
@pytest.mark.parametrize("name", ONE_CHARACTER)
def test_only_proper_rules_keep_the_truth(name: str, group_size: int) -> None:
    gradient = expected_gradient(loss_of(name), TRUTH, TRUTH, group_size)
    if name in ("brier", "proper_maxrl"):
        assert gradient.abs().max() < 1e-7
    else:
        assert gradient[1] < -0.05  # a step raises what is most probable,
        assert gradient[[0, 2]].min() > 0.01  # and lowers the rest


@pytest.mark.parametrize("name", ["brier", "proper_maxrl"])
@pytest.mark.parametrize("order", [1, 2, 16, 128])
def test_the_truth_is_the_only_optimum_of_a_proper_rule(name: str, order: int) -> None:
    score = all_actions(name, order)
    truths = torch.tensor([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.4 - 1e-4, 1e-4]])
    grid = [(a / 40, b / 40, (40 - a - b) / 40) for a in range(1, 39) for b in range(1, 40 - a)]

    def value(policy: Tensor, truth: Tensor) -> float:
        scores = [score(policy.log()[None], torch.tensor([y])) for y in range(3)]
        return float((truth * torch.stack(scores)).sum())

    for truth in truths.double():
        best = value(truth, truth)
        for policy in torch.tensor(grid[::17], dtype=torch.float64):
            assert value(policy, truth) > best or torch.allclose(policy, truth)


@SIZES
def test_off_policy_rloo_is_unbiased_unless_ratios_are_clipped(group_size: int) -> None:
    behavior = torch.tensor([0.25, 0.35, 0.4], dtype=torch.float64)

    def gradient(clip: float) -> Tensor:
        def loss(log_probs: Tensor, *rest: Tensor) -> Tensor:
            sampled_with = behavior.log().expand_as(log_probs)
            return lesson("rloo", log_probs, *rest, sampled_with, clip=clip, clip_high=clip).value

        return expected_gradient(loss, POLICY, TRUTH, group_size, behavior)

    exact = exact_gradient(chance_of_success, POLICY, TRUTH)
    assert_close(gradient(1e9), exact)
    assert (gradient(0.2) - exact).abs().max() > 0.01


def test_closed_forms_between_brier_and_cross_entropy() -> None:
    exact = exact_gradient(all_actions("ce"), POLICY, TRUTH)
    assert_close(exact, POLICY - TRUTH)
    brier = exact_gradient(all_actions("brier"), POLICY, TRUTH)
    torch.testing.assert_close(exact_gradient(all_actions("proper_maxrl", 1), POLICY, TRUTH), brier)
    for name in ("maxrl", "proper_maxrl"):
        found = [exact_gradient(all_actions(name, k), POLICY, TRUTH) for k in (2, 4, 8, 32, 128)]
        distances = [(gradient - exact).abs().max().item() for gradient in found]
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 0.05
        assert distances[-1] < 1e-9


EQUAL_REWARDS = [("brier", actions) for actions in ([0] * 7, [1] * 12, [0, 2, 3], [0, 0, 2, 2])]
EQUAL_REWARDS += [
    (name, actions)
    for name in ("grpo", "dr_grpo", "rloo", "maxrl", "seed_sampled")
    for actions in ([0] * 16, [0, 2, 2, 0, 2], [1] * 7)
]


@pytest.mark.parametrize(("name", "actions"), EQUAL_REWARDS)
def test_equal_rewards_give_exactly_no_gradient(name: str, actions: list[int]) -> None:
    logits = torch.tensor([[0.3, -1.2, 0.7, 0.1]], requires_grad=True)
    loss = loss_of(name)(logits.log_softmax(-1), torch.tensor([1]), torch.tensor([actions]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient, torch.zeros(1, 4))


# The table.


@pytest.mark.parametrize(
    "row",
    [
        Sampling(lambda actions, _: actions[:, :1].float(), losses.leave_one_out, losses.reinforce),
        Sampling(losses.exact_match, lambda rewards: rewards.mean(1), losses.reinforce),
    ],
)
def test_a_users_own_estimator_is_checked(row: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "mine", Estimator(row))
    log_probs, actions = torch.zeros(2, 3), torch.tensor([[0, 1, 2]] * 2)
    message = r"^(rewards|advantages) .* shape \(2, 3\).* got \(2,(?: 1)?\)$"
    with pytest.raises(ValueError, match=message):
        lesson("mine", log_probs, torch.tensor([0, 1]), actions)
