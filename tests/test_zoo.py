"""Tests of tests/zoo.py: the models tell inputs apart, and the check of writing can fail."""

from __future__ import annotations

import pytest
import torch

from avatarl_env.lm.generation import Generation
from tests.zoo import ZOO, assert_same_writing, build, shared, tokens


@pytest.mark.parametrize("name", ZOO)
def test_models_are_built_alike_and_without_the_global_generator(name: str) -> None:
    state = torch.get_rng_state()
    model = build(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training or name == "gpt"
    for p, q in zip(model.parameters(), shared(name).parameters(), strict=True):
        assert torch.equal(p, q)
        assert (p != 0).all()


@pytest.mark.parametrize("name", ZOO)
def test_models_look_at_every_token_of_the_past(name: str) -> None:
    read = tokens(1, 6)
    for position in range(6):
        other = read.clone()
        other[0, position] = (other[0, position] + 1) % 24
        with torch.no_grad():
            change = (shared(name)(read) - shared(name)(other))[0].abs().amax(-1)
        assert (change[position:] > 1e-3).all()
        assert (change[:position] < 1e-5).all()


def writing(tokens: list[int], log_probs: list[float]) -> Generation:
    """One row after a prompt of token 9; four tokens, of 1/4 each."""
    distributions = torch.full((1, len(tokens), 4), 0.25).log()
    return Generation(torch.tensor([[9, *tokens]]), torch.tensor([log_probs]), distributions)


@pytest.mark.parametrize(
    ("new", "log_probs", "uniforms", "rows"),
    [
        ([1, 2], [-1.0, -1.0], [0.3, 0.6], 0),
        ([1, 1], [-1.0, -7.0], [0.3, 0.5 - 1e-7], 1),  # on the boundary of 1 and 2
        ([2, 3], [-7.0, -7.0], [0.5, 0.9], 1),  # whatever comes after
        ([1, 1], [-1.0, -7.0], [0.3, 0.51], None),  # off the boundary
        ([1, 0], [-1.0, -7.0], [0.3, 0.5], None),  # off one of two boundaries
        ([1, 2], [-1.0, -1.1], [0.3, 0.6], None),  # other log-probabilities
    ],
)
def test_same_writing_is_told_from_other(
    new: list[int], log_probs: list[float], uniforms: list[float], rows: int | None
) -> None:
    expected = writing([1, 2], [-1.0, -1.0])
    found, dice = writing(new, log_probs), torch.tensor([uniforms])
    if rows is None:
        with pytest.raises(AssertionError):
            assert_same_writing(found, expected, dice)
    else:
        assert assert_same_writing(found, expected, dice) == rows
