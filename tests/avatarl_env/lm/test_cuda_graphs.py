from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from avatarl_env.lm import cuda_graphs as module
from avatarl_env.lm.cuda_graphs import GraphedGeneration
from avatarl_env.lm.generation import Generation, generate
from avatarl_env.surgery import HeadGain, SurgicalTheater, find_targets
from tests.training_runs import fresh_model

HAS_CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")


def dice(n_rows: int = 6, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(16, (n_rows, 4), generator=generator)
    return prompts.to(device), torch.rand(n_rows, 9, generator=generator).to(device)


def same(left: Generation, right: Generation) -> bool:
    return torch.equal(left.tokens, right.tokens) and torch.equal(left.log_probs, right.log_probs)


def test_on_the_cpu_it_is_plain_generation() -> None:
    model, write = fresh_model(), GraphedGeneration()
    for temperature in (1.0, 0.7):
        made = write(model, *dice(), temperature=temperature)
        assert same(made, generate(model, *dice(), temperature=temperature))


def test_a_model_with_hooks_is_not_captured() -> None:
    model = fresh_model()
    assert module._can_be_captured(model)
    for register in (
        model.lm_head.register_forward_hook,
        model.blocks[0].register_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not module._can_be_captured(model)
        handle.remove()
    assert module._can_be_captured(model)
    assert not module._can_be_captured(object())


@pytest.mark.gpu
@gpu
def test_a_replay_is_what_the_model_writes_as_it_stands() -> None:
    model, write = fresh_model().cuda(), GraphedGeneration()
    for seed in range(3):
        prompts, uniforms = dice(device="cuda", seed=seed)
        assert same(write(model, prompts, uniforms), generate(model, prompts, uniforms))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    first = write._capture
    write(model, *dice(device="cuda"), temperature=0.5)
    assert write._capture is not first


@pytest.mark.gpu
@gpu
def test_inside_a_theater_the_operated_model_writes() -> None:
    model, write = fresh_model().cuda(), GraphedGeneration()
    operator = HeadGain(find_targets(model))
    prompts, uniforms = dice(64, device="cuda")
    plain = write(model, prompts, uniforms)
    coefficients: Any = [1.0] * len(operator.labels)
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, coefficients)
        operated = write(model, prompts, uniforms)
        assert same(operated, generate(model, prompts, uniforms))
    assert not torch.equal(operated.log_probs, plain.log_probs)
    assert same(write(model, prompts, uniforms), plain)
