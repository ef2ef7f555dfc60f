"""Which recipes there are: every combination either learns, or is refused in one line."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.estimators import ESTIMATORS
from agents.grpo.learner import GRPOLearner
from agents.training.config import TrainConfig
from agents.training.curriculum import CurriculumConfig
from tests.training_runs import small_env


class Row(NamedTuple):
    """What may be chosen with an estimator."""

    explorations: str
    horizons: tuple[int, ...]
    others_sample: bool = False
    """Whether an older policy or the operated model may sample."""
    credit: bool = False
    """Whether partial credit may be paid, at horizon 1."""
    clip: bool = False
    """Whether rewards may be clipped."""
    confidence: bool = False
    """Whether the weight of confidence may be chosen."""


# Written out by hand from DESIGN.md, section 6.
BOTH = "sampled all_actions"
TABLE = {
    "proper_maxrl": Row(BOTH, (1,)),
    "brier": Row(BOTH, (1,)),
    "maxrl": Row(BOTH, (1,)),
    "ce": Row("all_actions", (1,)),
    "seed_exhaustive": Row("all_actions", (1,), credit=True, clip=True, confidence=True),
    "seed_sampled": Row("sampled", (1,), others_sample=True, credit=True, clip=True),
    "grpo": Row("sampled", (1, 3), others_sample=True, credit=True, clip=True),
    "dr_grpo": Row("sampled", (1, 3), others_sample=True, credit=True, clip=True),
    "rloo": Row("sampled", (1, 3), others_sample=True, credit=True, clip=True),
    "gspo": Row("sampled", (3,), others_sample=True, clip=True),
    "cispo": Row("sampled", (3,), others_sample=True, clip=True),
}
COMBINATIONS = list(
    itertools.product(
        ("sampled", "all_actions"), (1, 3), (1, 2), (0.0, 0.5), ("probe", "if_better", "rollout")
    )
)
N_ALLOWED = {
    # two explorations, no old policy, no credit, two commit policies
    "proper_maxrl": 4,
    "brier": 4,
    "maxrl": 4,
    "ce": 2,
    "seed_exhaustive": 4,  # with credit or without
    "seed_sampled": 2 * 2 * 3,  # old policy or none, credit or none, three commit policies
    "grpo": 2 * 2 * 3 + 2 * 3,  # and texts, without credit
    "dr_grpo": 18,
    "rloo": 18,
    "gspo": 6,
    "cispo": 6,
}


def is_allowed(
    row: Row, exploration: str, horizon: int, sync_every: int, credit: float, commit: str
) -> bool:
    return (
        exploration in row.explorations.split()
        and horizon in row.horizons
        and (sync_every == 1 or row.others_sample)
        and (credit == 0 or (row.credit and horizon == 1))
        and (commit != "rollout" or row.others_sample)
    )


def make(
    name: str, exploration: str, horizon: int, sync_every: int, credit: float, commit: str
) -> TrainConfig:
    recipe = GRPOConfig(
        estimator=name,
        exploration=exploration,
        horizon=horizon,
        sync_every=sync_every,
        batch_size=4,
        group_size=4,
        regularizer=RegularizerConfig(partial_credit=credit),
    )
    return TrainConfig(grpo=recipe, curriculum=CurriculumConfig(commit=commit))


def learn(config: TrainConfig) -> None:
    """Check that an update, as it would be made in joint, is finite and reaches all parameters."""
    env = small_env()
    model, tokens = env.patient.model, env.patient.splits["train"]
    rng = np.random.default_rng(0)
    learner = GRPOLearner(model, tokens, config.grpo, n_updates=3, rng=rng)
    for _ in range(config.grpo.sync_every):
        operated = None
        if config.curriculum.commit == "rollout":
            operated = env.patient.operated(env.operator, np.full(4, 0.5))
        before = [p.detach().clone() for p in model.parameters()]
        stats = learner.update(operated)
        assert all(math.isfinite(value) for value in stats)
        for old, p in zip(before, model.parameters(), strict=True):
            assert p.grad is not None
            assert p.grad.abs().max() > 0
            assert not torch.equal(old, p)
            assert p.isfinite().all()
    assert learner.n_skipped == 0


def test_the_table_has_every_estimator() -> None:
    assert TABLE.keys() == ESTIMATORS.keys() == N_ALLOWED.keys()
    for name, row in TABLE.items():
        assert sum(is_allowed(row, *combination) for combination in COMBINATIONS) == N_ALLOWED[name]


@pytest.mark.parametrize("name", TABLE)
def test_a_combination_learns_or_is_refused_in_one_line(name: str) -> None:
    for combination in COMBINATIONS:
        if is_allowed(TABLE[name], *combination):
            learn(make(name, *combination))
        else:
            with pytest.raises(ValueError, match=r"^\w+ must be .*, got \S+$") as caught:
                make(name, *combination)
            assert "\n" not in str(caught.value)
            assert name in str(caught.value)


def test_a_refusal_names_the_argument_that_does_not_fit() -> None:
    cases: dict[str, tuple[Any, ...]] = {
        "exploration": ("grpo", "all_actions", 1, 1, 0.0, "probe"),
        "horizon": ("brier", "sampled", 3, 1, 0.0, "probe"),
        "sync_every": ("brier", "sampled", 1, 2, 0.0, "probe"),
        "partial_credit": ("grpo", "sampled", 3, 1, 0.5, "probe"),
        "commit": ("proper_maxrl", "sampled", 1, 1, 0.0, "rollout"),
    }
    for argument, combination in cases.items():
        with pytest.raises(ValueError, match=f"^{argument} must be "):
            make(*combination)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(
    ("option", "value", "possible"),
    [
        ("reward_clip", 0.5, "clip"),
        ("confidence_power", 1.0, "confidence"),
        ("confidence_clip", 1.0, "confidence"),
    ],
)
def test_an_option_is_refused_where_it_would_not_act(
    name: str, option: str, value: float, possible: str
) -> None:
    row = TABLE[name]
    recipe: dict[str, Any] = {"estimator": name, "exploration": row.explorations.split()[0]}
    recipe |= {"horizon": row.horizons[0], "batch_size": 4, "group_size": 4}
    recipe["regularizer"] = RegularizerConfig(**{option: value})
    if getattr(row, possible):
        learn(TrainConfig(grpo=GRPOConfig(**recipe)))
    else:
        with pytest.raises(ValueError, match=rf"^{option} must be .* for {name}, .*, got {value}$"):
            GRPOConfig(**recipe)
