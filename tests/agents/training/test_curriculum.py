"""Tests of agents/training/curriculum.py: phases as data, and what a step is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agents.evaluation.paired import PairedResult
from agents.evaluation.statistics import Interval
from agents.surgeons.registry import Surgeon, make_surgeon
from agents.training import curriculum as curriculum_module
from agents.training.curriculum import Commit, Curriculum, CurriculumConfig, Phase, make_phases
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.agents.training.broken_runs import QUICK
from tests.training_runs import (
    ScriptedSurgeon,
    episode_record,
    everything,
    make_learner,
    same,
    small_curriculum,
    small_env,
    small_eval_env,
    taught_patient,
)

BOOTSTRAP = Phase("bootstrap", 6, updates=1)
SURGERY = Phase("surgery", 2, operations=2)
JOINT = Phase("joint", 2, updates=2, operations=2)
HEALS, HARMS = -0.8, 0.8
"""Coefficients that undo or add to the injury of `injured_env`."""


def make_curriculum(
    env: AttentionSurgeryVectorEnv,
    surgeon: Surgeon | None,
    recipe: dict[str, Any] | None = None,
    **changes: Any,
) -> Curriculum:
    """Build a curriculum on the patient of `env`, with two rows to evaluate on."""
    patient, rng = env.patient, np.random.default_rng(5)
    learner = make_learner(patient.model, patient.splits["train"], n_updates=7, **(recipe or {}))
    config = small_curriculum(**changes)
    return Curriculum(learner, small_eval_env(patient), surgeon, config, rng)


def injured_env(injury: float = 0.8) -> AttentionSurgeryVectorEnv:
    """Return an environment whose model knows its text but has an injury committed."""
    env = small_env(taught_patient())
    env.patient.commit(env.operator, np.full(4, injury))
    return env


def tried(curriculum: Curriculum) -> Commit:
    """Try to commit an operation; return how that went."""
    commit = curriculum.try_commit()
    assert commit is not None
    return commit


# Phases as data.


@pytest.mark.parametrize(
    ("surgeon", "commit", "phases"),
    [
        ("sac", "probe", (BOOTSTRAP, SURGERY, JOINT)),
        ("zero", "if_better", (BOOTSTRAP, SURGERY, JOINT._replace(commits=True))),
        ("random", "rollout", (BOOTSTRAP, SURGERY, JOINT._replace(rollouts=True))),
        # Without a surgeon the model gets the same updates.
        ("none", "probe", (BOOTSTRAP, JOINT._replace(operations=0))),
        ("none", "if_better", (BOOTSTRAP, JOINT._replace(operations=0))),
        ("none", "rollout", (BOOTSTRAP, JOINT._replace(operations=0))),
    ],
)
def test_phases_follow_from_surgeon_and_policy(
    surgeon: str, commit: str, phases: tuple[Phase, ...]
) -> None:
    config = small_curriculum(commit=commit)
    assert make_phases(config, surgeon) == phases
    assert sum(phase.steps * phase.updates for phase in phases) == config.n_updates == 10


@pytest.mark.parametrize(
    ("surgeon", "changes", "names"),
    [
        ("sac", {"bootstrap_updates": 0}, ["surgery", "joint"]),
        ("sac", {"surgery_rounds": 0, "joint_rounds": 0}, ["bootstrap"]),
        ("sac", {"updates_per_round": 0}, ["bootstrap", "surgery", "joint"]),
        ("none", {"updates_per_round": 0}, ["bootstrap"]),
    ],
)
def test_a_phase_with_nothing_to_do_is_left_out(
    surgeon: str, changes: dict[str, int], names: list[str]
) -> None:
    assert [phase.name for phase in make_phases(small_curriculum(**changes), surgeon)] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, rf"^{name} must be an integer of at least {least}, got {value!r}$")
            for name, value, least in [
                ("bootstrap_updates", -1, 0),
                ("surgery_rounds", -1, 0),
                ("joint_rounds", True, 0),
                ("updates_per_round", -1, 0),
                ("n_rows", 0, 1),
                ("n_rows", 2.5, 1),
                ("n_rows", "4", 1),
                ("operations_per_round", 0, 1),
                ("paired_prompts", 1, 2),
                ("evaluate_every", 0, 1),
                ("effect_operations", 1, 2),
                ("sample_length", 3, 4),
            ]
        ),
        ({"effect_prompts": 4}, "^effect_prompts must be at least effect_operations, 8, got 4$"),
        ({"commit": "if_beter"}, "^commit must be .*'if_beter'.*'if_better'"),
    ],
)
def test_a_wrong_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(**changes)


# What a step is made of.


def test_an_update_makes_operations_under_way_stale() -> None:
    env = small_env()
    curriculum = make_curriculum(env, None)
    both, still = (env, curriculum.eval_env), np.zeros((2, 4), np.float32)
    for one in both:
        one.reset(seed=0)
        one.step(still)
    curriculum.update()
    for one in both:
        with pytest.raises(RuntimeError, match="the model changed"):
            one.step(still)


def test_an_operation_that_heals_is_committed() -> None:
    env, twin = injured_env(), injured_env()
    curriculum = make_curriculum(env, ScriptedSurgeon(env, HEALS), paired_prompts=32)
    expected = make_curriculum(twin, None)
    curriculum.update()
    expected.update()
    parameters = [(id(p), p.data_ptr()) for p in curriculum.learner.model.parameters()]
    before = everything(curriculum.learner)
    commit = tried(curriculum)
    assert commit.kept
    assert commit.result.is_improvement
    np.testing.assert_allclose(commit.coefficients, HEALS, rtol=1e-6)
    # Exactly the operation that was tested is committed, in place; optimizer states stay.
    twin.patient.commit(twin.operator, commit.coefficients)
    assert same(everything(curriculum.learner), everything(expected.learner))
    assert not same(everything(curriculum.learner), before)
    assert [(id(p), p.data_ptr()) for p in curriculum.learner.model.parameters()] == parameters
    curriculum.update()


def test_an_operation_that_harms_is_undone() -> None:
    env = injured_env(0.0)
    curriculum = make_curriculum(env, ScriptedSurgeon(env, HARMS), paired_prompts=32)
    before = everything(curriculum.learner)
    commit = tried(curriculum)
    assert not commit.kept
    assert commit.result.kl_ref_gain.high < 0
    assert commit.result.heldout_loss_fall.high < 0
    assert same(everything(curriculum.learner), before)


@pytest.mark.parametrize("best", [0, 2])
def test_the_best_of_the_operations_tried_is_chosen(best: int) -> None:
    env = injured_env()
    actions = np.full((3, 4), HARMS, np.float32)
    actions[best] = HEALS
    curriculum = make_curriculum(env, ScriptedSurgeon(env, actions))
    curriculum.eval_env = small_eval_env(env.patient, n_rows=3)
    ending = curriculum.choose_behavior()
    assert ending is not None
    assert ending.coefficients == pytest.approx([HEALS] * 4)
    commit = tried(curriculum)
    assert commit.coefficients == pytest.approx([HEALS] * 4)


def test_every_test_of_a_commit_draws_fresh_text() -> None:
    env = small_env()
    curriculum = make_curriculum(env, ScriptedSurgeon(env, 0.25))
    first, second = tried(curriculum), tried(curriculum)
    assert not first.kept
    assert first.result.kl_ref_gain.mean != second.result.kl_ref_gain.mean


def test_a_lethal_operation_is_neither_committed_nor_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = Interval(mean=0.1, low=0.01, high=0.2, lower_bound=0.02, n=9)
    lethal = episode_record([0.5] * 4, 9.0, "entropy")
    monkeypatch.setattr(curriculum_module, "final_operations", lambda *_: [lethal])
    monkeypatch.setattr(
        curriculum_module, "compare_pairs", lambda *_, **__: PairedResult(good, good)
    )
    env = small_env()
    curriculum = make_curriculum(env, ScriptedSurgeon(env))
    before = everything(curriculum.learner)
    commit = tried(curriculum)
    assert commit.result.is_improvement
    assert not commit.kept
    assert same(everything(curriculum.learner), before)
    assert curriculum.choose_behavior() is None
    assert curriculum.operation is None


def test_trying_operations_disturbs_nothing_of_the_surgeons_practice() -> None:
    def practice(between: Callable[[Curriculum], object]) -> list[tuple[float, list[float]]]:
        env = small_env()
        curriculum = make_curriculum(env, make_surgeon("sac", env, 3, QUICK))
        records = curriculum.operate(1)
        between(curriculum)
        records += curriculum.operate(1)
        return [(record.total, record.coefficients.tolist()) for record in records]

    expected = practice(lambda _: None)
    assert practice(Curriculum.choose_behavior) == expected
    assert practice(Curriculum.try_commit) == expected


# The operated model samples.


def test_the_model_samples_under_an_operation_that_helps_until_one_does_not() -> None:
    env = injured_env()
    surgeon = ScriptedSurgeon(env, HEALS)
    curriculum = make_curriculum(env, surgeon, {"estimator": "rloo"}, commit="rollout")
    assert curriculum.update().behavior_kl == 0.0
    before = everything(curriculum.learner)
    ending = curriculum.choose_behavior()
    assert ending is not None
    assert ending.total > 0
    assert curriculum.operation is not None
    assert curriculum.operation.tolist() == ending.coefficients.tolist()
    assert same(everything(curriculum.learner), before)  # nothing is committed
    assert curriculum.update().behavior_kl > 1e-3
    surgeon.action = np.full(4, HARMS, np.float32)
    assert curriculum.choose_behavior() is None
    assert curriculum.operation is None
    assert curriculum.update().behavior_kl == 0.0


def test_a_commit_reaches_the_old_policy() -> None:
    env = injured_env()
    recipe = {"estimator": "grpo", "sync_every": 50}
    curriculum = make_curriculum(env, ScriptedSurgeon(env, HEALS), recipe, paired_prompts=32)
    curriculum.update()
    assert curriculum.update().behavior_kl > 0.0
    commit = tried(curriculum)
    assert commit.kept
    assert curriculum.update().behavior_kl == 0.0  # the old policy is the committed model
