"""Tests of agents/grpo/config.py: which settings and combinations are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from agents.grpo.config import GRPOConfig, RegularizerConfig

TEXTS: dict[str, Any] = {"estimator": "grpo", "horizon": 4}
ALL: dict[str, Any] = {"exploration": "all_actions"}

POSITIVE = ["batch_size", "sync_every", "temperature", "clip", "clip_high", "grad_clip"]
POSITIVE += ["learning_rate", "matrix_learning_rate"]


def regularized(**changes: Any) -> dict[str, Any]:
    return {"regularizer": RegularizerConfig(**changes)}


def test_the_default_is_proper_maxrl_sampled_in_small_batches() -> None:
    config = GRPOConfig()
    assert (config.estimator, config.exploration, config.horizon) == ("proper_maxrl", "sampled", 1)
    assert (config.group_size, config.batch_size, config.sync_every) == (16, 8, 1)
    assert (config.optimizer, config.temperature) == ("muon", 1.0)
    regularizer = dataclasses.asdict(config.regularizer)
    weight = regularizer.pop("confidence_power"), regularizer.pop("confidence_clip")
    assert weight == (0.7, 2.0)  # of seed_exhaustive alone
    assert set(regularizer.values()) == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "breir"}, "estimator must be one of .*'breir', did you mean 'brier'"),
        ({"exploration": "all"}, "exploration must be sampled or all_actions.*'all'"),
        ({"estimator": "ce"}, "exploration must be all_actions for ce, got 'sampled'"),
        ({"estimator": "grpo", **ALL}, "exploration must be sampled for grpo, got 'all_actions'"),
        ({"group_size": 0}, "group_size must be at least 1 for proper_maxrl, got 0"),
        ({"estimator": "brier", "group_size": 2}, "group_size .* at least 3 for brier, got 2"),
        ({"group_size": 10**9}, "group_size must be at most 65536, got 1000000000"),
        ({"group_size": 129, **ALL}, "group_size must be within 1 and 128 .*, got 129"),
        ({"estimator": "maxrl", "group_size": 1, **ALL}, "group_size .* within 2 and 128.* got 1"),
        ({"horizon": 0}, "horizon must be positive, got 0"),
        ({"horizon": 2}, "horizon must be 1 for proper_maxrl, got 2"),
        ({"estimator": "gspo"}, "horizon must be at least 2 for gspo, got 1"),
        ({"precision": "float16"}, "precision must be one of .*'float16'.*'bfloat16'"),
        ({"optimizer": "adam"}, "optimizer must be one of .*'adam'.*'adamw'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": 1e-38}, "temperature must be within 1e-06 and .*, got 1e-38"),
        ({"temperature": 1e30}, r"temperature must be within .* 1e\+06, got 1e\+30"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"batch_size": 4.0}, "batch_size must be a whole number, got 4.0"),
        ({"group_size": True}, "group_size must be a whole number, got True"),
        ({"learning_rate": None}, "learning_rate must be a number, got None"),
        ({"learning_rate": math.inf}, "learning_rate must be positive, got inf"),
        ({"regularizer": 3}, "regularizer must be a RegularizerConfig, got 3"),
        ({"sync_every": 5}, "sync_every must be 1 for proper_maxrl.*, got 5"),
        (
            {**TEXTS, "sync_every": 2, "precision": "bfloat16"},
            "sync_every must be 1 for texts in bfloat16.*, got 2",
        ),
        (regularized(reward_clip=1.0), "reward_clip must be 0.0 for proper_maxrl.*, got 1.0"),
        (regularized(confidence_power=0.0), "confidence_power must be 0.7 for proper.*, got 0.0"),
        (regularized(confidence_clip=3.0), "confidence_clip must be 2.0 for proper.*, got 3.0"),
        (regularized(partial_credit=0.1), "partial_credit must be 0.0 for proper.*, got 0.1"),
        (
            TEXTS | regularized(partial_credit=0.1),
            "partial_credit must be 0 for grpo .* 4, got 0.1",
        ),
        (TEXTS | regularized(kl_coefficient=0.1), "kl_coefficient must be 0 .* 4, got 0.1"),
        (TEXTS | regularized(entropy_floor=0.5), "entropy_floor must be 0 .* 4, got 0.5"),
    ],
)
def test_refusals_name_argument_rule_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GRPOConfig(**changes)


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("name", POSITIVE)
def test_what_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}$"):
        GRPOConfig(**{name: value})


@pytest.mark.parametrize("name", ["match_bonus", "warmup_updates", "weight_decay"])
def test_what_must_not_be_negative(name: str) -> None:
    assert getattr(GRPOConfig(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"^{name} must not be negative, got -1$"):
        GRPOConfig(**{name: -1})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1"])
@pytest.mark.parametrize("name", [part.name for part in dataclasses.fields(RegularizerConfig)])
def test_a_regularizers_values_are_finite_and_not_negative(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}$"):
        RegularizerConfig(**{name: value})


def test_a_regularizer_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^confidence_clip must be positive.*, got 0.0$"):
        RegularizerConfig(confidence_clip=0.0)
    with pytest.raises(ValueError, match=r"^kl_coefficient must be positive .*, got 0.0$"):
        RegularizerConfig(kl_target=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        TEXTS | regularized(entropy_bonus=0.1),
        {"estimator": "ce", "group_size": 0, **ALL},  # nothing is sampled
        {"estimator": "brier", "group_size": 1, **ALL},  # does not depend on K
        {"group_size": 1000},  # MAX_ORDER is about closed forms
        {"optimizer": "adamw"},
    ],
)
def test_what_is_allowed(changes: dict[str, Any]) -> None:
    config = GRPOConfig(**changes)
    assert all(getattr(config, name) == value for name, value in changes.items())
