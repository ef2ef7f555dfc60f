"""Tests of agents/grpo/losses.py: values and gradients worked out by hand."""

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
from agents.grpo.losses import Batch

Surrogate = Callable[[Batch], Tensor]

CONFIG = GRPOConfig(clip=0.2, clip_high=0.28)
RATIO_SURROGATES = [losses.clipped, losses.clipped_by_text, losses.clipped_importance]
SURROGATES = [losses.reinforce, *RATIO_SURROGATES]
BASELINES = [losses.centred, losses.leave_one_out, losses.group_normalised]
ADVANTAGES = [*BASELINES, losses.mean_normalised, losses.share_of_success]


def exhaustive(policy: Tensor, credit: Tensor | None = None, **settings: float) -> losses.Loss:
    """Return the loss of `seed_exhaustive` where character 0 is right everywhere."""
    extra = RegularizerConfig(partial_credit=0.0 if credit is None else 1.0, **settings)
    form: dict[str, Any] = {"estimator": "seed_exhaustive", "exploration": "all_actions"}
    batch = Batch(GRPOConfig(regularizer=extra, **form), policy, torch.zeros(1, dtype=torch.int64))
    if credit is not None:
        batch = batch._replace(bigrams=credit.log())
    return losses.confidence_weighted(batch)


# Rewards.


def test_exact_match() -> None:
    rewards = losses.exact_match(torch.tensor([[3, 1, 3], [0, 0, 2]]), torch.tensor([3, 2]))
    assert rewards.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


def test_agreement_leaves_out_the_sample_itself() -> None:
    # Four samples, so three others: each of the three zeros agrees with two of its others.
    shares = losses.agreement(torch.tensor([[0, 0, 1, 0], [0, 1, 2, 3], [5, 5, 5, 5]]))
    third = 2 / 3
    expected = torch.tensor([[third, third, 0, third], [0.0] * 4, [1.0] * 4])
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize(
    ("actions", "target", "expected"),
    [
        # K = 4: the factor is 3/2, and each of the two zeros agrees with one of three others.
        ([0, 0, 1, 2], 0, [0.5, 0.5, 0.0, 0.0]),
        # K = 3: the factor is 2, and each of the two ones agrees with one of two others.
        ([1, 0, 1], 0, [-1.0, 1.0, -1.0]),
    ],
)
def test_brier_reward(actions: list[int], target: int, expected: list[float]) -> None:
    rewards = losses.brier_reward(torch.tensor([actions]), torch.tensor([target]))
    torch.testing.assert_close(rewards, torch.tensor([expected]))


def test_imitation_reward() -> None:
    # One prompt, two texts of two characters.
    log_probs = torch.tensor([[[0.5, 0.25], [0.5, 0.5]]]).log()
    reference = torch.tensor([[[0.25, 0.25], [1.0, 0.5]]]).log()
    expected = torch.tensor([[-0.5, 0.5]]) * math.log(2)
    torch.testing.assert_close(losses.imitation_reward(log_probs, reference), expected)


def test_only_leading_characters_match() -> None:
    real = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5]])
    written = torch.tensor(
        [[[1, 2, 3, 4], [1, 2, 0, 4], [0, 2, 3, 4]], [[5, 5, 5, 0], [0, 0, 0, 0], [1, 2, 3, 4]]]
    )
    assert losses.matching_prefix(written, real).tolist() == [[1.0, 0.5, 0.0], [0.75, 0.0, 0.0]]


