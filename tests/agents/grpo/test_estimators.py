"""Estimators by full enumeration: every target and every group there can be, three tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents.grpo import objectives
from agents.grpo.advantages import leave_one_out
from agents.grpo.estimators import (
    ALL_ACTIONS,
    ESTIMATORS,
    MOST_ORDER,
    SAMPLED,
    Question,
    Sampling,
    check_estimator,
    closed_form,
    sampled_loss,
    seed_exhaustive,
)
from agents.grpo.rewards import exact_match, others_that_agree
from avatarl_env.lm.generation import inverse_cdf

Sampled = Callable[[Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]

CLIP, CLIP_HIGH = 0.2, 0.28
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TRUTH = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
"""What the text says: the target is a random draw from this."""
SIZES = pytest.mark.parametrize("group_size", [3, 4, 6])


def loss_of(row: Sampling | str) -> Sampled:
    """Return the loss of a row, as the learner has it where the policy samples itself."""
    sampling = ESTIMATORS[row].sampled if isinstance(row, str) else row
    assert sampling is not None

    def loss(log_probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
        question = Question(log_probs, targets, actions.size(1))
        return sampled_loss(sampling, question, actions, log_probs.detach(), CLIP, CLIP_HIGH).loss

    return loss


def through_softmax(gradient: Tensor, probs: Tensor) -> Tensor:
    """Turn gradients by log-probabilities (N, V) into gradients by logits."""
    return gradient - probs * gradient.sum(-1, keepdim=True)


def gradients_by_logits(loss: Sampled, probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    """Return each position's own gradient of a loss that is a mean over positions: (N, V)."""
    log_probs = probs.log().expand(len(targets), -1).clone().requires_grad_()
    loss(log_probs, targets, actions).backward()
    assert log_probs.grad is not None
    return through_softmax(log_probs.grad * len(targets), probs)


def expected_gradient(
    loss: Sampled, probs: Tensor, truth: Tensor, group_size: int, behavior: Tensor | None = None
) -> Tensor:
    """Average the gradient over every target and every group there can be: (V,)."""
    n_tokens = len(probs)
    groups = torch.tensor(list(itertools.product(range(n_tokens), repeat=group_size)))
    chances = (probs if behavior is None else behavior)[groups].prod(1)  # (V ** K,)
    assert chances.sum().item() == pytest.approx(1.0)
    total = torch.zeros(n_tokens, dtype=torch.float64)
    for target in range(n_tokens):
        targets = torch.full((len(groups),), target)
        gradients = gradients_by_logits(loss, probs, targets, groups)
        total += truth[target] * (chances[:, None] * gradients).sum(0)
    return total


def exact_gradient(score: Score, probs: Tensor, truth: Tensor) -> Tensor:
    """Return the gradient by logits of a score's expectation over targets: (V,)."""
    logits = probs.log().clone().requires_grad_()
    log_probs = logits.log_softmax(-1)[None]
    scores = [score(log_probs, torch.tensor([target])) for target in range(len(probs))]
    (gradient,) = torch.autograd.grad((truth * torch.stack(scores)).sum(), logits)
    return gradient


def all_actions(name: str, order: int) -> Score:
    """Return the loss of a row's closed form."""
    row = ESTIMATORS[name]
    return lambda log_probs, targets: closed_form(row, Question(log_probs, targets, order)).loss


def truncated(order: int) -> Score:
    return lambda log_probs, targets: (
        -objectives.truncated_log_likelihood(log_probs, targets, order)
    )


