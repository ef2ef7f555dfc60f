from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agents.grpo.advantages import STD_EPSILON, group_normalised, leave_one_out
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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.7, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_no_advantage(value: float) -> None:
    # The mean of ten times 0.1 is not 0.1 in floating point: centring alone leaves a residue,
    # and dividing by the standard deviation blows it up.
    for group_size in range(2, 40):
        rewards = torch.full((1, group_size), value)
        for advantages in (leave_one_out(rewards), group_normalised(rewards)):
            assert torch.equal(advantages, torch.zeros_like(rewards)), group_size


@pytest.mark.parametrize("target", [0, 1])
def test_a_unanimous_group_gives_brier_exactly_no_advantage(target: int) -> None:
    for group_size in range(3, 40):
        actions = torch.zeros(1, group_size, dtype=torch.int64)
        rewards = brier_reward(actions, torch.tensor([target]))
        assert torch.equal(leave_one_out(rewards), torch.zeros_like(rewards)), group_size


def test_advantages_do_not_depend_on_a_constant_added_to_the_rewards() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    for estimate in (leave_one_out, group_normalised):
        assert torch.equal(estimate(rewards), estimate(rewards + 4))


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for estimate in (leave_one_out, group_normalised):
        alone: list[Tensor] = [estimate(row[None]) for row in rewards]
        torch.testing.assert_close(estimate(rewards), torch.cat(alone))


def test_only_the_group_norm_forgets_how_far_rewards_are_apart() -> None:
    rewards = torch.tensor([[3.0, -1.0, 0.0, 2.0]])
    torch.testing.assert_close(leave_one_out(10 * rewards), 10 * leave_one_out(rewards))
    torch.testing.assert_close(
        group_normalised(10 * rewards), group_normalised(rewards), rtol=1e-3, atol=0
    )