# Advantages.

ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("advantage", "rewards", "expected"),
    [
        (losses.centred, [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        (losses.leave_one_out, [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),  # 0 - mean(1, 0, 0)
        # Sum of squares 3/4 over three degrees of freedom: standard deviation 1/2.
        (losses.group_normalised, [1, 0, 0, 0], [0.75 / 0.5001] + [-0.25 / 0.5001] * 3),
        (lambda r: losses.group_normalised(r, 0.1), [0.10, 0.12], [-0.01 / 0.1001, 0.01 / 0.1001]),
        (lambda r: losses.group_normalised(r, 0.1), [1, 0], [0.5 / (ROOT + 1e-4)] * 2),
        (losses.share_of_success, [1, 1, 0, 1], [4 / 3, 4 / 3, 0, 4 / 3]),
        (losses.share_of_success, [0, 0], [0, 0]),
        (losses.share_of_success, [1], [1]),
        (losses.mean_normalised, [1, 0, 0, 0], [3, -1, -1, -1]),
    ],
)
def test_advantages_by_hand(
    advantage: Callable[[Tensor], Tensor], rewards: list[float], expected: list[float]
) -> None:
    found = advantage(torch.tensor([rewards], dtype=torch.float32))
    if rewards == [1, 0]:
        expected[1] = -expected[0]
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_no_advantage(value: float) -> None:
    for group_size, advantage in itertools.product(range(2, 40), ADVANTAGES[:-1]):
        rewards = torch.full((1, group_size), value)
        assert torch.equal(advantage(rewards), torch.zeros_like(rewards)), group_size


# Surrogates.


def gradient(
    surrogate: Surrogate, ratios: Tensor, advantages: Tensor, behavior: Tensor | None = None
) -> tuple[float, Tensor]:
    """Return value and gradient by log-probabilities, (N, K, H), at these ratios."""
    behavior = torch.full_like(ratios, -1.0) if behavior is None else behavior
    log_probs = (behavior + ratios.log()).requires_grad_()
    batch = Batch(CONFIG, log_probs, log_probs=log_probs, behavior_log_probs=behavior)
    loss = surrogate(batch._replace(advantages=advantages))
    loss.backward()
    assert log_probs.grad is not None
    return loss.item(), log_probs.grad


def test_reinforce() -> None:
    # -(2 log 1/2 + (-1) log 1/4 + 0 + 4 log 1/4) / 4 = (2 - 2 + 8) log 2 / 4
    log_probs = torch.tensor([[0.5, 0.25], [0.25, 0.25]]).log()[:, :, None]
    advantages = torch.tensor([[2.0, -1.0], [0.0, 4.0]])
    loss, _ = gradient(losses.reinforce, torch.ones(2, 2, 1), advantages, log_probs)
    assert loss == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        # within the bounds: r A, whose derivative by log p is r A
        (1.0, 2.0, 2.0, 2.0),
        (0.81, 1.0, 0.81, 0.81),
        (1.25, 1.0, 1.25, 1.25),  # above 1 + clip: the upper bound is another
        (1.25, -1.0, -1.25, -1.25),
        # beyond them in the direction of the advantage: constant
        (1.5, 2.0, 2.56, 0.0),
        (0.5, -2.0, -1.6, 0.0),
        # beyond them against it: not bounded
        (0.5, 2.0, 1.0, 1.0),
        (1.5, -2.0, -3.0, -3.0),
    ],
)
def test_clipped(ratio: float, advantage: float, value: float, slope: float) -> None:
    loss, found = gradient(losses.clipped, torch.tensor([[[ratio]]]), torch.tensor([[advantage]]))
    assert loss == pytest.approx(-value, rel=1e-5)
    assert found.item() == pytest.approx(-slope, rel=1e-5)


def test_clipped_by_text_has_one_ratio_per_text() -> None:
    # (4 / 4)^(1/2) = 1 and (1.21 * 1)^(1/2) = 1.1
    ratios = torch.tensor([[[4.0, 0.25], [1.21, 1.0]]])
    loss, found = gradient(losses.clipped_by_text, ratios, torch.tensor([[2.0, -3.0]]))
    assert loss == pytest.approx(-(1.0 * 2.0 - 1.1 * 3.0) / 2)
    # d r / d log p_t = r / H, and the mean is over two texts: -A r / 4 for every character
    expected = torch.tensor([[[2.0, 2.0], [-3.3, -3.3]]]) / -4
    torch.testing.assert_close(found, expected)
    # sqrt 2 > 1.28: the whole text is dropped
    ratios = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    loss, found = gradient(losses.clipped_by_text, ratios, torch.tensor([[1.0, 1.0]]))
    assert loss == pytest.approx(-(1.28 + 1.0) / 2)
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0], [-0.25, -0.25]]]))


