"""Tests of agents/training/build.py: the parts of a run, and whether they fit the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents.training.build import Generators, check_room
from agents.training.config import TrainConfig, preset
from agents.training.presets import PRESETS
from avatarl_env.memory import GIB

CPU = torch.device("cpu")


def with_settings(config: TrainConfig, **changes: dict[str, Any]) -> TrainConfig:
    """Change settings of parts, `lm={"width": 8}`, or options."""
    changed: dict[str, Any] = {}
    for name, values in changes.items():
        part = getattr(config, name)
        changed[name] = values if isinstance(part, dict) else replace(part, **values)
    return replace(config, **changed)


def test_every_consumer_has_a_generator_of_its_own() -> None:
    def draws(seed: int) -> list[float]:
        g = Generators.spawn(seed)
        streams = (g.grpo, g.commit, g.effect, g.samples)
        return [float(torch.rand(1, generator=g.init)), *(float(s.random()) for s in streams)]

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 10
    seeds = {Generators.spawn(seed).surgeon_seed for seed in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)


# Memory.


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the memory of the machine, in GiB."""
    name = "agents.training.build.memory_limit"
    return lambda gib: monkeypatch.setattr(name, lambda: int(gib * GIB))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_a_small_machine(name: str, limit: Callable[[float], None]) -> None:
    limit(4)
    check_room(preset(name), 100, CPU)


LM = r"lm \(n_layers, width\)"


@pytest.mark.parametrize(
    ("changes", "argument", "gib"),
    [
        ({"lm": {"width": 10**9}}, LM, 64),
        ({"lm": {"context": 10**12}}, LM, 64),
        ({"lm": {"n_layers": 10_000, "n_heads": 1, "width": 2}}, LM, 0.42),
        ({"grpo": {"batch_size": 10**8}}, "batch_size", 64),
        ({"grpo": {"group_size": 65_536, "batch_size": 10**6}}, "batch_size", 64),
        ({"grpo": {"estimator": "grpo", "horizon": 4, "batch_size": 10**8}}, "batch_size", 64),
        ({"curriculum": {"paired_prompts": 10**9}}, "paired_prompts", 64),
        ({"curriculum": {"effect_prompts": 10**9}}, "effect_prompts", 64),
        ({"curriculum": {"sample_length": 10**11}}, "sample_length", 64),
        ({"surgeon_options": {"buffer_size": 10**9}}, "buffer_size", 64),
    ],
)
def test_what_cannot_fit_the_memory_is_refused_by_name(
    changes: dict[str, Any], argument: str, gib: float, limit: Callable[[float], None]
) -> None:
    limit(gib)
    config = with_settings(preset("smoke"), **changes)
    with pytest.raises(ValueError, match=f"^{argument} must fit the memory.* GiB, got .* GiB$"):
        check_room(config, 64, CPU)


def test_ranks_share_a_batch(limit: Callable[[float], None]) -> None:
    limit(8)
    config = with_settings(preset("smoke"), grpo={"batch_size": 64_000})
    with pytest.raises(ValueError, match=r"^batch_size must fit"):
        check_room(config, 64, CPU)
    check_room(config, 64, CPU, n_ranks=64)
