from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents.grpo.advantages import leave_one_out
from agents.grpo.objectives import (
    ALL_ACTIONS,
    ESTIMATORS,
    SAMPLED,
    brier_all_actions,
    brier_sampled,
    check_estimator,
    cross_entropy,
    grpo_sampled,
    policy_loss,
)
from agents.grpo.rewards import exact_match, others_that_agree
from avatarl_env.lm.generation import inverse_cdf

Sampled = Callable[[Tensor, Tensor, Tensor], Tensor]

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TRUTH = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
"""What the text says: the target is a random draw from this."""


def through_softmax(gradient: Tensor, probs: Tensor) -> Tensor:
    """Turn gradients by log-probabilities (N, V) into gradients by logits."""
    return gradient - probs * gradient.sum(-1, keepdim=True)


def gradients_by_logits(loss: Sampled, probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    """Return each position's own gradient of a loss that is a mean over positions: (N, V)."""
    log_probs = probs.log().expand(len(targets), -1).clone().requires_grad_()
    loss(log_probs, targets, actions).backward()
    assert log_probs.grad is not None
    return through_softmax(log_probs.grad * len(targets), probs)


def expected_gradient(loss: Sampled, probs: Tensor, truth: Tensor, group_size: int) -> Tensor:
    """Average the gradient over every target and every group there can be: (V,)."""
    n_tokens = len(probs)
    groups = torch.tensor(list(itertools.product(range(n_tokens), repeat=group_size)))
    chances = probs[groups].prod(1)  # (V ** K,)
    assert chances.sum().item() == pytest.approx(1.0)
    total = torch.zeros(n_tokens, dtype=torch.float64)
    for target in range(n_tokens):
        targets = torch.full((len(groups),), target)
        gradients = gradients_by_logits(loss, probs, targets, groups)
        total += truth[target] * (chances[:, None] * gradients).sum(0)
    return total


def towards(wish: Tensor, probs: Tensor) -> Tensor:
    """Return ``-sum_a p_a w_a (e_a - p)``: the logits' gradient where token a is wished w_a."""
    return -sum(
        (probs[a] * wish[a] * (torch.eye(len(probs), dtype=torch.float64)[a] - probs))
        for a in range(len(probs))
    )


def brier_without_correction(log_probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
    rewards = exact_match(actions, targets) - others_that_agree(actions)
    return policy_loss(log_probs, actions, leave_one_out(rewards))


def test_policy_loss_by_hand() -> None:
    # -(2 log 1/2 + (-1) log 1/4 + 0 + 4 log 1/4) / 4 = (2 - 2 + 8) log 2 / 4
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    loss = policy_loss(
        log_probs, torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2.0, -1.0], [0.0, 4.0]])
    )
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_no_gradient_flows_through_advantages() -> None:
    log_probs = POLICY.log()[None].clone().requires_grad_()
    actions = torch.tensor([[0, 2]])
    advantages = log_probs.gather(1, actions) * 3
    policy_loss(log_probs, actions, advantages).backward()
    assert log_probs.grad is not None
    expected = torch.zeros(1, 3, dtype=torch.float64)
    expected[0, [0, 2]] = -advantages.detach()[0] / 2
    torch.testing.assert_close(log_probs.grad, expected)


def test_brier_sampled_by_hand() -> None:
    # Rewards 1/2, 1/2, 0, 0 (K = 4, c = 3/2); leave-one-out 1/3, 1/3, -1/3, -1/3.
    log_probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    loss = brier_sampled(log_probs, torch.tensor([0]), torch.tensor([[0, 0, 1, 2]]))
    # -(1/3) (-1 - 1 + 2 + 3) log 2 / 4
    assert loss.item() == pytest.approx(-math.log(2) / 4)


