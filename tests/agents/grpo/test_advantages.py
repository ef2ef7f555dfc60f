from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from agents.grpo.advantages import (
    STD_EPSILON,
    centred,
    group_normalised,
    leave_one_out,
    mean_normalised,
    share_of_success,
)
from agents.grpo.rewards import brier_reward


def test_leave_one_out_by_hand() -> None:
    # 1 - mean(0, 0, 0) = 1 and 0 - mean(1, 0, 0) = -1/3.
    advantages = leave_one_out(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others() -> None:
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    others = [
        torch.cat([rewards[:, :i], rewards[:, i + 1 :]], dim=1).mean(1, keepdim=True)
        for i in range(6)
    ]
    torch.testing.assert_close(leave_one_out(rewards), rewards - torch.cat(others, dim=1))


def test_group_normalised_by_hand() -> None:
    # Mean 1/4, sum of squares 3/4 over three degrees of freedom: standard deviation 1/2.
    advantages = group_normalised(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    right, wrong = 0.75 / (0.5 + 1e-4), -0.25 / (0.5 + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[right, wrong, wrong, wrong]]))
    assert STD_EPSILON == 1e-4


def test_the_least_standard_deviation_counts_where_there_is_less() -> None:
    close = torch.tensor([[0.10, 0.12], [1.0, 0.0]])
    # standard deviations 0.0141 and 0.7071
    advantages = group_normalised(close, least_std=0.1)
    wide = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = torch.tensor([[-0.01 / 0.1001, 0.01 / 0.1001], [wide, -wide]])
    torch.testing.assert_close(advantages, expected)
    assert torch.equal(group_normalised(torch.ones(1, 5), 0.1), torch.zeros(1, 5))


def test_centred_by_hand() -> None:
    advantages = centred(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(advantages, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


def test_shares_of_success_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    third = 4 / 3
    shares = torch.tensor([[4.0, 0, 0, 0], [third, third, 0, third], [0, 0, 0, 0]])
    torch.testing.assert_close(share_of_success(rewards), shares)
    # Minus 1, but where nobody succeeded.
    relative = torch.tensor([[3.0, -1, -1, -1], [1 / 3, 1 / 3, -1, 1 / 3], [0, 0, 0, 0]])
    torch.testing.assert_close(mean_normalised(rewards), relative)
    assert share_of_success(torch.ones(1, 1)).item() == 1.0


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.7, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_no_advantage(value: float) -> None:
    # The mean of ten times 0.1 is not 0.1 in floating point: centring alone leaves a residue,
    # and dividing by the standard deviation blows it up.
    for group_size in range(2, 40):
        rewards = torch.full((1, group_size), value)
        for estimate in (leave_one_out, group_normalised, centred, mean_normalised):
            advantages = estimate(rewards)
            assert torch.equal(advantages, torch.zeros_like(rewards)), group_size


@pytest.mark.parametrize("target", [0, 1])
def test_a_unanimous_group_gives_brier_exactly_no_advantage(target: int) -> None:
    for group_size in range(3, 40):
        actions = torch.zeros(1, group_size, dtype=torch.int64)
        rewards = brier_reward(actions, torch.tensor([target]))
        assert torch.equal(leave_one_out(rewards), torch.zeros_like(rewards)), group_size


def test_advantages_do_not_depend_on_a_constant_added_to_the_rewards() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    for estimate in (leave_one_out, group_normalised, centred):
        assert torch.equal(estimate(rewards), estimate(rewards + 4))


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    for estimate in (leave_one_out, group_normalised, centred, share_of_success, mean_normalised):
        alone: list[Tensor] = [estimate(row[None]) for row in rewards]
        torch.testing.assert_close(estimate(rewards), torch.cat(alone))


def test_only_the_group_norm_forgets_how_far_rewards_are_apart() -> None:
    rewards = torch.tensor([[3.0, -1.0, 0.0, 2.0]])
    torch.testing.assert_close(leave_one_out(10 * rewards), 10 * leave_one_out(rewards))
    torch.testing.assert_close(
        group_normalised(10 * rewards), group_normalised(rewards), rtol=1e-3, atol=0
    )
