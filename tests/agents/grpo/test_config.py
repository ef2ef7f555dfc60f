from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.optimizer import OPTIMIZERS

TEXTS: dict[str, Any] = {"estimator": "grpo", "horizon": 4}


def regularized(**changes: float) -> dict[str, Any]:
    return {"regularizer": RegularizerConfig(**changes)}


def test_the_default_is_the_proper_rule_sampled_in_small_batches() -> None:
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
        (
            regularized(reward_clip=1.0),
            "reward_clip must be 0 for proper_maxrl, whose rewards are bounded, got 1.0",
        ),
        (
            regularized(confidence_power=0.0),
            "confidence_power must be 0.7 for proper_maxrl, which does not weigh advantages by "
            "confidence, got 0.0",
        ),
        (
            {"estimator": "grpo", **regularized(confidence_clip=3.0)},
            "confidence_clip must be 2.0 for grpo, which does not weigh advantages by confidence, "
            "got 3.0",
        ),
        ({"estimator": "breir"}, r"estimator must be one of .*got 'breir', did you mean 'brier'\?"),
        (
            {"exploration": "all"},
            "exploration must be sampled or all_actions for proper_maxrl, got 'all'",
        ),
        ({"estimator": "ce"}, "exploration must be all_actions for ce, got 'sampled'"),
        ({"group_size": 0}, "group_size must be at least 1 for proper_maxrl, got 0"),
        (
            {"estimator": "brier", "group_size": 2},
            "group_size must be at least 3 for brier, got 2",
        ),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"regularizer": 3}, "regularizer must be a RegularizerConfig, got 3"),
        ({"horizon": 2}, "horizon must be 1 for proper_maxrl, got 2"),
        ({"estimator": "gspo"}, "horizon must be above 1 for gspo, got 1"),
        ({"precision": "float16"}, r"precision must be one of .*, got 'float16'.*'bfloat16'\?"),
        ({"optimizer": "adam"}, r"optimizer must be one of .*, got 'adam'.*'adamw'\?"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive, got nan"),
        ({"temperature": 1e-38}, r"temperature must be within 1e-06 and 1e\+06, got 1e-38"),
        ({"temperature": 1e30}, r"temperature must be within 1e-06 and 1e\+06, got 1e\+30"),
        ({"group_size": 10**9}, "group_size must be at most 65536, got 1000000000"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"batch_size": 4.0}, "batch_size must be a whole number, got 4.0"),
        ({"group_size": True}, "group_size must be a whole number, got True"),
        ({"learning_rate": None}, "learning_rate must be a number, got None"),
        ({"sync_every": 0}, "sync_every must be positive, got 0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"clip_high": -1.0}, "clip_high must be positive, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive, got inf"),
        ({"matrix_learning_rate": 0.0}, "matrix_learning_rate must be positive, got 0.0"),
        ({"grad_clip": 0.0}, "grad_clip must be positive, got 0.0"),
        ({"match_bonus": -1.0}, "match_bonus must not be negative, got -1.0"),
        ({"warmup_updates": -1}, "warmup_updates must not be negative, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        (
            {"sync_every": 5},
            "sync_every must be 1 for proper_maxrl, whose policy samples itself, got 5",
        ),
        (
            {**TEXTS, "sync_every": 2, "precision": "bfloat16"},
            "sync_every must be 1 for texts in bfloat16, whose ratios would be its rounding, got 2",
        ),
        (
            {"estimator": "brier", "sync_every": 2},
            "sync_every must be 1 for brier, whose policy samples itself, got 2",
        ),
        (
            regularized(partial_credit=0.1),
            "partial_credit must be 0 for proper_maxrl at horizon 1, got 0.1",
        ),
        (
            {**TEXTS, **regularized(partial_credit=0.1)},
            "partial_credit must be 0 for grpo at horizon 4, got 0.1",
        ),
        (
            {**TEXTS, **regularized(kl_coefficient=0.1)},
            "kl_coefficient and entropy_floor must be 0 where horizon is above 1, whose reward is "
            "a KL itself, got 0.1 and 0.0",
        ),
        (
            {**TEXTS, **regularized(entropy_floor=0.5)},
            "kl_coefficient and entropy_floor must be 0 where horizon .* got 0.0 and 0.5",
        ),
    ],
)
def test_a_bad_recipe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GRPOConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy_bonus": -0.1}, "entropy_bonus must be finite and not negative, got -0.1"),
        ({"entropy_floor": math.inf}, "entropy_floor must be finite and not negative, got inf"),
        ({"kl_coefficient": math.nan}, "kl_coefficient must be finite and not negative, got nan"),
        ({"partial_credit": -1.0}, "partial_credit must be finite and not negative, got -1.0"),
        ({"reward_clip": math.nan}, "reward_clip must be finite and not negative, got nan"),
        ({"confidence_power": -1.0}, "confidence_power must be finite and not negative, got -1.0"),
        ({"confidence_clip": math.inf}, "confidence_clip must be finite and not negative, got inf"),
        ({"confidence_clip": 0.0}, "confidence_clip must be positive, or nothing is .*, got 0.0"),
        ({"entropy_bonus": "1"}, "entropy_bonus must be a number, got '1'"),
        ({"kl_target": -1.0}, "kl_target must be finite and not negative, got -1.0"),
        ({"kl_target": 0.5}, "kl_coefficient must be positive where kl_target is, got 0.0"),
    ],
)
def test_a_bad_regularizer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RegularizerConfig(**changes)


def test_texts_may_be_rewarded_for_entropy() -> None:
    assert GRPOConfig(**TEXTS, **regularized(entropy_bonus=0.1)).regularizer.entropy_bonus == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_chosen(name: str) -> None:
    assert GRPOConfig(optimizer=name).optimizer == name


def test_a_recipe_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        GRPOConfig().batch_size = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        RegularizerConfig().kl_target = 3.0  # type: ignore[misc]