def test_brier_all_actions_by_hand() -> None:
    # 1/2 - (1/4 + 1/16 + 1/16) / 2 = 5/16 and 1/4 - 3/16 = 1/16; the mean is 3/16.
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    loss = brier_all_actions(log_probs, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(-3 / 16)


def test_grpo_by_hand() -> None:
    # Rewards 1, 0: mean 1/2, standard deviation sqrt(1/2), so advantages +-0.5 / 0.7072.
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    loss = grpo_sampled(log_probs, torch.tensor([0]), torch.tensor([[0, 1]]))
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert loss.item() == pytest.approx(-advantage * math.log(2) / 2, rel=1e-5)


def test_cross_entropy_and_its_gradient_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log().requires_grad_()
    loss = cross_entropy(logits.log_softmax(-1), torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    # (p - e_y) / N
    expected = torch.tensor([[-0.25, 0.125, 0.125], [0.125, -0.375, 0.25]])
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("group_size", [3, 4, 6])
def test_sampled_brier_is_unbiased(group_size: int) -> None:
    gradient = expected_gradient(brier_sampled, POLICY, TRUTH, group_size)
    torch.testing.assert_close(gradient, towards(TRUTH - POLICY, POLICY), rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [3, 4, 6])
def test_sampled_brier_has_the_gradient_of_all_actions(group_size: int) -> None:
    logits = POLICY.log().requires_grad_()
    log_probs = logits.log_softmax(-1).expand(3, -1)
    losses = [brier_all_actions(log_probs[i : i + 1], torch.tensor([i])) for i in range(3)]
    (exact,) = torch.autograd.grad((TRUTH * torch.stack(losses)).sum(), logits)
    sampled = expected_gradient(brier_sampled, POLICY, TRUTH, group_size)
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [3, 4, 6])
def test_without_the_correction_brier_is_biased(group_size: int) -> None:
    gradient = expected_gradient(brier_without_correction, POLICY, TRUTH, group_size)
    # The baseline holds the sample's own collisions: what is charged is too little, and the
    # fixed point sharper than the truth.
    share = (group_size - 2) / (group_size - 1)
    torch.testing.assert_close(gradient, towards(TRUTH - share * POLICY, POLICY), rtol=0, atol=1e-6)
    assert (gradient - towards(TRUTH - POLICY, POLICY)).abs().max() > 5e-3


@pytest.mark.parametrize("group_size", [3, 4, 6])
def test_the_truth_is_a_fixed_point_of_brier(group_size: int) -> None:
    gradient = expected_gradient(brier_sampled, TRUTH, TRUTH, group_size)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
    sharper = expected_gradient(brier_without_correction, TRUTH, TRUTH, group_size)
    assert sharper.abs().max() > 5e-3


@pytest.mark.parametrize("group_size", [3, 4, 6])
def test_at_the_truth_grpo_goes_on_sharpening(group_size: int) -> None:
    gradient = expected_gradient(grpo_sampled, TRUTH, TRUTH, group_size)
    assert gradient[1] < -0.05  # a step against the gradient raises what is most probable,
    assert gradient[[0, 2]].min() > 0.01  # and lowers the rest


def test_the_mean_of_sampled_gradients_approaches_that_of_all_actions() -> None:
    n_draws = 20_000
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
    targets = torch.full((n_draws,), 3)
    uniforms = torch.rand(n_draws, 16, generator=generator)
    actions = inverse_cdf(probs.log().expand(n_draws, -1), uniforms)
    gradients = gradients_by_logits(brier_sampled, probs, targets, actions)
    mean, error = gradients.mean(0), gradients.std(0) / math.sqrt(n_draws)
    wish = torch.eye(5, dtype=torch.float64)[3] - probs
    exact = towards(wish, probs)
    assert error.max() < 0.01 * exact.abs().max()  # sharp enough to tell them apart
    # Five normal deviates beyond 4.5 by chance: once in 30,000 seeds, and the seed is fixed.
    assert ((mean - exact).abs() < 4.5 * error).all()


def test_more_samples_make_the_gradient_quieter() -> None:
    generator = torch.Generator().manual_seed(0)
    spreads = []
    for group_size in (4, 16, 64):
        uniforms = torch.rand(4000, group_size, generator=generator)
        actions = inverse_cdf(POLICY.log().expand(4000, -1), uniforms)
        targets = torch.zeros(4000, dtype=torch.int64)
        spreads.append(gradients_by_logits(brier_sampled, POLICY, targets, actions).std(0).norm())
    assert spreads[0] > 1.5 * spreads[1] > 2 * spreads[2]


EQUAL_REWARDS = [
    pytest.param(grpo_sampled, [0] * 16, 1, id="grpo-nobody-right"),
    pytest.param(grpo_sampled, [0, 2, 2, 0, 2], 1, id="grpo-nobody-right-and-mixed"),
    pytest.param(grpo_sampled, [1] * 7, 1, id="grpo-everybody-right"),
    pytest.param(brier_sampled, [0] * 16, 1, id="brier-unanimous-and-wrong"),
    pytest.param(brier_sampled, [0] * 7, 1, id="brier-unanimous-and-wrong-seven"),
    pytest.param(brier_sampled, [1] * 12, 1, id="brier-unanimous-and-right"),
    pytest.param(brier_sampled, [0, 2, 3], 1, id="brier-all-different-and-wrong"),
    pytest.param(brier_sampled, [0, 0, 2, 2, 3, 3], 1, id="brier-in-pairs-and-wrong"),
]


@pytest.mark.parametrize(("loss", "actions", "target"), EQUAL_REWARDS)
def test_equal_rewards_give_exactly_no_gradient(
    loss: Sampled, actions: list[int], target: int
) -> None:
    logits = torch.tensor([[0.3, -1.2, 0.7, 0.1]], requires_grad=True)
    loss(logits.log_softmax(-1), torch.tensor([target]), torch.tensor([actions])).backward()
    assert torch.equal(logits.grad, torch.zeros(1, 4))  # type: ignore[arg-type]


def test_brier_learns_where_nobody_was_right_and_grpo_does_not() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    actions = torch.tensor([[0, 0, 0, 2]])
    brier_sampled(logits.log_softmax(-1), torch.tensor([1]), actions).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0.1  # a step against it makes the crowd's answer rarer
    assert logits.grad[0, 2] < -0.1


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 3000.0])
def test_brier_of_all_actions_is_bounded_whatever_the_policy(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(200, 9, generator=generator)).requires_grad_()
    for target in range(9):
        loss = brier_all_actions(logits.log_softmax(-1), torch.full((200,), target))
        assert -0.5 <= loss.item() <= 0.5
        loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_brier_of_all_actions_is_best_at_certainty_and_worst_at_certain_error() -> None:
    log_probs = torch.tensor([[1.0, 0.0]]).log()
    assert brier_all_actions(log_probs, torch.tensor([0])).item() == -0.5
    assert brier_all_actions(log_probs, torch.tensor([1])).item() == 0.5


