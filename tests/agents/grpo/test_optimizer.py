"""Tests of agents/grpo/optimizer.py."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from agents.grpo.optimizer import OPTIMIZERS, Optimizer
from avatarl_env.lm.gpt import GPT
from tests.training_runs import fresh_model, same

# By hand, for two blocks: what is inside them and what is not.
MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
VECTORS = ["norm.weight"] + [f"blocks.{i}.norm_{j}.weight" for i in (0, 1) for j in (1, 2)]


def make(model: GPT, name: str = "muon", **changes: float) -> Optimizer:
    rates = {"rate": 0.1, "matrix_rate": 0.05, "weight_decay": 0.2, **changes}
    return Optimizer(model, name, **rates)


def weights(model: GPT) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def with_gradients(model: GPT, seed: int = 1) -> list[Tensor]:
    """Give every parameter a gradient; return the parameters as they are."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return weights(model)


def run(optimizer: Optimizer, model: GPT, seeds: range) -> list[Tensor]:
    for seed in seeds:
        with_gradients(model, seed)
        optimizer.step(0.5)
    return weights(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_has_one_optimizer(name: str) -> None:
    model = fresh_model()
    names = {p: name for name, p in model.named_parameters()}
    inner = [f"blocks.{i}.{matrix}.weight" for i in (0, 1) for matrix in MATRICES]
    expected = {(part, "Muon" if name == "muon" else "AdamW", 0.2) for part in inner}
    expected |= {("embed.weight", "AdamW", 0.2)}  # also the output head
    expected |= {(part, "AdamW", 0.0) for part in VECTORS}
    listed = [
        (names[p], type(part).__name__, group["weight_decay"])
        for part, _ in make(model, name).parts
        for group in part.param_groups
        for p in group["params"]
    ]
    assert set(listed) == expected
    assert len(listed) == len(names)


def test_a_step_of_muon_is_orthogonal_and_larger_for_tall_matrices() -> None:
    model = fresh_model()
    before = with_gradients(model)
    make(model, weight_decay=0.0).step(1.0)
    for (name, new), old in zip(model.named_parameters(), before, strict=True):
        if name.startswith("blocks.") and old.dim() == 2:
            rows, columns = old.shape
            step = (old - new.detach()) / (0.05 * math.sqrt(max(1.0, rows / columns)))
            # Five Newton-Schulz steps bring all but the smallest singular values near 1.
            values = torch.linalg.svdvals(step)
            assert values.quantile(0.1) > 0.6, name
            assert values.max() < 1.3, name


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0])
def test_the_first_step_of_adamw_is_the_gradients_sign(factor: float) -> None:
    model = fresh_model()
    before = with_gradients(model)
    optimizer = make(model, "adamw", weight_decay=0.0)
    optimizer.step(factor)
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        expected = old - factor * 0.1 * p.grad.sign()  # a share of the peak rate
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-3 * factor)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "matrix_rate"), [("muon", 0.05), ("adamw", 0.1)])
def test_without_a_gradient_matrices_decay_and_vectors_stay(name: str, matrix_rate: float) -> None:
    model = fresh_model()
    optimizer, before = make(model, name), weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    for (where, p), old in zip(model.named_parameters(), before, strict=True):
        rate = 0.5 * (matrix_rate if where.startswith("blocks.") else 0.1)
        expected = old * (1 - rate * 0.2) if p.dim() == 2 else old
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_resumes_exactly_from_its_state(name: str) -> None:
    model = fresh_model()
    optimizer = make(model, name)
    assert optimizer.get_state() == {}
    run(optimizer, model, range(3))
    state = copy.deepcopy(optimizer.get_state())
    assert state.keys() == dict(model.named_parameters()).keys()
    copies = [copy.deepcopy(model) for _ in range(2)]
    expected = run(optimizer, model, range(3, 6))

    other = make(copies[0], name)
    run(other, copy.deepcopy(copies[0]), range(1))
    other.set_state(state)
    assert same(run(other, copies[0], range(3, 6)), expected)
    fresh = make(copies[1], name)
    fresh.set_state({})
    assert not same(run(fresh, copies[1], range(3, 6)), expected)
