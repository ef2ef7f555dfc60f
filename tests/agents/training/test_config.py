from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from agents.grpo.config import GRPOConfig
from agents.tracking.wandb import TRACK_CHOICES
from agents.training.config import (
    MOST_THREADS,
    PRESET_NAMES,
    BadInput,
    ModelConfig,
    TrainConfig,
    from_settings,
    preset,
    to_settings,
)
from agents.training.curriculum import CurriculumConfig
from avatarl_env.episode import EpisodeConfig
from avatarl_env.surgery import OPERATORS

EARLIER = ("seed_sampled", "seed_exhaustive")
UNCHOSEN = {"reward_clip": 0.0, "confidence_power": 0.7, "confidence_clip": 2.0}


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_knows_its_name_and_hangs_together(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    config.operation.check_context(config.lm.context)
    assert preset(name) == config
    if name in EARLIER:
        assert config.surgeon == "none"
        assert config.grpo.estimator == name
    else:
        assert config.surgeon == "sac"
        assert (config.grpo.estimator, config.grpo.exploration) == ("proper_maxrl", "sampled")
        assert config.curriculum.commit == "if_better"


def test_the_recipes_that_came_before_are_as_documented() -> None:
    sampled, exhaustive = (preset(name).grpo for name in EARLIER)
    assert (sampled.exploration, sampled.group_size, sampled.temperature) == ("sampled", 4, 1.2)
    assert (sampled.sync_every, sampled.clip, sampled.clip_high) == (5, 0.5, 0.5)
    assert dataclasses.asdict(sampled.regularizer) == {
        "entropy_bonus": 0.01,
        "entropy_floor": 0.0,
        "kl_coefficient": 0.1,
        "kl_target": 0.5,
        "partial_credit": 0.1,
        **UNCHOSEN,
    }
    assert (exhaustive.exploration, exhaustive.sync_every) == ("all_actions", 1)
    assert dataclasses.asdict(exhaustive.regularizer) == {
        "entropy_bonus": 0.0,
        "entropy_floor": 1.5,
        "kl_coefficient": 0.0,
        "kl_target": 0.0,
        "partial_credit": 0.1,
        **UNCHOSEN,
    }
    for name in EARLIER:  # as large as the laptop's, of GRPO alone
        config = preset(name)
        assert (config.lm, config.grpo.batch_size) == (TrainConfig().lm, 8)
        assert config.grpo.optimizer == "adamw"
        assert config.curriculum.n_updates == config.curriculum.bootstrap_updates == 1200


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_configuration_comes_back_from_its_settings(name: str) -> None:
    config = preset(name)
    settings = json.loads(json.dumps(to_settings(config)))
    assert from_settings({**settings, "corpus_sha256": "0" * 64}) == config


@pytest.mark.parametrize("part", ["", "lm", "grpo", "grpo.regularizer", "operation", "curriculum"])
def test_every_infinite_setting_that_is_accepted_comes_back(part: str) -> None:
    names = part.split(".") if part else []
    owners: list[Any] = [preset("smoke")]
    for name in names:
        owners.append(getattr(owners[-1], name))
    n_accepted = 0
    for field in dataclasses.fields(owners[-1]):
        for value in (math.inf, -math.inf) if "float" in str(field.type) else ():
            if field.name == "surgeon_options":
                value = {"max_grad_norm": value, "learning_rate": 1e-3}  # noqa: PLW2901
            try:
                changed = dataclasses.replace(owners[-1], **{field.name: value})
                for owner, name in zip(owners[-2::-1], reversed(names), strict=True):
                    changed = dataclasses.replace(owner, **{name: changed})
            except ValueError:
                continue
            n_accepted += 1
            stored = json.dumps(to_settings(changed), allow_nan=False)
            assert from_settings(json.loads(stored)) == changed
    assert n_accepted >= (0 if part else 3)


def test_the_name_of_a_preset_is_that_preset() -> None:
    for name in PRESET_NAMES:
        assert TrainConfig(preset=name) == preset(name)
        assert dataclasses.replace(preset(name), seed=1).lm == preset(name).lm
    mixed = TrainConfig(preset="smoke", seed=3, surgeon="zero")
    assert mixed == dataclasses.replace(preset("smoke"), seed=3, surgeon="zero")
    # Every setting is the laptop's here, under another name.
    message = (
        r"^preset must be 'laptop', whose settings .*, got 'smoke'; .* write preset\('smoke'\)$"
    )
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("laptop"), preset="smoke")


def test_settings_without_a_part_or_with_one_too_many_are_refused() -> None:
    for change in (
        lambda settings: settings["grpo"].pop("regularizer"),
        lambda settings: settings["grpo"]["regularizer"].update(more=1.0),
        lambda settings: settings.pop("grpo"),
        lambda settings: settings.update(more=1),
    ):
        settings = dataclasses.asdict(TrainConfig())
        change(settings)
        with pytest.raises(ValueError, match=r"\S"):
            from_settings(settings)


