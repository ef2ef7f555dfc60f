from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents.grpo.objectives import (
    adapted,
    brier_score,
    clipped,
    clipped_by_text,
    clipped_importance,
    entropy,
    kl_divergence,
    log_likelihood,
    rarity_bonus,
    reinforce,
    truncated_log_likelihood,
)

Surrogate = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]

CLIP, CLIP_HIGH = 0.2, 0.28
SURROGATES = [reinforce, clipped, clipped_by_text, clipped_importance]
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def gradient(
    surrogate: Surrogate, ratios: Tensor, advantages: Tensor, behavior: Tensor | None = None
) -> tuple[float, Tensor]:
    """Return value and gradient by log-probabilities, (N, K, H), at these ratios."""
    behavior = torch.full_like(ratios, -1.0) if behavior is None else behavior
    log_probs = (behavior + ratios.log()).requires_grad_()
    loss = surrogate(log_probs, behavior, advantages, CLIP, CLIP_HIGH)
    loss.backward()
    assert log_probs.grad is not None
    return loss.item(), log_probs.grad


# Surrogates.


def test_reinforce_by_hand() -> None:
    # -(2 log 1/2 + (-1) log 1/4 + 0 + 4 log 1/4) / 4 = (2 - 2 + 8) log 2 / 4
    log_probs = torch.tensor([[0.5, 0.25], [0.25, 0.25]]).log()[:, :, None]
    advantages = torch.tensor([[2.0, -1.0], [0.0, 4.0]])
    loss = reinforce(log_probs, log_probs, advantages, CLIP, CLIP_HIGH)
    assert loss.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        # within the bounds: r A, whose derivative by log p is r A
        (1.0, 2.0, 2.0, 2.0),
        (0.81, 1.0, 0.81, 0.81),
        (1.25, 1.0, 1.25, 1.25),  # above 1 + clip: the upper bound is another
        (1.25, -1.0, -1.25, -1.25),
        # beyond them, where it has already gone as far as it should: constant
        (1.5, 2.0, 2.56, 0.0),
        (0.5, -2.0, -1.6, 0.0),
        # beyond them on the other side, where it has to come back: not bounded
        (0.5, 2.0, 1.0, 1.0),
        (1.5, -2.0, -3.0, -3.0),
    ],
)
def test_clip_higher_by_hand(ratio: float, advantage: float, value: float, slope: float) -> None:
    loss, found = gradient(clipped, torch.tensor([[[ratio]]]), torch.tensor([[advantage]]))
    assert loss == pytest.approx(-value, rel=1e-5)
    assert found.item() == pytest.approx(-slope, rel=1e-5)


def test_the_mean_is_over_groups_actions_and_characters() -> None:
    ratios = torch.tensor([[[1.0, 1.1], [0.9, 1.0]]])
    loss, found = gradient(clipped, ratios, torch.tensor([[3.0, -1.0]]))
    assert loss == pytest.approx(-(3.0 + 3.3 - 0.9 - 1.0) / 4)
    expected = torch.tensor([[[3.0, 3.3], [-0.9, -1.0]]]) / -4
    torch.testing.assert_close(found, expected)


def test_a_texts_ratio_is_the_geometric_mean_of_its_characters() -> None:
    # (4 / 4)^(1/2) = 1 and (1.21 * 1)^(1/2) = 1.1
    ratios = torch.tensor([[[4.0, 0.25], [1.21, 1.0]]])
    loss, found = gradient(clipped_by_text, ratios, torch.tensor([[2.0, -3.0]]))
    assert loss == pytest.approx(-(1.0 * 2.0 - 1.1 * 3.0) / 2)
    # d r / d log p_t = r / H, and the mean is over two texts: -A r / 4, alike for all characters
    expected = torch.tensor([[[2.0, 2.0], [-3.3, -3.3]]]) / -4
    torch.testing.assert_close(found, expected)
    # taken character by character, three of these four would not count as they are
    assert gradient(clipped, ratios, torch.tensor([[2.0, -3.0]]))[1][0, 0, 0] == 0


def test_a_text_that_went_too_far_is_dropped_whole() -> None:
    ratios = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])  # sqrt 2 > 1.28
    loss, found = gradient(clipped_by_text, ratios, torch.tensor([[1.0, 1.0]]))
    assert loss == pytest.approx(-(1.28 + 1.0) / 2)
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0], [-0.25, -0.25]]]))


