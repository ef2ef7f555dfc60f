"""Tests of avatarl_env/lm/cuda_graphs.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avatarl_env.lm.cuda_graphs import GraphedGeneration
from avatarl_env.lm.generation import Generation, generate
from avatarl_env.surgery import HeadGain, SurgicalTheater, find_targets
from tests.fakes import tiny_gpt

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noise(n_rows: int = 6, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(16, (n_rows, 4), generator=generator)
    return prompts.to(device), torch.rand(n_rows, 9, generator=generator).to(device)


def same(left: Generation, right: Generation) -> bool:
    return torch.equal(left.tokens, right.tokens) and torch.equal(left.log_probs, right.log_probs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_the_cpu_it_is_plain_generation(temperature: float) -> None:
    model, write = tiny_gpt(), GraphedGeneration()
    written = write(model, *noise(), temperature=temperature)
    assert same(written, generate(model, *noise(), temperature=temperature))


@pytest.mark.gpu
@needs_cuda
def test_a_replay_is_what_the_present_model_writes() -> None:
    model, write = tiny_gpt().cuda(), GraphedGeneration()
    for seed, temperature in enumerate((1.0, 1.0, 1.0, 0.5)):
        prompts, uniforms = noise(device="cuda", seed=seed)
        written = write(model, prompts, uniforms, temperature=temperature)
        assert same(written, generate(model, prompts, uniforms, temperature=temperature))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("place", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called_at_every_position(place: str) -> None:
    model, write, calls = tiny_gpt().cuda(), GraphedGeneration(), []
    write(model, *noise(device="cuda"))
    getattr(model.lm_head, place)(lambda *_: calls.append(1))
    for _ in range(2):
        write(model, *noise(device="cuda"))
    assert len(calls) == 2 * 9


@pytest.mark.gpu
@needs_cuda
def test_inside_a_theater_the_operated_model_writes() -> None:
    model, write = tiny_gpt().cuda(), GraphedGeneration()
    operator = HeadGain(find_targets(model))
    prompts, uniforms = noise(64, device="cuda")
    plain = write(model, prompts, uniforms)
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, [1.0] * len(operator.labels))
        operated = write(model, prompts, uniforms)
        assert same(operated, generate(model, prompts, uniforms))
    assert not torch.equal(operated.log_probs, plain.log_probs)
    assert same(write(model, prompts, uniforms), plain)