def chance_of_success(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.exp().gather(1, targets[:, None]).mean()


def towards(wish: Tensor, probs: Tensor) -> Tensor:
    """Return `-sum_a p_a w_a (e_a - p)`: the logits' gradient where token a is wished w_a."""
    return -sum(
        (probs[a] * wish[a] * (torch.eye(len(probs), dtype=torch.float64)[a] - probs))
        for a in range(len(probs))
    )


def is_zero(gradient: Tensor) -> bool:
    return bool(gradient.abs().max() < 1e-7)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# By hand.


def test_the_loss_of_sampled_brier_by_hand() -> None:
    # Rewards 1/2, 1/2, 0, 0 (K = 4, c = 3/2); leave-one-out 1/3, 1/3, -1/3, -1/3.
    log_probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    loss = loss_of("brier")(log_probs, torch.tensor([0]), torch.tensor([[0, 0, 1, 2]]))
    # -(1/3) (-1 - 1 + 2 + 3) log 2 / 4
    assert loss.item() == pytest.approx(-math.log(2) / 4)


def test_the_losses_of_a_group_of_two_by_hand() -> None:
    # Rewards 1, 0: mean 1/2, standard deviation sqrt(1/2).
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    advantages = {
        "grpo": (0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)),
        "dr_grpo": (0.5, -0.5),
        "rloo": (1.0, -1.0),
        "maxrl": (1.0, -1.0),
        "seed_sampled": (0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)),
    }
    for name, (right, wrong) in advantages.items():
        loss = loss_of(name)(log_probs, torch.tensor([0]), torch.tensor([[0, 1]]))
        (gradient,) = torch.autograd.grad(loss, log_probs)
        expected = torch.tensor([[-right / 2, -wrong / 2, 0.0]])
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


def test_the_loss_of_sampled_proper_maxrl_by_hand() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    loss = loss_of("proper_maxrl")(log_probs, torch.tensor([0]), torch.tensor([[0, 1]]))
    # Advantages 2 and 0: -2 log(1/2) / 2, and order 2: ((1/2)^3 + 2 (3/4)^3) / 3.
    assert loss.item() == pytest.approx(math.log(2) + (1 / 8 + 27 / 32) / 3)
    # Nobody right: nothing but the bonus.
    loss = loss_of("proper_maxrl")(log_probs, torch.tensor([0]), torch.tensor([[1, 2]]))
    assert loss.item() == pytest.approx((1 / 8 + 27 / 32) / 3)


def test_partial_credit_is_added_to_the_reward() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    credit = torch.tensor([[0.1, 0.2, 0.7]])
    row = ESTIMATORS["dr_grpo"].sampled
    assert row is not None
    question = Question(log_probs, torch.tensor([0]), 2, credit)
    lesson = sampled_loss(row, question, torch.tensor([[0, 2]]), log_probs.detach(), CLIP, 1.0)
    (gradient,) = torch.autograd.grad(lesson.loss, log_probs)
    # 1.1 and 0.7, 0.2 from their mean
    torch.testing.assert_close(gradient, torch.tensor([[-0.1, 0.0, 0.1]]))


def test_the_first_recipe_has_a_floor_under_the_standard_deviation() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    row = ESTIMATORS["seed_sampled"].sampled
    assert row is not None
    credit = torch.tensor([[0.0, 0.04, 0.06]])
    question = Question(log_probs, torch.tensor([0]), 2, credit)
    lesson = sampled_loss(row, question, torch.tensor([[1, 2]]), log_probs.detach(), CLIP, 1.0)
    (gradient,) = torch.autograd.grad(lesson.loss, log_probs)
    # +-0.01 over 0.1, not over their own 0.014
    expected = torch.tensor([[0.0, 0.05, -0.05]])
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)


# In expectation.


@SIZES
@pytest.mark.parametrize("name", ["brier", "maxrl", "proper_maxrl"])
def test_sampling_has_the_gradient_of_all_actions(name: str, group_size: int) -> None:
    exact = exact_gradient(all_actions(name, group_size), POLICY, TRUTH)
    assert exact.abs().max() > 0.05
    assert_close(expected_gradient(loss_of(name), POLICY, TRUTH, group_size), exact)


@SIZES
def test_proper_maxrl_is_the_truncated_likelihood_and_a_bonus(group_size: int) -> None:
    def score(log_probs: Tensor, targets: Tensor) -> Tensor:
        bonus = objectives.rarity_bonus(log_probs, group_size)
        return truncated(group_size)(log_probs, targets) - bonus

    gradient = expected_gradient(loss_of("proper_maxrl"), POLICY, TRUTH, group_size)
    assert_close(gradient, exact_gradient(score, POLICY, TRUTH))


@pytest.mark.parametrize("group_size", [1, 2])
def test_proper_maxrl_needs_no_others_in_its_group(group_size: int) -> None:
    gradient = expected_gradient(loss_of("proper_maxrl"), POLICY, TRUTH, group_size)
    exact = exact_gradient(all_actions("proper_maxrl", group_size), POLICY, TRUTH)
    assert_close(gradient, exact)
    assert is_zero(expected_gradient(loss_of("proper_maxrl"), TRUTH, TRUTH, group_size))