def test_cispo_by_hand() -> None:
    ratios = torch.tensor([[[2.0, 0.5], [1.0, 1.25]]])
    advantages = torch.tensor([[1.0, -2.0]])
    behavior = torch.full((1, 2, 2), math.log(0.25))
    loss, found = gradient(clipped_importance, ratios, advantages, behavior)
    # min(r, 1.28) A log p, p = r / 4
    terms = [
        1.28 * math.log(0.5),
        0.5 * math.log(0.125),
        -2 * math.log(0.25),
        -2.5 * math.log(0.3125),
    ]
    assert loss == pytest.approx(-sum(terms) / 4, rel=1e-5)
    expected = torch.tensor([[[1.28, 0.5], [-2.0, -2.5]]]) / -4
    torch.testing.assert_close(found, expected)


def test_cispo_drops_no_character_and_ppo_does() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(20, 6, 5, generator=generator).mul(1.5).exp()
    advantages = torch.randn(20, 6, generator=generator)
    assert gradient(clipped_importance, ratios, advantages)[1].ne(0).all()
    for surrogate in (clipped, clipped_by_text):
        dropped = gradient(surrogate, ratios, advantages)[1].eq(0).double().mean()
        assert 0.1 < dropped < 0.9


@pytest.mark.parametrize("surrogate", SURROGATES[1:])
def test_where_the_policy_itself_sampled_the_gradient_is_reinforces_bit_for_bit(
    surrogate: Surrogate,
) -> None:
    generator = torch.Generator().manual_seed(0)
    behavior = -torch.rand(8, 4, 4, generator=generator)  # powers of two: no mean is rounded
    advantages = torch.randn(8, 4, generator=generator)
    ones = torch.ones_like(behavior)
    expected = gradient(reinforce, ones, advantages, behavior)[1]
    assert expected.ne(0).all()
    assert torch.equal(gradient(surrogate, ones, advantages, behavior)[1], expected)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_no_gradient_flows_through_advantages_or_through_who_sampled(surrogate: Surrogate) -> None:
    log_probs = torch.tensor([[[-1.0], [-2.0]]], requires_grad=True)
    behavior = torch.tensor([[[-1.1], [-1.9]]], requires_grad=True)
    advantages = torch.tensor([[2.0, -1.0]], requires_grad=True)
    surrogate(log_probs, behavior, advantages, CLIP, CLIP_HIGH).backward()
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


@pytest.mark.parametrize("order", [1, 2, 3, 7, 16, 128])
@pytest.mark.parametrize("p", [1e-6, 0.02, 0.3, 0.5, 0.97, 1.0])
def test_the_truncated_likelihood_is_its_plain_sum_in_value_and_gradient(
    p: float, order: int
) -> None:
    def plain(log_p: Tensor) -> Tensor:
        return -sum((1 - log_p.exp()[0, 0]) ** k / k for k in range(1, order + 1))  # type: ignore[return-value]

    target = torch.tensor([0])
    found = by_log_p(lambda log_p: truncated_log_likelihood(log_p, target, order), p)
    assert found == pytest.approx(by_log_p(plain, p), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "order", "weight"),
    [
        (0.5, 1, 1.0),  # as plain reward is
        (0.5, 2, 1.5),  # (1 - 1/4) / (1/2)
        (0.25, 3, 37 / 16),  # (1 - 27/64) / (1/4)
        (0.1, 16, 8.14698),  # (1 - 0.9^16) / 0.1, 0.9^16 = 0.185302
        (1 / 65, 16, 14.2800),  # where all are equally likely: (64 / 65)^16 = 0.780308
        (1.0, 16, 1.0),
    ],
)
def test_the_weight_of_a_success_by_its_probability(p: float, order: int, weight: float) -> None:
    _, slope = by_log_p(lambda x: truncated_log_likelihood(x, torch.tensor([0]), order), p)
    assert slope / p == pytest.approx(weight, rel=1e-4)


def test_cut_after_one_term_it_is_the_chance_and_after_many_the_log_likelihood() -> None:
    target = torch.tensor([0])
    for p in (0.2, 0.5, 0.9):
        value, slope = by_log_p(lambda x: truncated_log_likelihood(x, target, 1), p)
        assert (value, slope) == pytest.approx((p - 1, p))
        value, slope = by_log_p(lambda x: truncated_log_likelihood(x, target, 200), p)
        assert (value, slope) == pytest.approx((math.log(p), 1.0), abs=1e-9)


def test_the_truncated_likelihood_is_a_mean_over_positions() -> None:
    log_probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    # order 2: -(1/2 + 1/8) and -(1/4 + 1/32)
    value = truncated_log_likelihood(log_probs, torch.tensor([0, 1]), 2)
    assert value.item() == pytest.approx(-(0.625 + 0.28125) / 2)


