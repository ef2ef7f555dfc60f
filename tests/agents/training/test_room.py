"""Tests of agents/room.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from agents.training.room import check_room

from agents.training.config import PRESET_NAMES, TrainConfig, preset
from avatarl_env.memory import GIB

CPU = torch.device("cpu")


def with_settings(config: TrainConfig, **parts: dict[str, Any]) -> TrainConfig:
    """Change settings of a part: `lm={"width": 8}`."""
    changed = {name: replace(getattr(config, name), **values) for name, values in parts.items()}
    return replace(config, **changed)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_presets_fit_a_small_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.training.room.memory_limit", lambda: 4 * GIB)
    check_room(preset(name), 100, CPU)


@pytest.mark.parametrize(
    ("parts", "argument"),
    [
        ({"lm": {"width": 10**9}}, "lm"),
        ({"lm": {"context": 10**12}}, "lm"),
        ({"grpo": {"batch_size": 10**12}}, "batch_size"),
        ({"grpo": {"group_size": 65_536, "batch_size": 10**8}}, "batch_size"),
        (
            {
                "grpo": {
                    "estimator": "grpo",
                    "horizon": 4,
                    "group_size": 65_536,
                    "batch_size": 10**8,
                }
            },
            "batch_size",
        ),
        ({"curriculum": {"paired_prompts": 10**12}}, "paired_prompts"),
    ],
)
def test_what_cannot_fit_is_refused_by_name(parts: dict[str, Any], argument: str) -> None:
    config = with_settings(preset("smoke"), **parts)
    with pytest.raises(ValueError, match=f"^{argument}.* must fit the memory, .* got a need of at"):
        check_room(config, 64, CPU)


def test_a_layer_counts_whatever_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_settings(preset("smoke"), lm={"n_layers": 10_000, "n_heads": 1, "width": 2})
    monkeypatch.setattr("agents.training.room.memory_limit", lambda: 450_000_000)
    with pytest.raises(ValueError, match=r"^lm \(n_layers, width\) must fit the memory"):
        check_room(config, 64, CPU)


def test_a_replay_buffer_counts() -> None:
    config = replace(preset("smoke"), surgeon_options={"buffer_size": 10**12})
    with pytest.raises(ValueError, match=r"^buffer_size must fit the memory"):
        check_room(config, 64, CPU)


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_settings(preset("smoke"), grpo={"batch_size": 64_000})
    monkeypatch.setattr("agents.training.room.memory_limit", lambda: 8 * GIB)
    with pytest.raises(ValueError, match=r"^batch_size must fit"):
        check_room(config, 64, CPU)
    check_room(config, 64, CPU, n_processes=64)