@SIZES
def test_without_its_bonus_it_has_the_gradient_of_order_k_and_maxrl_that_of_one_less(
    group_size: int,
) -> None:
    row = ESTIMATORS["proper_maxrl"].sampled
    assert row is not None
    plain = expected_gradient(loss_of(row._replace(bonus=None)), POLICY, TRUTH, group_size)
    assert_close(plain, exact_gradient(truncated(group_size), POLICY, TRUTH))
    # The baseline of MaxRL is left out where nobody succeeded, and so has an expectation.
    maxrl = expected_gradient(loss_of("maxrl"), POLICY, TRUTH, group_size)
    assert_close(maxrl, exact_gradient(truncated(group_size - 1), POLICY, TRUTH))
    assert (maxrl - plain).abs().max() > 0.01


@SIZES
def test_rloo_has_the_gradient_of_the_chance_of_success_and_dr_grpo_a_share_of_it(
    group_size: int,
) -> None:
    exact = exact_gradient(chance_of_success, POLICY, TRUTH)
    assert_close(exact, towards(TRUTH, POLICY))
    assert_close(expected_gradient(loss_of("rloo"), POLICY, TRUTH, group_size), exact)
    share = (group_size - 1) / group_size
    assert_close(expected_gradient(loss_of("dr_grpo"), POLICY, TRUTH, group_size), share * exact)


@SIZES
@pytest.mark.parametrize("name", ["grpo", "seed_sampled"])
def test_the_group_norm_weighs_a_success_by_how_rare_it_is(name: str, group_size: int) -> None:
    # By a group's n successes: sqrt(n (K - n) / (K (K - 1))) each time, over p (1 - p) in all.
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
@pytest.mark.parametrize("name", ["brier", "proper_maxrl"])
def test_the_truth_is_a_fixed_point_of_a_proper_rule_and_nothing_else_is(
    name: str, group_size: int
) -> None:
    assert is_zero(expected_gradient(loss_of(name), TRUTH, TRUTH, group_size))
    assert is_zero(exact_gradient(all_actions(name, group_size), TRUTH, TRUTH))
    generator = torch.Generator().manual_seed(group_size)
    sharper, flatter = TRUTH**1.1 / (TRUTH**1.1).sum(), TRUTH**0.9 / (TRUTH**0.9).sum()
    others = torch.rand(20, 3, generator=generator, dtype=torch.float64) + 0.05
    for policy in (sharper, flatter, POLICY, *(others / others.sum(1, keepdim=True))):
        gradient = exact_gradient(all_actions(name, group_size), policy, TRUTH)
        assert gradient.abs().max() > 1e-3
        # and a step against it is towards the truth: strictly proper
        closer = (policy.log() - 0.01 * gradient).softmax(0)
        divergence = [(TRUTH * (TRUTH / p).log()).sum() for p in (policy, closer)]
        assert divergence[1] < divergence[0]


@pytest.mark.parametrize("order", [1, 2, 16, 128])
def test_every_truth_is_the_one_best_answer_under_a_proper_rule(order: int) -> None:
    score = all_actions("proper_maxrl", order)
    truths = torch.tensor([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.4 - 1e-4, 1e-4]])
    grid = [(a / 40, b / 40, (40 - a - b) / 40) for a in range(1, 39) for b in range(1, 40 - a)]

    def value(policy: Tensor, truth: Tensor) -> float:
        scores = [score(policy.log()[None], torch.tensor([y])) for y in range(3)]
        return float((truth * torch.stack(scores)).sum())

    for truth in truths.double():
        best = value(truth, truth)
        for policy in torch.tensor(grid[::7], dtype=torch.float64):
            assert value(policy, truth) > best or torch.allclose(policy, truth)


@SIZES
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "maxrl", "seed_sampled"])
def test_at_the_truth_the_others_go_on_sharpening(name: str, group_size: int) -> None:
    gradient = expected_gradient(loss_of(name), TRUTH, TRUTH, group_size)
    assert gradient[1] < -0.05  # a step against the gradient raises what is most probable,
    assert gradient[[0, 2]].min() > 0.01  # and lowers the rest