def test_what_is_impossible_has_a_finite_truncated_likelihood() -> None:
    logits = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    value = truncated_log_likelihood(logits.log_softmax(-1), torch.tensor([1]), 4)
    assert value.item() == pytest.approx(-(1 + 1 / 2 + 1 / 3 + 1 / 4))
    value.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_rarity_bonus_and_its_gradient_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64, requires_grad=True)
    bonus = rarity_bonus(probs.log(), 2)
    # -((1/2)^3 + 2 (3/4)^3) / 3
    assert bonus.item() == pytest.approx(-(1 / 8 + 2 * 27 / 64) / 3)
    bonus.backward()
    # by p_a: (1 - p_a)^N
    expected = torch.tensor([[1 / 4, 9 / 16, 9 / 16]], dtype=torch.float64)
    torch.testing.assert_close(probs.grad, expected)
    two = torch.cat([probs, probs]).detach()
    torch.testing.assert_close(rarity_bonus(two.log(), 2), bonus.detach())  # a mean


def test_brier_by_hand() -> None:
    # 1/2 - (1/4 + 1/16 + 1/16) / 2 = 5/16 and 1/4 - 3/16 = 1/16; the mean is 3/16.
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    assert brier_score(log_probs, torch.tensor([0, 2])).item() == pytest.approx(3 / 16)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 3000.0])
def test_brier_is_bounded_whatever_the_policy(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(200, 9, generator=generator)).requires_grad_()
    for target in range(9):
        score = brier_score(logits.log_softmax(-1), torch.full((200,), target))
        assert -0.5 <= score.item() <= 0.5
        score.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_brier_is_best_at_certainty_and_worst_at_certain_error() -> None:
    log_probs = torch.tensor([[1.0, 0.0]]).log()
    assert brier_score(log_probs, torch.tensor([0])).item() == 0.5
    assert brier_score(log_probs, torch.tensor([1])).item() == -0.5


def test_the_log_likelihood_and_its_gradient_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log().requires_grad_()
    value = log_likelihood(logits.log_softmax(-1), torch.tensor([0, 1]))
    value.backward()
    assert value.item() == pytest.approx(-1.5 * math.log(2))
    # (e_y - p) / N
    expected = torch.tensor([[0.25, -0.125, -0.125], [-0.125, 0.375, -0.25]])
    torch.testing.assert_close(logits.grad, expected)


# Of the policy alone.


def test_entropy_and_its_gradient_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    spread = entropy(logits.log_softmax(-1))
    spread.backward()
    assert spread.item() == pytest.approx(1.5 * math.log(2))
    # -p_a (log p_a + H): 1/2 (log 2 - 1.5 log 2) and 1/4 (2 log 2 - 1.5 log 2)
    expected = torch.tensor([[-0.25, 0.125, 0.125]], dtype=torch.float64) * math.log(2)
    torch.testing.assert_close(logits.grad, expected)


def test_entropy_is_a_mean_over_all_positions() -> None:
    log_probs = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]]).log()
    lower = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert entropy(log_probs).item() == pytest.approx((3 * math.log(2) + lower) / 4)


def test_the_divergence_and_its_gradient_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    reference = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    divergence = kl_divergence(logits.log_softmax(-1), reference)
    divergence.backward()
    # 1/2 log 2 + 0 + 1/4 log 1/2
    assert divergence.item() == pytest.approx(0.25 * math.log(2))
    # p_a (log p_a / q_a - KL): 1/2 (1 - 1/4), 1/4 (-1/4), 1/4 (-1 - 1/4), times log 2
    expected = torch.tensor([[0.375, -0.0625, -0.3125]], dtype=torch.float64) * math.log(2)
    torch.testing.assert_close(logits.grad, expected)
    assert kl_divergence(reference, reference).item() == 0


@pytest.mark.parametrize(
    ("coefficient", "kl", "expected"),
    [
        (0.1, 0.8, 0.2),  # over 1.5 times the target of 0.5
        (0.1, 0.75, 0.1),  # just that
        (0.1, 0.34, 0.1),
        (0.1, 0.33, 0.05),  # under two thirds of it
        (0.1, 0.0, 0.05),
        (8.0, 2.0, 10.0),  # no further than this
        (1.5e-4, 0.1, 1e-4),
        (0.1, math.nan, 0.1),
        (0.1, math.inf, 0.1),
    ],
)
def test_the_coefficient_adapts_by_hand(coefficient: float, kl: float, expected: float) -> None:
    assert adapted(coefficient, kl, 0.5) == expected