def test_the_operated_model_may_sample_only_where_a_ratio_makes_up_for_it() -> None:
    rollout = CurriculumConfig(commit="rollout")
    for estimator in ("grpo", "dr_grpo", "rloo"):
        config = TrainConfig(grpo=GRPOConfig(estimator=estimator), curriculum=rollout)
        assert config.curriculum.commit == "rollout"
    with pytest.raises(
        ValueError,
        match=r"^commit must be probe or if_better for proper_maxrl, whose policy samples itself, "
        r"got 'rollout'$",
    ):
        TrainConfig(curriculum=rollout)


def test_the_default_is_a_preset() -> None:
    assert preset("laptop") == TrainConfig()


def test_presets_grow() -> None:
    def cost(name: str) -> int:
        config = preset(name)
        size = config.lm.n_layers * config.lm.width**2
        positions = config.grpo.batch_size * config.lm.context
        return size * positions * config.curriculum.n_updates

    assert cost("smoke") < cost("laptop") < cost("full")


def test_an_unknown_preset_is_refused_with_the_closest() -> None:
    with pytest.raises(
        ValueError,
        match=r"^preset must be one of \['full', 'laptop', 'seed_exhaustive', 'seed_sampled', "
        r"'smoke'\], got 'lapptop', did you mean 'laptop'\?$",
    ):
        preset("lapptop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "smok"}, r"preset must be one of .*got 'smok', did you mean 'smoke'\?"),
        ({"surgeon": "zerro"}, r"surgeon must be one of .*got 'zerro', did you mean 'zero'\?"),
        (
            {"operator": "head_gian"},
            r"operator must be one of .*got 'head_gian', did you mean 'head_gain'\?",
        ),
        ({"track": "offlin"}, r"track must be one of .*got 'offlin', did you mean 'offline'\?"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"threads": -2}, "threads must be an integer of at least 0, got -2"),
        ({"threads": MOST_THREADS + 1}, "threads must be at most 1024, got 1025"),
        *(
            ({name: value}, f"{name} must be an? {rule}.*, got {re.escape(repr(value))}")
            for name, rule, values in (
                ("seed", "integer of at least 0", (1.5, True, "3")),
                ("threads", "integer of at least 0", (2.5, True)),
                ("checkpoint_seconds", "finite number", ("x", True, math.nan)),
                ("corpus", "string", (3, None)),
                ("out", "string", (3, "")),
                ("resume", "string", (3,)),
                ("device", "string", (3, None)),
                ("surgeon_options", "dict with names as keys", (3, {3: 1})),
                ("lm", "ModelConfig", (3, {"width": 8})),
                ("grpo", "GRPOConfig", (3,)),
                ("operation", "EpisodeConfig", (3,)),
                ("curriculum", "CurriculumConfig", (3,)),
            )
            for value in values
        ),
        ({"tensorboard": "no"}, "tensorboard must be True or False, got 'no'"),
        ({"checkpoint_seconds": -1}, r"checkpoint_seconds must be in \[0, inf\], got -1"),
        (
            {
                "lm": ModelConfig(context=64),
                "operation": EpisodeConfig(prompt_length=32, n_new=60),
            },
            r"prompt_length \+ n_new must fit the model's context of 64, got 32 \+ 60",
        ),
    ],
)
def test_a_bad_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_heads": 3},
            "n_heads must divide width into even head dims, got width=128 and n_h.*=3",
        ),
        ({"n_heads": 128}, "n_heads must divide width into even head dims, .* n_heads=128"),
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"n_layers": -1}, "n_layers must be at least 1, got -1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ModelConfig(**{"width": 128, **changes})


def test_the_sizes_of_the_model_are_those_chosen() -> None:
    sizes = ModelConfig(context=24, n_layers=3, n_heads=2, width=20).with_vocabulary(7)
    assert dataclasses.asdict(sizes) == {
        "vocab_size": 7,
        "context": 24,
        "n_layers": 3,
        "n_heads": 2,
        "width": 20,
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_can_be_chosen(name: str) -> None:
    assert TrainConfig(operator=name).operator == name


def test_an_operator_of_ones_own_can_be_chosen(in_place_gain: str) -> None:
    assert TrainConfig(operator=in_place_gain).operator == in_place_gain


def test_every_choice_of_tracking_is_one_that_the_run_folder_knows() -> None:
    for track in (None, *TRACK_CHOICES):
        assert TrainConfig(track=track).track == track


def test_event_files_for_tensorboard_are_written_on_request_only() -> None:
    assert not any(preset(name).tensorboard for name in PRESET_NAMES)
    assert TrainConfig(tensorboard=True).tensorboard


def test_a_configuration_cannot_be_changed_only_replaced() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert dataclasses.replace(config, seed=3).seed == 3


def test_no_part_has_more_than_twenty_fields() -> None:
    config = TrainConfig()
    parts = (config, config.lm, config.grpo, config.operation, config.curriculum)
    for part in (*parts, config.grpo.regularizer):
        assert len(dataclasses.fields(part)) <= 20


def test_bad_input_is_a_value_error() -> None:
    assert issubclass(BadInput, ValueError)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"injury": 0.5}, "injury must be 0 in a run, .* got 0.5"),
        ({"split": "validation"}, "split must be 'surgeon' in a run, .* got 'validation'"),
        ({"split": "train"}, "split must be 'surgeon' in a run, .* got 'train'"),
    ],
)
def test_what_would_make_a_runs_verdict_untrue_is_refused(
    operation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(operation=EpisodeConfig(**operation))
