from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from agents.surgeons.randomness import PrivateRandomness
from tests.patients import global_random_states

# ruff: noqa: NPY002


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def fresh(seed: int, n: int = 1) -> list[tuple[float, float, float]]:
    python, numpy = random.Random(seed), np.random.RandomState(seed)
    generator = torch.Generator().manual_seed(seed)
    return [
        (python.random(), float(numpy.rand()), float(torch.rand(1, generator=generator)))
        for _ in range(n)
    ]


def test_inside_are_the_streams_of_the_seed_and_outside_nothing_changes() -> None:
    left, right = PrivateRandomness(5), PrivateRandomness(1)
    drawn = []
    for _ in range(2):
        draw()
        before = global_random_states()
        with left.use():
            drawn.append(draw())
            with right.use():
                draw()
                torch.manual_seed(99)
                np.random.seed(99)
        assert global_random_states() == before
    assert drawn == fresh(5, 2)


def test_an_exception_gives_the_generators_back_too() -> None:
    randomness = PrivateRandomness(5)

    def draw_and_break_off() -> None:
        with randomness.use():
            draw()
            raise KeyboardInterrupt

    before = global_random_states()
    with pytest.raises(KeyboardInterrupt):
        draw_and_break_off()
    assert global_random_states() == before
    with randomness.use():
        assert [draw()] == fresh(5, 2)[1:]


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**40 + 7])
def test_a_state_restores_the_streams_of_any_seed(seed: int) -> None:
    randomness = PrivateRandomness(seed)
    with randomness.use():
        draw()
    state = randomness.get_state()
    state["python"] = [*state["python"][:1], list(state["python"][1]), *state["python"][2:]]
    other = PrivateRandomness(0)
    other.set_state(state)
    with randomness.use():
        expected = draw()
    with other.use():
        assert draw() == expected
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        other.set_state({**state, "torch": torch.zeros(3)})


def test_seeding_torch_inside_leaves_devices_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]

    def set_all(states: list[torch.Tensor]) -> None:
        devices[:] = states

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [d.clone() for d in devices])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", set_all)
    with PrivateRandomness(0).use():
        set_all([torch.zeros(1, dtype=torch.uint8)] * 2)
    assert [int(device) for device in devices] == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_keeps_its_generator() -> None:
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    with PrivateRandomness(0).use():
        torch.manual_seed(0)
        torch.rand(1, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
