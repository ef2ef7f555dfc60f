from __future__ import annotations

import itertools
import math

import pytest
import torch

from agents.grpo.rewards import (
    brier_reward,
    exact_match,
    imitation_reward,
    matching_prefix,
    others_that_agree,
)


def test_only_the_character_of_the_text_is_a_match() -> None:
    rewards = exact_match(torch.tensor([[3, 1, 3], [0, 0, 2]]), torch.tensor([3, 2]))
    assert rewards.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]


def test_a_sample_is_not_counted_among_the_others_that_agree_with_it() -> None:
    # Four samples, so three others: each of the three zeros agrees with two of its others.
    shares = others_that_agree(torch.tensor([[0, 0, 1, 0], [0, 1, 2, 3]]))
    torch.testing.assert_close(
        shares, torch.tensor([[2 / 3, 2 / 3, 0.0, 2 / 3], [0.0, 0.0, 0.0, 0.0]])
    )


@pytest.mark.parametrize("group_size", [2, 5, 16])
def test_all_others_agree_where_all_chose_the_same(group_size: int) -> None:
    shares = others_that_agree(torch.full((1, group_size), 7))
    assert shares.tolist() == [[1.0] * group_size]


def test_agreement_estimates_the_policy_without_bias() -> None:
    # Over all groups of four in which the first sample is a: the mean of f_1 is p(a).
    probs = [0.5, 0.3, 0.2]
    for action in range(3):
        expected = 0.0
        for others in itertools.product(range(3), repeat=3):
            weight = math.prod(probs[other] for other in others)
            expected += weight * float(others_that_agree(torch.tensor([[action, *others]]))[0, 0])
        assert expected == pytest.approx(probs[action], abs=1e-6)


def test_brier_pays_for_being_right_and_charges_for_saying_what_others_say() -> None:
    # K = 4: c = 3/2, and each of the two zeros has one of its three others agree: c f = 1/2.
    rewards = brier_reward(torch.tensor([[0, 0, 1, 2]]), torch.tensor([0]))
    torch.testing.assert_close(rewards, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    # K = 3: c = 2, and each of the two ones has one of its two others agree: c f = 1.
    rewards = brier_reward(torch.tensor([[1, 0, 1]]), torch.tensor([0]))
    torch.testing.assert_close(rewards, torch.tensor([[-1.0, 1.0, -1.0]]))


def test_brier_does_not_depend_on_the_order_of_the_samples() -> None:
    actions = torch.tensor([[2, 0, 2, 1, 0, 2]])
    order = torch.tensor([5, 3, 0, 4, 1, 2])
    target = torch.tensor([2])
    assert torch.equal(
        brier_reward(actions[:, order], target), brier_reward(actions, target)[:, order]
    )


def test_positions_do_not_see_each_other() -> None:
    actions = torch.tensor([[0, 0, 1, 2], [3, 3, 3, 1], [1, 2, 0, 0]])
    targets = torch.tensor([0, 3, 2])
    alone = [brier_reward(actions[i : i + 1], targets[i : i + 1]) for i in range(3)]
    assert torch.equal(brier_reward(actions, targets), torch.cat(alone))


@pytest.mark.parametrize("group_size", [1, 2])
def test_brier_needs_three_samples(group_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^group_size must be at least 3 for brier, got {group_size}$"
    ):
        brier_reward(torch.zeros(1, group_size, dtype=torch.int64), torch.zeros(1))


def test_imitation_pays_per_character_for_what_the_reference_finds_likelier() -> None:
    # One prompt, two texts of two characters.
    log_probs = torch.tensor([[[0.5, 0.25], [0.5, 0.5]]]).log()
    reference = torch.tensor([[[0.25, 0.25], [1.0, 0.5]]]).log()
    expected = torch.tensor([[-0.5, 0.5]]) * math.log(2)
    torch.testing.assert_close(imitation_reward(log_probs, reference), expected)


def test_imitation_is_minus_the_divergence_on_average() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
    chances = policy[texts].prod(1)
    rewards = imitation_reward(policy.log()[texts][None], reference.log()[texts][None])[0]
    divergence = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((chances * rewards).sum(), -divergence)


def test_only_leading_characters_match() -> None:
    real = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5]])
    written = torch.tensor(
        [
            [[1, 2, 3, 4], [1, 2, 0, 4], [0, 2, 3, 4]],
            [[5, 5, 5, 0], [0, 0, 0, 0], [1, 2, 3, 4]],
        ]
    )
    shares = matching_prefix(written, real)
    assert shares.tolist() == [[1.0, 0.5, 0.0], [0.75, 0.0, 0.0]]