def test_clipped_importance() -> None:
    ratios = torch.tensor([[[2.0, 0.5], [1.0, 1.25]]])
    behavior = torch.full((1, 2, 2), math.log(0.25))
    advantages = torch.tensor([[1.0, -2.0]])
    loss, found = gradient(losses.clipped_importance, ratios, advantages, behavior)
    # min(r, 1.28) A log p, p = r / 4
    probs = (1.28, 0.5), (0.5, 0.125), (-2, 0.25), (-2.5, 0.3125)
    assert loss == pytest.approx(-sum(weight * math.log(p) for weight, p in probs) / 4, rel=1e-5)
    torch.testing.assert_close(found, torch.tensor([[[1.28, 0.5], [-2.0, -2.5]]]) / -4)


@pytest.mark.parametrize("surrogate", RATIO_SURROGATES)
def test_on_policy_the_gradient_is_that_of_reinforce_bit_for_bit(surrogate: Surrogate) -> None:
    generator = torch.Generator().manual_seed(0)
    behavior = -torch.rand(8, 4, 4, generator=generator)  # powers of two: no mean is rounded
    advantages = torch.randn(8, 4, generator=generator)
    ones = torch.ones_like(behavior)
    expected = gradient(losses.reinforce, ones, advantages, behavior)[1]
    assert expected.ne(0).all()
    assert torch.equal(gradient(surrogate, ones, advantages, behavior)[1], expected)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_advantages_and_behavior_are_constants(surrogate: Surrogate) -> None:
    log_probs = torch.tensor([[[-1.0], [-2.0]]], requires_grad=True)
    behavior = torch.tensor([[[-1.1], [-1.9]]], requires_grad=True)
    advantages = torch.tensor([[2.0, -1.0]], requires_grad=True)
    batch = Batch(CONFIG, log_probs, log_probs=log_probs, behavior_log_probs=behavior)
    surrogate(batch._replace(advantages=advantages)).backward()
    assert log_probs.grad is not None
    assert behavior.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_without_an_advantage_there_is_exactly_no_gradient(surrogate: Surrogate) -> None:
    ratios = torch.tensor([[[1.0, 0.1, 9.0]] * 3])
    assert torch.equal(gradient(surrogate, ratios, torch.zeros(1, 3))[1], torch.zeros_like(ratios))


# Scores of a distribution.


def by_log_p(score: Callable[[Tensor], Tensor], p: float) -> tuple[float, float]:
    """Return a score of (1, 1) log-probabilities and its derivative by `log p`."""
    log_p = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
    value = score(log_p)
    (slope,) = torch.autograd.grad(value, log_p)
    return value.item(), slope.item()


@pytest.mark.parametrize("order", [1, 2, 7, 128])
@pytest.mark.parametrize("p", [1e-6, 0.02, 0.5, 0.97, 1.0])
def test_the_truncated_likelihood_is_its_sum_in_value_and_gradient(p: float, order: int) -> None:
    def plain(log_p: Tensor) -> Tensor:
        return -torch.stack([(1 - log_p.exp()[0, 0]) ** k / k for k in range(1, order + 1)]).sum()

    target = torch.tensor([0])
    found = by_log_p(lambda log_p: losses.truncated_log_likelihood(log_p, target, order), p)
    assert found == pytest.approx(by_log_p(plain, p), rel=1e-9, abs=1e-12)


def test_the_truncated_likelihood_is_a_mean_and_finite_for_impossible_targets() -> None:
    log_probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    # order 2: -(1/2 + 1/8) and -(1/4 + 1/32)
    value = losses.truncated_log_likelihood(log_probs, torch.tensor([0, 1]), 2)
    assert value.item() == pytest.approx(-(0.625 + 0.28125) / 2)
    logits = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    value = losses.truncated_log_likelihood(logits.log_softmax(-1), torch.tensor([1]), 4)
    assert value.item() == pytest.approx(-(1 + 1 / 2 + 1 / 3 + 1 / 4))
    (slope,) = torch.autograd.grad(value, logits)
    assert slope.isfinite().all()