@SIZES
def test_without_the_correction_brier_is_biased(group_size: int) -> None:
    def reward(actions: Tensor, targets: Tensor) -> Tensor:
        return exact_match(actions, targets) - others_that_agree(actions)

    loss = loss_of(Sampling(reward, leave_one_out, objectives.reinforce))
    gradient = expected_gradient(loss, POLICY, TRUTH, group_size)
    # The baseline holds the sample's own collisions: what is charged is too little, and the
    # fixed point sharper than the truth.
    share = (group_size - 2) / (group_size - 1)
    assert_close(gradient, towards(TRUTH - share * POLICY, POLICY))
    assert (gradient - towards(TRUTH - POLICY, POLICY)).abs().max() > 5e-3
    assert not is_zero(expected_gradient(loss, TRUTH, TRUTH, group_size))


@SIZES
def test_sampled_brier_is_unbiased(group_size: int) -> None:
    gradient = expected_gradient(loss_of("brier"), POLICY, TRUTH, group_size)
    assert_close(gradient, towards(TRUTH - POLICY, POLICY))


@SIZES
def test_who_samples_makes_no_difference_to_rloo_while_nothing_is_clipped(group_size: int) -> None:
    row = ESTIMATORS["rloo"].sampled
    assert row is not None
    behavior = torch.tensor([0.25, 0.35, 0.4], dtype=torch.float64)

    def loss(clip: float) -> Sampled:
        def of(log_probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
            question = Question(log_probs, targets, group_size)
            sampled_with = behavior.log().expand_as(log_probs)
            return sampled_loss(row, question, actions, sampled_with, clip, clip).loss

        return of

    exact = exact_gradient(chance_of_success, POLICY, TRUTH)
    found = expected_gradient(loss(1e9), POLICY, TRUTH, group_size, behavior)
    assert_close(found, exact)
    bounded = expected_gradient(loss(0.2), POLICY, TRUTH, group_size, behavior)
    assert (bounded - exact).abs().max() > 0.01


# Closed forms.


def test_the_proper_rule_of_order_one_is_briers() -> None:
    for policy in (POLICY, TRUTH):
        for truth in (TRUTH, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)):
            first = exact_gradient(all_actions("proper_maxrl", 1), policy, truth)
            torch.testing.assert_close(
                first, exact_gradient(all_actions("brier", 1), policy, truth)
            )


@pytest.mark.parametrize("name", ["maxrl", "proper_maxrl"])
def test_the_larger_the_order_the_closer_to_cross_entropy(name: str) -> None:
    exact = exact_gradient(all_actions("ce", 0), POLICY, TRUTH)
    distances = [
        (exact_gradient(all_actions(name, order), POLICY, TRUTH) - exact).abs().max().item()
        for order in (2, 4, 8, 16, 32, 128)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.05
    assert distances[-1] < 1e-9


def test_cross_entropy_goes_straight_to_the_truth() -> None:
    assert_close(exact_gradient(all_actions("ce", 0), POLICY, TRUTH), POLICY - TRUTH)


def test_seed_exhaustive_by_hand() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    # Rewards 1, 0, 0: advantages 2/3, -1/3, -1/3. Confidence 1.5^0.7 and 0.75^0.7.
    sure, unsure = 1.5**0.7, 0.75**0.7
    expected = -(sure * 2 / 3 * math.log(0.5) - 2 * unsure / 3 * math.log(0.25)) / 3
    loss = seed_exhaustive(Question(log_probs, torch.tensor([0]), 16)).loss
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # Credits 0.3, 0, 0: advantages 1.3 - 1.3 / 3, and minus that third.
    credit = torch.tensor([[0.3, 0.0, 0.0]])
    expected = -(sure * 2.6 / 3 * math.log(0.5) - 2 * unsure * 1.3 / 3 * math.log(0.25)) / 3
    loss = seed_exhaustive(Question(log_probs, torch.tensor([0]), 16, credit)).loss
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_confidence_is_bounded_and_a_constant() -> None:
    log_probs = torch.tensor([[0.96, 0.02, 0.02]], dtype=torch.float64).log().requires_grad_()
    seed_exhaustive(Question(log_probs, torch.tensor([0]), 16)).loss.backward()
    low = 0.06**0.7
    expected = torch.tensor([[2.0 * 2 / 3, -low / 3, -low / 3]], dtype=torch.float64) / -3
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-6, atol=0)  # 2.88^0.7 = 2.1


