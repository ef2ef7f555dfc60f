"""Every combination of settings is allowed or refused in one line, for every estimator."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.estimators import ESTIMATORS
from agents.training.config import TrainConfig
from agents.training.curriculum import CurriculumConfig


class Choice(NamedTuple):
    """What is combined with an estimator."""

    exploration: str = "sampled"
    horizon: int = 1
    sync_every: int = 1
    partial_credit: float = 0.0
    commit: str = "probe"


CHOICES = [
    Choice(*values)
    for values in itertools.product(
        ("sampled", "all_actions"), (1, 3), (1, 2), (0.0, 0.5), ("probe", "if_better", "rollout")
    )
]
N_ALLOWED = {
    "proper_maxrl": 4,  # two explorations, two commit policies
    "brier": 4,
    "maxrl": 4,
    "ce": 2,
    "seed_exhaustive": 4,  # with credit or without
    "seed_sampled": 12,  # old policy or none, credit or none, three commit policies
    "grpo": 18,  # and texts, without credit
    "dr_grpo": 18,
    "rloo": 18,
    "gspo": 6,
    "cispo": 6,
}
"""How many choices each of our estimators allows."""


def make(estimator: str, choice: Choice) -> TrainConfig | str:
    """Return such a configuration, or why there is none."""
    chosen = choice._asdict()
    commit, credit = chosen.pop("commit"), chosen.pop("partial_credit")
    try:
        extra = RegularizerConfig(partial_credit=credit)
        recipe = GRPOConfig(
            estimator=estimator, batch_size=4, group_size=4, regularizer=extra, **chosen
        )
        return TrainConfig(grpo=recipe, curriculum=CurriculumConfig(commit=commit))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_combination_is_allowed_or_refused_in_one_line(name: str) -> None:
    n_allowed = 0
    for choice in CHOICES:
        found = make(name, choice)
        if isinstance(found, str):
            argument, *_ = found.split()
            assert argument in Choice._fields
            assert found.endswith(f"got {getattr(choice, argument)!r}")
            assert name in found
            assert "\n" not in found
        else:
            n_allowed += 1
    assert n_allowed == N_ALLOWED.get(name, n_allowed) > 0