def test_the_rarity_bonus() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25]] * 2, dtype=torch.float64, requires_grad=True)
    bonus = losses.rarity_bonus(probs.log(), 2)
    # -((1/2)^3 + 2 (3/4)^3) / 3, a mean over positions; by p_a: (1 - p_a)^n
    assert bonus.item() == pytest.approx(-(1 / 8 + 2 * 27 / 64) / 3)
    (slope,) = torch.autograd.grad(bonus, probs)
    expected = torch.tensor([[1 / 4, 9 / 16, 9 / 16]] * 2, dtype=torch.float64) / 2
    torch.testing.assert_close(slope, expected)


def test_confidence_weights() -> None:
    policy = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    # Advantages 2/3, -1/3, -1/3; confidence 1.5^0.7 and 0.75^0.7.
    sure, unsure = 1.5**0.7, 0.75**0.7
    expected = -(sure * 2 / 3 * math.log(0.5) - 2 * unsure / 3 * math.log(0.25)) / 3
    assert exhaustive(policy).value.item() == pytest.approx(expected, rel=1e-6)
    # (3 p)^2 is 2.25 and 0.5625, and the weight is bounded.
    for clip, weights in ((9.0, [1.5, -0.1875, -0.1875]), (0.6, [0.4, -0.1875, -0.1875])):
        found = exhaustive(policy, confidence_power=2.0, confidence_clip=clip).advantages
        torch.testing.assert_close(found, torch.tensor([weights], dtype=torch.float64))


def test_confidence_is_a_constant_and_without_it_the_loss_is_linear() -> None:
    policy = torch.tensor([[0.96, 0.02, 0.02]], dtype=torch.float64).log().requires_grad_()
    (found,) = torch.autograd.grad(exhaustive(policy).value, policy)
    low = 0.06**0.7
    expected = torch.tensor([[2.0 * 2 / 3, -low / 3, -low / 3]], dtype=torch.float64) / -3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # 2.88^0.7 = 2.1, clipped
    (found,) = torch.autograd.grad(exhaustive(policy, confidence_power=0.0).value, policy)
    torch.testing.assert_close(found, torch.tensor([[2.0, -1, -1]], dtype=torch.float64) / -9)


# Regularisation.


def test_entropy_and_its_loss() -> None:
    log_probs = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]]).log()
    lower = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    mean = (3 * math.log(2) + lower) / 4
    assert losses.entropy(log_probs).item() == pytest.approx(mean)
    for bonus, floor, expected in (
        (0.0, 0.0, 0.0),
        (0.5, 0.0, -0.5 * mean),
        (0.0, 0.1, 0.0),  # there is enough entropy
        (0.5, 1.0, 1.0 - mean - 0.5 * mean),
    ):
        found = losses.entropy_loss(log_probs, bonus, floor).item()
        assert found == pytest.approx(expected, abs=1e-6)


def test_the_kl_divergence() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    reference = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    divergence = losses.kl_divergence(logits.log_softmax(-1), reference)
    # 1/2 log 2 + 0 + 1/4 log 1/2
    assert divergence.item() == pytest.approx(0.25 * math.log(2))
    (slope,) = torch.autograd.grad(divergence, logits)
    # p_a (log p_a / q_a - KL): 1/2 (1 - 1/4), 1/4 (-1/4), 1/4 (-1 - 1/4), times log 2
    expected = torch.tensor([[0.375, -0.0625, -0.3125]], dtype=torch.float64) * math.log(2)
    torch.testing.assert_close(slope, expected)
    assert losses.kl_divergence(reference, reference).item() == 0


@pytest.mark.parametrize(
    ("coefficient", "kl", "expected"),
    [
        (0.1, 0.8, 0.2),  # over 1.5 times the target of 0.5
        (0.1, 0.75, 0.1),
        (0.1, 0.34, 0.1),
        (0.1, 0.33, 0.05),  # under two thirds of it
        (8.0, 2.0, 10.0),
        (1.5e-4, 0.1, 1e-4),
        (0.1, math.nan, 0.1),
        (0.1, math.inf, 0.1),
    ],
)
def test_the_coefficient_adapts(coefficient: float, kl: float, expected: float) -> None:
    assert losses.adapted_coefficient(coefficient, kl, 0.5) == expected
