from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.grpo.optimizer import ADAM_BETAS, Optimizer
from avatarl_env.lm.gpt import GPT
from tests.training_runs import fresh_model, same


def make(model: GPT, name: str = "muon", **changes: float) -> Optimizer:
    rates = {"rate": 0.1, "matrix_rate": 0.05, "weight_decay": 0.2, **changes}
    return Optimizer(model, name, **rates)


def names_of(model: GPT) -> dict[Tensor, str]:
    return {p: name for name, p in model.named_parameters()}


def listed(optimizer: Optimizer, model: GPT) -> list[tuple[str, str, float]]:
    """Return for each parameter listed its name, who steps it, and its weight decay."""
    names = names_of(model)
    return sorted(
        (names[p], type(part).__name__, group["weight_decay"])
        for part, _ in optimizer.parts
        for group in part.param_groups
        for p in group["params"]
    )


def with_gradients(model: GPT, seed: int = 1) -> list[Tensor]:
    """Give every parameter a gradient; return the parameters as they are."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return weights(model)


def weights(model: GPT) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# By hand, for two blocks: what is inside them and what is not.
MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
VECTORS = ["norm.weight"] + [f"blocks.{i}.norm_{j}.weight" for i in (0, 1) for j in (1, 2)]


def test_muon_steps_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = fresh_model()
    expected = [(f"blocks.{i}.{name}.weight", "Muon", 0.2) for i in (0, 1) for name in MATRICES]
    expected += [("embed.weight", "AdamW", 0.2)]  # the output head too, listed once
    expected += [(name, "AdamW", 0.0) for name in VECTORS]
    assert listed(make(model), model) == sorted(expected)
    assert len(expected) == len(list(model.parameters()))
    assert model.lm_head.weight is model.embed.weight


def test_adamw_alone_steps_everything() -> None:
    model = fresh_model()
    expected = [
        (name, "AdamW", 0.2 if p.dim() == 2 else 0.0) for p, name in names_of(model).items()
    ]
    assert listed(make(model, "adamw"), model) == sorted(expected)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_step_changes_every_parameter(name: str) -> None:
    model = fresh_model()
    optimizer, before = make(model, name), with_gradients(model)
    optimizer.step()
    for old, new in zip(before, weights(model), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()


def test_muons_step_is_orthogonal_and_wide_for_tall_matrices() -> None:
    model = fresh_model()
    before = with_gradients(model)
    make(model, weight_decay=0.0).step()
    names = [name for name, _ in model.named_parameters()]
    for name, old, new in zip(names, before, weights(model), strict=True):
        if name.startswith("blocks.") and old.dim() == 2:
            rows, columns = old.shape
            step = (old - new) / (0.05 * math.sqrt(max(1.0, rows / columns)))
            # Five Newton-Schulz steps bring all but the smallest singular values near 1.
            values = torch.linalg.svdvals(step)
            assert values.quantile(0.1) > 0.6, name
            assert values.max() < 1.3, name


def test_adamws_first_step_is_the_gradients_sign() -> None:
    model = fresh_model()
    before = with_gradients(model)
    make(model, "adamw", weight_decay=0.0).step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad.sign(), rtol=0, atol=1e-3)
    assert ADAM_BETAS == (0.9, 0.95)


@pytest.mark.parametrize(("name", "matrix_rate"), [("muon", 0.05), ("adamw", 0.1)])
def test_without_a_gradient_matrices_decay_and_vectors_stay(name: str, matrix_rate: float) -> None:
    model = fresh_model()
    optimizer, before = make(model, name), weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for (where, p), old in zip(model.named_parameters(), before, strict=True):
        rate = matrix_rate if where.startswith("blocks.") else 0.1
        expected = old * (1 - rate * 0.2) if p.dim() == 2 else old
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_the_schedule_is_a_share_of_each_peak() -> None:
    optimizer = make(fresh_model())

    def rates() -> list[float]:
        return [group["lr"] for part, _ in optimizer.parts for group in part.param_groups]

    assert rates() == [0.1, 0.1, 0.05]
    optimizer.schedule(0.5)
    optimizer.schedule(0.25)  # of the peak, not of what it was
    assert rates() == [0.025, 0.025, 0.0125]


def test_at_a_share_of_zero_nothing_moves() -> None:
    model = fresh_model()
    optimizer, before = make(model), with_gradients(model)
    optimizer.schedule(0.0)
    optimizer.step()
    assert same(weights(model), before)


def test_gradients_are_forgotten() -> None:
    model = fresh_model()
    optimizer = make(model)
    with_gradients(model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def run(optimizer: Optimizer, model: GPT, seeds: range) -> list[Tensor]:
    for seed in seeds:
        with_gradients(model, seed)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_it_goes_on_exactly_from_its_state(name: str) -> None:
    model = fresh_model()
    optimizer = make(model, name)
    run(optimizer, model, range(3))
    state: dict[str, Any] = copy.deepcopy(optimizer.get_state(names_of(model)))
    twin = copy.deepcopy(model)
    expected = run(optimizer, model, range(3, 6))

    other = make(twin, name)
    run(other, copy.deepcopy(twin), range(1))
    other.set_state(state, names_of(twin))
    assert same(run(other, twin, range(3, 6)), expected)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_that_comparison_would_notice_a_lost_state(name: str) -> None:
    model = fresh_model()
    optimizer = make(model, name)
    run(optimizer, model, range(3))
    twin = copy.deepcopy(model)
    expected = run(optimizer, model, range(3, 6))
    assert not same(run(make(twin, name), twin, range(3, 6)), expected)


def test_the_state_is_by_the_parameters_names() -> None:
    model = fresh_model()
    optimizer = make(model)
    assert optimizer.get_state(names_of(model)) == {}
    run(optimizer, model, range(1))
    state = optimizer.get_state(names_of(model))
    assert state.keys() == dict(model.named_parameters()).keys()
    for name, moments in state.items():
        is_muons = name.startswith("blocks.") and "norm" not in name
        expected = {"momentum_buffer"} if is_muons else {"step", "exp_avg", "exp_avg_sq"}
        assert moments.keys() == expected, name


def test_a_state_that_knows_nothing_is_that_of_the_beginning() -> None:
    model = fresh_model()
    optimizer = make(model)
    twin = copy.deepcopy(model)
    run(optimizer, model, range(2))
    with torch.no_grad():
        for p, old in zip(model.parameters(), twin.parameters(), strict=True):
            p.copy_(old)
    optimizer.set_state({}, names_of(model))
    assert same(run(optimizer, model, range(2)), run(make(twin), twin, range(2)))