def test_the_power_and_the_bound_of_confidence_can_be_chosen() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    question = Question(log_probs, torch.tensor([0]), 16)
    squared = seed_exhaustive(question._replace(confidence_power=2.0, confidence_clip=9.0))
    assert squared.advantages is not None
    # (3 p)^2 is 2.25 and 0.5625; advantages 2/3 and -1/3.
    expected = torch.tensor([[1.5, -0.1875, -0.1875]], dtype=torch.float64)
    torch.testing.assert_close(squared.advantages, expected)
    bounded = seed_exhaustive(question._replace(confidence_power=2.0, confidence_clip=0.6))
    assert bounded.advantages is not None
    expected = torch.tensor([[0.4, -0.1875, -0.1875]], dtype=torch.float64)
    torch.testing.assert_close(bounded.advantages, expected)


def test_rewards_are_clipped_after_credit_and_before_the_advantages() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    credit = torch.tensor([[0.5, -0.75, 0.25]])
    question = Question(log_probs, torch.tensor([0]), 3, credit, reward_clip=0.5)
    row = ESTIMATORS["dr_grpo"].sampled
    assert row is not None
    actions = torch.tensor([[0, 1, 2]])
    sampled = sampled_loss(row, question, actions, log_probs, CLIP, CLIP_HIGH)
    exhaustive = seed_exhaustive(question._replace(confidence_power=0.0))
    for lesson in (sampled, exhaustive):  # 1.5, -0.75 and 0.25 before
        assert lesson.rewards is not None
        assert lesson.advantages is not None
        torch.testing.assert_close(lesson.rewards, torch.tensor([[0.5, -0.5, 0.25]]))
        mean = 0.25 / 3
        expected = torch.tensor([[0.5 - mean, -0.5 - mean, 0.25 - mean]])
        torch.testing.assert_close(lesson.advantages, expected)


@pytest.mark.parametrize(
    "row",
    [
        Sampling(lambda actions, _: actions[:, :1].float(), leave_one_out, objectives.reinforce),
        Sampling(exact_match, lambda rewards: rewards.mean(1), objectives.reinforce),
    ],
)
def test_a_reward_or_an_advantage_of_another_shape_is_refused(row: Sampling) -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25]] * 2).log()
    question = Question(log_probs, torch.tensor([0, 1]), 3)
    actions = torch.tensor([[0, 1, 2]] * 2)
    with pytest.raises(
        ValueError,
        match=r"^(rewards|advantages) of an estimator must be of shape \(2, 3\), one for each "
        r"sample, got \(2,(?: 1)?\)$",
    ):
        sampled_loss(row, question, actions, log_probs, CLIP, CLIP_HIGH)


def test_without_confidence_seed_exhaustive_is_linear_in_the_logits() -> None:
    def gradient(policy: Tensor, power: float = 0.0) -> Tensor:
        def score(log_probs: Tensor, targets: Tensor) -> Tensor:
            question = Question(log_probs, targets, 16, confidence_power=power)
            return seed_exhaustive(question).loss

        return exact_gradient(score, policy, torch.eye(3).double()[1])

    assert (gradient(POLICY, 0.7) - gradient(TRUTH, 0.7)).abs().max() > 0.01
    constant = torch.tensor([1 / 3, -2 / 3, 1 / 3], dtype=torch.float64) / 3
    for policy in (POLICY, TRUTH, torch.tensor([1e-6, 1 - 2e-6, 1e-6], dtype=torch.float64)):
        assert_close(gradient(policy), constant)  # however right it already is


# Sampling noise.


