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
    python = random.Random(seed)
    numpy = np.random.RandomState(seed)
    generator = torch.Generator().manual_seed(seed)
    return [
        (python.random(), float(numpy.rand()), float(torch.rand(1, generator=generator)))
        for _ in range(n)
    ]


def test_making_one_touches_nothing() -> None:
    before = global_random_states()
    PrivateRandomness(3)
    assert global_random_states() == before


def test_inside_the_global_generators_are_those_of_the_seed() -> None:
    randomness = PrivateRandomness(3)
    with randomness.use():
        inside = draw()
    assert [inside] == fresh(3)


def test_outside_the_global_generators_go_on_as_if_nothing_had_been() -> None:
    before = global_random_states()
    expected = [draw(), draw()]
    random.setstate(before[0])  # type: ignore[arg-type]
    torch.set_rng_state(torch.tensor(before[-1], dtype=torch.uint8))
    np.random.set_state((before[1], before[2], *before[3]))  # type: ignore[misc,arg-type]
    got = [draw()]
    with PrivateRandomness(3).use():
        draw()
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
    assert [*got, draw()] == expected


def test_the_stream_goes_on_from_one_use_to_the_next_whatever_others_draw() -> None:
    randomness = PrivateRandomness(5)
    drawn = []
    for _ in range(3):
        draw()
        with randomness.use():
            drawn.append(draw())
    assert drawn == fresh(5, 3)


def test_an_exception_gives_the_generators_back_too() -> None:
    randomness = PrivateRandomness(5)
    before = global_random_states()

    def draw_and_break_off() -> None:
        with randomness.use():
            draw()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_and_break_off()
    assert global_random_states() == before
    with randomness.use():
        assert [draw()] == fresh(5, 2)[1:]  # what was drawn before it stays drawn


def test_two_consumers_do_not_disturb_each_other() -> None:
    left, right = PrivateRandomness(1), PrivateRandomness(2)
    with left.use():
        first = draw()
        with right.use():
            other = draw()
        second = draw()
    assert [first, second] == fresh(1, 2)
    assert [other] == fresh(2)


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**40 + 7])
def test_any_seed_will_do(seed: int) -> None:
    with PrivateRandomness(seed).use():
        first = draw()
    with PrivateRandomness(seed).use():
        assert draw() == first


def test_seeding_torch_inside_leaves_the_devices_outside_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]

    def seed_all(states: list[torch.Tensor]) -> None:
        devices[:] = states

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [d.clone() for d in devices])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", seed_all)
    with PrivateRandomness(0).use():
        seed_all([torch.zeros(1, dtype=torch.uint8)] * 2)
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
