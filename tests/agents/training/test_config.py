"""Tests of agents/training/config.py and presets.py."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from agents.grpo.config import GRPOConfig
from agents.training.config import MOST_THREADS, TrainConfig, from_settings, preset, to_settings
from agents.training.curriculum import CurriculumConfig
from agents.training.presets import PRESETS, ModelConfig
from avatarl_env.episode import EpisodeConfig
from avatarl_env.surgery import OPERATORS

EARLIER = ("seed_sampled", "seed_exhaustive")


def through_json(config: TrainConfig) -> TrainConfig:
    """Store a configuration as `config.json` does, and read it again."""
    return from_settings(json.loads(json.dumps(to_settings(config), allow_nan=False)))


# Presets.


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_complete_and_comes_back_from_json(name: str) -> None:
    config = preset(name)
    assert config == TrainConfig(preset=name)
    assert config.preset == name
    assert config.grpo.estimator == (name if name in EARLIER else "proper_maxrl")
    assert config.surgeon == ("none" if name in EARLIER else "sac")
    assert through_json(config) == config


def test_the_default_is_the_laptop_and_presets_grow() -> None:
    def cost(name: str) -> int:
        config = preset(name)
        positions = config.grpo.batch_size * config.lm.context * config.curriculum.n_updates
        return config.lm.n_layers * config.lm.width**2 * positions

    assert TrainConfig() == preset("laptop")
    assert cost("smoke") < cost("laptop") < cost("full")
    for name in EARLIER:  # as large as the laptop's, without surgery
        assert preset(name).lm == TrainConfig().lm
        assert preset(name).curriculum.n_updates == 1200


def test_a_part_that_is_given_replaces_the_presets() -> None:
    mixed = TrainConfig(preset="smoke", surgeon="zero", lm=ModelConfig(n_layers=1))
    assert mixed.grpo == preset("smoke").grpo
    assert (mixed.surgeon, mixed.lm.n_layers) == ("zero", 1)
    with pytest.raises(ValueError, match=r"^preset must be 'laptop'.*got 'smoke'.*preset\('smoke'"):
        dataclasses.replace(preset("laptop"), preset="smoke")


# Settings.


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_seconds": math.inf, "surgeon_options": {"max_grad_norm": -math.inf}},
        {"score": {"kl_ref": 1, "heldout_loss": 20}, "layers": [0, -1, "blocks.*"]},
        {"track": "offline", "tensorboard": True, "threads": 2, "device": "cpu", "seed": 2**100},
        {"grpo": GRPOConfig(estimator="rloo"), "curriculum": CurriculumConfig(commit="rollout")},
    ],
)
def test_settings_come_back_from_json(changes: dict[str, Any]) -> None:
    config = TrainConfig(**changes)
    assert through_json(config) == config
    assert config != TrainConfig()


def test_settings_of_an_older_run_may_lack_score_and_layers() -> None:
    settings = to_settings(TrainConfig())
    del settings["score"], settings["layers"]
    assert from_settings(settings | {"corpus_sha256": "0", "processes": 1}) == TrainConfig()


@pytest.mark.parametrize(
    ("missing", "unknown"), [("grpo", {}), ("lm", {}), ("", {"more": 1}), ("", {"lm": {"more": 1}})]
)
def test_settings_with_a_part_missing_or_unknown_are_refused(
    missing: str, unknown: dict[str, Any]
) -> None:
    settings = to_settings(TrainConfig()) | unknown
    settings.pop(missing, None)
    with pytest.raises(ValueError, match=rf"config\.json must be .*{missing or 'more'}"):
        from_settings(settings)


@pytest.mark.parametrize("name", [*OPERATORS, "in_place_gain"])
def test_every_operator_can_be_chosen(name: str, in_place_gain: str) -> None:
    assert TrainConfig(operator=name).rules["operator"] == name
    assert in_place_gain in OPERATORS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, f"^{name} must be one of .*{value!r}.*{meant!r}")
            for name, value, meant in [
                ("preset", "smok", "smoke"),
                ("surgeon", "zerro", "zero"),
                ("operator", "head_gian", "head_gain"),
                ("track", "offlin", "offline"),
            ]
        ),
        *(
            ({name: value}, f"^{name} must be .*{rule}.*, got {re.escape(repr(value))}")
            for name, rule, values in [
                ("seed", "integer of at least 0", (-1, 1.5, True, "3")),
                ("threads", "integer of at least 0", (-2, 2.5, True)),
                ("threads", f"at most {MOST_THREADS}", (MOST_THREADS + 1,)),
                ("checkpoint_seconds", "finite number", ("x", True, math.nan)),
                ("checkpoint_seconds", r"\[0, inf\]", (-1,)),
                ("corpus", "string", (3, None)),
                ("out", "string", (3, "")),
                ("resume", "string", (3,)),
                ("device", "string", (3, None)),
                ("tensorboard", "True or False", ("no",)),
                ("surgeon_options", "dict with names as keys", (3, {3: 1})),
                ("lm", "ModelConfig", (3, {"width": 8})),
                ("grpo", "GRPOConfig", (3,)),
                ("operation", "EpisodeConfig", (3,)),
                ("curriculum", "CurriculumConfig", (3,)),
                ("layers", "numbers, names or globs", (1.5, {3: 1})),
                ("score", "dict with names as keys", (["kl_ref"],)),
            ]
            for value in values
        ),
        ({"layers": [1.5]}, "^layers must be numbers, names or globs, got 1.5"),
        ({"layers": ()}, "^layers must have 1 to .*, got "),
        ({"score": {"kl_ref": "1"}}, r"^score\['kl_ref'\] must be a finite number, got '1'"),
        ({"score": {}}, "^score must weigh at least one term"),
        ({"score": {"klref": 1}}, "^score must be one of .*'klref'.*'kl_ref'"),
        ({"score": {"kl_ref": math.nan}}, r"^score\['kl_ref'\] must be a finite number, got nan"),
        ({"operation": EpisodeConfig(prompt_length=64, n_new=65)}, "context of 128, got 64 .* 65"),
        # What would make a run's verdict untrue.
        ({"operation": EpisodeConfig(injury=0.5)}, "^injury must be 0 in a run.*0.5"),
        ({"operation": EpisodeConfig(split="train")}, "^split must be 'surgeon' in a run.*'train'"),
        # The operated model may sample only where ratios correct for it.
        ({"curriculum": CurriculumConfig(commit="rollout")}, "^commit must be .*maxrl.*'rollout'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"n_heads": 3}, "n_heads"),
        ({"n_heads": 128}, "n_heads"),
        ({"n_heads": 0}, "n_heads"),
        ({"width": 0}, "width"),
        ({"context": 0}, "context"),
        ({"n_layers": -1}, "n_layers"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must .*{changes[argument]}$"):
        ModelConfig(**{"width": 128, **changes})