@pytest.mark.parametrize("name", ["brier", "proper_maxrl"])
def test_the_mean_of_sampled_gradients_approaches_that_of_all_actions(name: str) -> None:
    n_draws = 20_000
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    targets = torch.full((n_draws,), 3)
    uniforms = torch.rand(n_draws, 16, generator=generator)
    actions = inverse_cdf(probs.log().expand(n_draws, -1), uniforms)
    gradients = gradients_by_logits(loss_of(name), probs, targets, actions)
    mean, error = gradients.mean(0), gradients.std(0) / math.sqrt(n_draws)
    exact = exact_gradient(all_actions(name, 16), probs, torch.eye(5, dtype=torch.float64)[3])
    assert error.max() < 0.01 * exact.abs().max()  # sharp enough to tell them apart
    # Five normal deviates beyond 4.5 by chance: once in 30,000 seeds, and the seed is fixed.
    assert ((mean - exact).abs() < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("name", ["brier", "proper_maxrl", "maxrl", "rloo"])
def test_more_samples_make_the_gradient_quieter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    spreads = []
    for group_size in (4, 16, 64):
        uniforms = torch.rand(4000, group_size, generator=generator)
        actions = inverse_cdf(POLICY.log().expand(4000, -1), uniforms)
        targets = torch.zeros(4000, dtype=torch.int64)
        spreads.append(gradients_by_logits(loss_of(name), POLICY, targets, actions).std(0).norm())
    assert spreads[0] > 1.5 * spreads[1] > 2 * spreads[2]


EQUAL_REWARDS = [
    pytest.param(name, actions, 1, id=f"{name}-{what}")
    for name in ("grpo", "dr_grpo", "rloo", "maxrl", "seed_sampled")
    for what, actions in (
        ("nobody-right", [0] * 16),
        ("nobody-right-and-mixed", [0, 2, 2, 0, 2]),
        ("everybody-right", [1] * 7),
    )
] + [
    pytest.param("brier", [0] * 16, 1, id="brier-unanimous-and-wrong"),
    pytest.param("brier", [0] * 7, 1, id="brier-unanimous-and-wrong-seven"),
    pytest.param("brier", [1] * 12, 1, id="brier-unanimous-and-right"),
    pytest.param("brier", [0, 2, 3], 1, id="brier-all-different-and-wrong"),
    pytest.param("brier", [0, 0, 2, 2, 3, 3], 1, id="brier-in-pairs-and-wrong"),
]


@pytest.mark.parametrize(("name", "actions", "target"), EQUAL_REWARDS)
def test_equal_rewards_give_exactly_no_gradient(name: str, actions: list[int], target: int) -> None:
    logits = torch.tensor([[0.3, -1.2, 0.7, 0.1]], requires_grad=True)
    loss = loss_of(name)
    loss(logits.log_softmax(-1), torch.tensor([target]), torch.tensor([actions])).backward()
    assert torch.equal(logits.grad, torch.zeros(1, 4))  # type: ignore[arg-type]


def test_brier_learns_where_nobody_was_right_and_grpo_does_not() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    actions = torch.tensor([[0, 0, 0, 2]])
    loss_of("brier")(logits.log_softmax(-1), torch.tensor([1]), actions).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0.1  # a step against it makes the crowd's answer rarer
    assert logits.grad[0, 2] < -0.1


def test_where_nobody_was_right_proper_maxrl_flattens() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    actions = torch.tensor([[0, 0, 0, 2]])
    loss_of("proper_maxrl")(logits.log_softmax(-1), torch.tensor([1]), actions).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0 > logits.grad[0, 1] == logits.grad[0, 2]


# The table.

FORMS = {
    "proper_maxrl": {SAMPLED, ALL_ACTIONS},
    "brier": {SAMPLED, ALL_ACTIONS},
    "maxrl": {SAMPLED, ALL_ACTIONS},
    "grpo": {SAMPLED},
    "dr_grpo": {SAMPLED},
    "rloo": {SAMPLED},
    "gspo": {SAMPLED},
    "cispo": {SAMPLED},
    "seed_sampled": {SAMPLED},
    "seed_exhaustive": {ALL_ACTIONS},
    "ce": {ALL_ACTIONS},
}
LEAST = {"proper_maxrl": 1, "brier": 3} | dict.fromkeys(
    ("maxrl", "grpo", "dr_grpo", "rloo", "gspo", "cispo", "seed_sampled"), 2
)
ONE_CHARACTER = ["proper_maxrl", "brier", "maxrl", "seed_sampled", "seed_exhaustive", "ce"]
TEXTS_ONLY = ["gspo", "cispo"]


def horizon_of(name: str) -> int:
    return 3 if name in TEXTS_ONLY else 1


def test_every_estimator_is_in_this_table() -> None:
    assert ESTIMATORS.keys() == FORMS.keys()


@pytest.mark.parametrize("exploration", [SAMPLED, ALL_ACTIONS])
@pytest.mark.parametrize("name", FORMS)
def test_a_combination_is_refused_unless_it_exists(name: str, exploration: str) -> None:
    estimator = ESTIMATORS[name]
    form = {SAMPLED: estimator.sampled, ALL_ACTIONS: estimator.all_actions}[exploration]
    if exploration in FORMS[name]:
        check_estimator(name, exploration, 16, horizon_of(name))
        assert form is not None
    else:
        assert form is None
        (other,) = FORMS[name]
        message = rf"^exploration must be {other} for {name}, got '{exploration}'$"
        with pytest.raises(ValueError, match=message):
            check_estimator(name, exploration, 16, horizon_of(name))


def test_only_cross_entropy_is_a_control() -> None:
    assert [name for name, estimator in ESTIMATORS.items() if estimator.is_control] == ["ce"]


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_the_smallest_group_is_where_the_sampled_form_has_a_value(name: str, least: int) -> None:
    check_estimator(name, SAMPLED, least, horizon_of(name))
    message = rf"^group_size must be at least {least} for {name}, got {least - 1}$"
    with pytest.raises(ValueError, match=message):
        check_estimator(name, SAMPLED, least - 1, horizon_of(name))
    loss = loss_of(name)(POLICY.log()[None], torch.tensor([0]), torch.arange(least)[None])
    assert loss.isfinite()


@pytest.mark.parametrize(("name", "least"), [("proper_maxrl", 1), ("maxrl", 2)])
def test_a_closed_form_that_is_cut_must_be_cut_before_it_is_a_control(
    name: str, least: int
) -> None:
    assert MOST_ORDER == 128
    check_estimator(name, ALL_ACTIONS, least)
    check_estimator(name, ALL_ACTIONS, 128)
    check_estimator(name, SAMPLED, 1000)  # what is sampled is no closed form
    for size in (least - 1, 129):
        message = rf"^group_size must be within {least} and 128 for {name} over all.*, got {size}$"
        with pytest.raises(ValueError, match=message):
            check_estimator(name, ALL_ACTIONS, size)
    # At chance level, 1 / 64, the weight of a success is still far from cross-entropy's.
    log_p = torch.tensor([[1 / 64]], dtype=torch.float64).log().requires_grad_()
    (slope,) = torch.autograd.grad(all_actions("maxrl", 128)(log_p, torch.tensor([0])), log_p)
    assert -slope.item() < 0.9


def test_the_group_size_is_no_matter_where_nothing_is_sampled() -> None:
    check_estimator("ce", ALL_ACTIONS, 0)
    check_estimator("brier", ALL_ACTIONS, 1)
    check_estimator("seed_exhaustive", ALL_ACTIONS, 0)


@pytest.mark.parametrize("name", FORMS)
def test_the_horizons_of_an_estimator(name: str) -> None:
    exploration = min(FORMS[name], key=lambda form: form != SAMPLED)
    with pytest.raises(ValueError, match=r"^horizon must be at least 1, got 0$"):
        check_estimator(name, exploration, 16, 0)
    if name in ONE_CHARACTER:
        check_estimator(name, exploration, 16, 1)
        with pytest.raises(ValueError, match=rf"^horizon must be 1 for {name}, got 2$"):
            check_estimator(name, exploration, 16, 2)
    elif name in TEXTS_ONLY:
        check_estimator(name, exploration, 16, 2)
        with pytest.raises(ValueError, match=rf"^horizon must be above 1 for {name}, got 1$"):
            check_estimator(name, exploration, 16, 1)
    else:
        check_estimator(name, exploration, 16, 1)
        check_estimator(name, exploration, 16, 2)


def test_unknown_names_are_refused_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"^estimator must be one of .*'brierr'.*'brier'\?$"):
        check_estimator("brierr", SAMPLED, 16)
    with pytest.raises(
        ValueError, match=r"^exploration must be sampled or all_actions for brier, got 'greedy'$"
    ):
        check_estimator("brier", "greedy", 16)
