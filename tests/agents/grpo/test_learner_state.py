"""A learner goes on exactly from its state, also from one that was written to a disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.grpo.config import RegularizerConfig
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.training import checkpoint
from tests.training_runs import CE, everything, fresh_model, make_learner, same

NOISE = np.random.default_rng(7).integers(0, 16, 400)
KL = RegularizerConfig(kl_coefficient=0.1, kl_target=1e-3)
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {},
    "adamw": {"optimizer": "adamw"},
    "all-actions": {"exploration": "all_actions"},
    "control": CE,
    "older-policy": {"estimator": "rloo", "sync_every": 3},
    "texts": {"estimator": "gspo", "horizon": 3, "group_size": 4},
    "texts-of-an-older-policy": {"estimator": "cispo", "horizon": 3, "sync_every": 3},
    "adaptive-kl": {"regularizer": KL},
    "first-recipe": {
        "estimator": "seed_sampled",
        "group_size": 4,
        "temperature": 1.2,
        "sync_every": 5,
        "clip": 0.5,
        "optimizer": "adamw",
        "regularizer": RegularizerConfig(
            entropy_bonus=0.01, kl_coefficient=0.1, kl_target=0.5, partial_credit=0.1
        ),
    },
}


def trained(n: int, **recipe: Any) -> tuple[GRPOLearner, list[GRPOStats]]:
    learner = make_learner(fresh_model(), NOISE, **recipe)
    return learner, [learner.update() for _ in range(n)]


def continued(learner: GRPOLearner, state: dict[str, Any], **recipe: Any) -> GRPOLearner:
    """Return a new learner on a copy of the model, with other dice, set to `state`."""
    model = fresh_model(seed=9)
    with torch.no_grad():
        for p, other in zip(model.parameters(), learner.model.parameters(), strict=True):
            p.copy_(other)
    other = make_learner(model, NOISE, seed=5, **recipe)
    other.set_state(state)
    return other


def numbers(learner: GRPOLearner) -> dict[str, Any]:
    """Return the parts of a learner's state that are no tensors."""
    left_out = ("optimizer", "old")
    return {name: x for name, x in learner.get_state().items() if name not in left_out}


def old_of(learner: GRPOLearner) -> list[Tensor]:
    return list((learner.get_state()["old"] or {}).values())


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_a_learner_goes_on_exactly_from_a_checkpoint(name: str, n: int, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    learner, _ = trained(n, **recipe)
    path = checkpoint.write(tmp_path, 1, {"learner": learner.get_state()}, {})
    other = continued(learner, checkpoint.read(path)["learner"], **recipe)
    assert numbers(other) == numbers(learner)
    assert same(everything(other), everything(learner))
    assert same(old_of(other), old_of(learner))
    expected = [learner.update() for _ in range(3)]
    assert [other.update() for _ in range(3)] == expected
    assert numbers(other) == numbers(learner)
    assert same(everything(other), everything(learner))
    assert same(old_of(other), old_of(learner))


PARTS = {
    "optimizer": "muon",
    "rng": "muon",
    "n_done": "older-policy",
    "old": "older-policy",
    "kl_coefficient": "adaptive-kl",
}


@pytest.mark.parametrize(("part", "name"), PARTS.items())
def test_no_part_of_the_state_can_be_left_out(part: str, name: str) -> None:
    recipe = RECIPES[name]
    learner, _ = trained(4, **recipe)
    fresh, _ = trained(0, **recipe)
    state = copy.deepcopy(learner.get_state())
    lost = {**state, part: fresh.get_state()[part]}
    other = continued(learner, lost, **recipe)
    for one in (learner, other):
        one.update()
        one.update()
    assert not same(everything(other), everything(learner))


def test_the_counters_are_part_of_the_state() -> None:
    learner, _ = trained(2)
    learner.n_skipped, learner.n_bad_in_a_row = 5, 3
    state = learner.get_state()
    assert state.keys() == {
        "n_done",
        "n_skipped",
        "n_bad_in_a_row",
        "forward_tokens",
        "kl_coefficient",
        "rng",
        "optimizer",
        "old",
    }
    other = continued(learner, copy.deepcopy(state))
    assert (other.n_done, other.n_skipped, other.n_bad_in_a_row) == (2, 5, 3)
    assert other.forward_tokens == learner.forward_tokens == 2 * 3 * 4 * 16


def test_there_is_an_old_policy_only_where_one_is_asked_for() -> None:
    assert trained(1)[0].get_state()["old"] is None
    learner, _ = trained(2, **RECIPES["older-policy"])
    old, new = old_of(learner), [p.detach() for p in learner.model.parameters()]
    assert len(old) == len(new)
    assert same(old, list(fresh_model().parameters()))
    assert not same(old, new)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_on_a_device_it_learns_as_on_the_cpu_and_goes_on_from_a_checkpoint(
    name: str, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    model = fresh_model().cuda()
    learner = make_learner(model, NOISE, **recipe)
    _, expected = trained(1, **recipe)
    np.testing.assert_allclose(learner.update(), expected[0], rtol=0.05, atol=0.01)
    path = checkpoint.write(tmp_path, 1, {"learner": learner.get_state()}, {})
    other = make_learner(copy.deepcopy(model), NOISE, seed=5, **recipe)
    other.set_state(checkpoint.read(path)["learner"])
    assert same(everything(other), everything(learner))
    for one in (learner, other):
        one.update()
    torch.testing.assert_close(everything(other), everything(learner), rtol=1e-3, atol=1e-4)