FORMS = {"brier": {SAMPLED, ALL_ACTIONS}, "grpo": {SAMPLED}, "ce": {ALL_ACTIONS}}


def test_every_estimator_is_in_this_table() -> None:
    assert ESTIMATORS.keys() == FORMS.keys()


@pytest.mark.parametrize("exploration", [SAMPLED, ALL_ACTIONS])
@pytest.mark.parametrize("name", FORMS)
def test_a_combination_is_refused_unless_it_exists(name: str, exploration: str) -> None:
    estimator = ESTIMATORS[name]
    form = {SAMPLED: estimator.sampled, ALL_ACTIONS: estimator.all_actions}[exploration]
    if exploration in FORMS[name]:
        check_estimator(name, exploration, 16)
        assert form is not None
    else:
        assert form is None
        (other,) = FORMS[name]
        message = rf"^exploration must be {other} for {name}, got '{exploration}'$"
        with pytest.raises(ValueError, match=message):
            check_estimator(name, exploration, 16)


def test_only_cross_entropy_is_a_control() -> None:
    assert [name for name, estimator in ESTIMATORS.items() if estimator.is_control] == ["ce"]


@pytest.mark.parametrize(("name", "least"), [("brier", 3), ("grpo", 2)])
def test_the_smallest_group_is_where_the_sampled_form_has_a_value(name: str, least: int) -> None:
    check_estimator(name, SAMPLED, least)
    message = rf"^group_size must be at least {least} for {name}, got {least - 1}$"
    with pytest.raises(ValueError, match=message):
        check_estimator(name, SAMPLED, least - 1)
    form = ESTIMATORS[name].sampled
    assert form is not None
    loss = form(POLICY.log()[None], torch.tensor([0]), torch.arange(least)[None])
    assert loss.isfinite()


def test_the_group_size_is_no_matter_where_nothing_is_sampled() -> None:
    check_estimator("ce", ALL_ACTIONS, 0)
    check_estimator("brier", ALL_ACTIONS, 1)


def test_unknown_names_are_refused_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"^estimator must be one of .*'brierr'.*'brier'\?$"):
        check_estimator("brierr", SAMPLED, 16)
    with pytest.raises(
        ValueError, match=r"^exploration must be sampled or all_actions for brier, got 'greedy'$"
    ):
        check_estimator("brier", "greedy", 16)
