from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import curriculum as curriculum_module
from agents.curriculum import (
    Commit,
    Curriculum,
    CurriculumConfig,
    Phase,
    make_phases,
)
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.judgement import Judgement
from agents.surgeons import OperationRecord, Surgeon, make_surgeon
from avatarl_env import episode as episode_module
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.scoring import Interval
from tests.patients import global_random_states, tiny_patient
from tests.training_runs import (
    ScriptedSurgeon,
    everything,
    immortal,  # noqa: F401 - a fixture
    make_learner,
    quick_sac,  # noqa: F401 - a fixture
    same,
    small_env,
    taught_patient,
)

BETTER = Interval(mean=0.1, low=0.01, high=0.2, lower_bound=0.02, n=9)
WORSE = Interval(mean=-0.1, low=-0.2, high=-0.01, lower_bound=-0.18, n=9)


class Notes:
    """A journal that remembers what it was told, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stats: list[GRPOStats] = []
        self.records: list[OperationRecord] = []
        self.commits: list[Commit] = []

    def updated(self, stats: GRPOStats) -> None:
        self.events.append("updated")
        self.stats.append(stats)

    def operated(self, records: list[OperationRecord], surgeon: Surgeon) -> None:
        self.events.append(f"operated {len(records)}")
        self.records += records

    def judged(self, commit: Commit) -> None:
        self.events.append("judged")
        self.commits.append(commit)


def config(**changes: Any) -> CurriculumConfig:
    sizes = {
        "bootstrap_updates": 3,
        "surgery_rounds": 2,
        "joint_rounds": 2,
        "updates_per_round": 2,
        "operations_per_round": 2,
        "judge_prompts": 4,
    }
    return CurriculumConfig(**{**sizes, **changes})


def learner_of(env: AttentionSurgeryEnv) -> GRPOLearner:
    return make_learner(env.patient.model, env.patient.splits["train"], n_updates=7)


def curriculum(
    env: AttentionSurgeryEnv, surgeon: Surgeon | None, learner: GRPOLearner | None = None
) -> Curriculum:
    learner = learner or learner_of(env)
    return Curriculum(learner, env, surgeon, config(), np.random.default_rng(5))


# Phases as data.

BOOTSTRAP = Phase("bootstrap", 3, 1, 0, commits=False)


@pytest.mark.parametrize("surgeon", ["sac", "random", "zero"])
@pytest.mark.parametrize(("policy", "commits"), [("probe", False), ("if_better", True)])
def test_with_a_surgeon_there_are_three_phases(surgeon: str, policy: str, commits: bool) -> None:
    assert make_phases(config(commit=policy), surgeon) == (
        BOOTSTRAP,
        Phase("surgery", 2, 0, 2, commits=False),
        Phase("joint", 2, 2, 2, commits=commits),
    )


@pytest.mark.parametrize("policy", ["probe", "if_better"])
def test_without_one_the_model_gets_the_same_updates_and_nothing_else(policy: str) -> None:
    phases = make_phases(config(commit=policy), "none")
    assert phases == (BOOTSTRAP, Phase("joint", 2, 2, 0, commits=False))
    assert sum(phase.steps * phase.updates for phase in phases) == config().n_updates == 7


def test_a_phase_that_has_nothing_to_do_is_left_out() -> None:
    def names(surgeon: str = "sac", **changes: int) -> list[str]:
        return [phase.name for phase in make_phases(config(**changes), surgeon)]

    assert names(bootstrap_updates=0) == ["surgery", "joint"]
    assert names(surgery_rounds=0) == ["bootstrap", "joint"]
    assert names(joint_rounds=0) == ["bootstrap", "surgery"]
    assert names(updates_per_round=0) == ["bootstrap", "surgery", "joint"]
    assert names("none", updates_per_round=0) == ["bootstrap"]
    assert names(bootstrap_updates=0, surgery_rounds=0, joint_rounds=0) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bootstrap_updates": -1}, "bootstrap_updates must be at least 0, got -1"),
        ({"surgery_rounds": -1}, "surgery_rounds must be at least 0, got -1"),
        ({"joint_rounds": -1}, "joint_rounds must be at least 0, got -1"),
        ({"updates_per_round": -1}, "updates_per_round must be at least 0, got -1"),
        ({"operations_per_round": 0}, "operations_per_round must be at least 1, got 0"),
        ({"judge_prompts": 1}, "judge_prompts must be at least 2, got 1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"commit": "if_beter"}, r"commit must be one of .*'if_beter'.*mean 'if_better'\?"),
    ],
)
def test_a_bad_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(**changes)


# The loop.


def test_a_step_is_updates_then_operations_then_an_attempt_to_commit() -> None:
    env, notes = small_env(), Notes()
    curriculum(env, ScriptedSurgeon(env)).run(Phase("joint", 2, 3, 2, commits=True), notes)
    assert notes.events == ["updated", "updated", "updated", "operated 2", "judged"] * 2


def test_a_phase_does_only_what_it_says() -> None:
    env = small_env()
    whole = curriculum(env, ScriptedSurgeon(env))
    for phase, events in (
        (Phase("bootstrap", 2, 1, 0, commits=False), ["updated"] * 2),
        (Phase("surgery", 2, 0, 1, commits=False), ["operated 1"] * 2),
        (Phase("joint", 1, 1, 1, commits=False), ["updated", "operated 1"]),
        (Phase("nothing", 0, 1, 1, commits=True), []),
    ):
        notes = Notes()
        whole.run(phase, notes)
        assert notes.events == events


def test_an_update_makes_the_operation_under_way_stale() -> None:
    env = small_env()
    whole = curriculum(env, None)
    env.reset(seed=0)
    env.step(np.zeros(4, np.float32))
    whole.run(Phase("bootstrap", 1, 1, 0, commits=False), Notes())
    with pytest.raises(RuntimeError, match="the model changed during the operation"):
        env.step(np.zeros(4, np.float32))
    with pytest.raises(RuntimeError, match="needs an operation on the model as it is"):
        env.commit()


@pytest.mark.usefixtures("quick_sac")
@pytest.mark.parametrize("name", ["sac", "random", "zero"])
def test_rounds_between_updates_are_paid_for_their_own_work_only(name: str) -> None:
    env, notes = small_env(), Notes()
    whole = curriculum(env, make_surgeon(name, env, 0))
    whole.run(Phase("joint", 3, 2, 2, commits=False), notes)
    assert len(notes.records) == 6
    for record in notes.records:
        if record.flatline is None:
            improvement = record.terms["kl_ref"] - record.baseline_terms["kl_ref"]
            assert record.total == pytest.approx(improvement, abs=1e-9)
        assert name != "zero" or record.total == 0.0


# Who leaves the model alone.


def whole_run(surgeon: str | None, policy: str) -> tuple[list[Tensor], list[GRPOStats]]:
    """Run a small curriculum; return all that was learned, and what was seen on the way."""
    env, notes = small_env(), Notes()
    learner = learner_of(env)
    plan = config(commit=policy)
    made = None if surgeon is None else make_surgeon(surgeon, env, 3)
    whole = Curriculum(learner, env, made, plan, np.random.default_rng(5))
    for phase in make_phases(plan, surgeon or "none"):
        whole.run(phase, notes)
    assert len(notes.records) == (0 if surgeon is None else 8)
    return everything(learner), notes.stats


@pytest.mark.usefixtures("quick_sac")
@pytest.mark.parametrize(
    ("surgeon", "policy"),
    [("zero", "probe"), ("zero", "if_better"), ("random", "probe"), ("sac", "probe")],
)
def test_model_and_optimizer_are_bit_identical_to_a_run_without_a_surgeon(
    surgeon: str, policy: str
) -> None:
    expected, stats = whole_run(None, policy)
    assert len(expected) == 4 * len(list(tiny_patient().model.parameters()))  # AdamW keeps three
    state, stats_with_surgeon = whole_run(surgeon, policy)
    assert same(state, expected)
    assert stats_with_surgeon == stats


@pytest.mark.usefixtures("quick_sac")
def test_that_comparison_would_notice_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    yes = Judgement(BETTER, BETTER)
    monkeypatch.setattr(curriculum_module, "judge", lambda *_, **__: yes)
    expected, _ = whole_run(None, "if_better")
    state, _ = whole_run("sac", "if_better")
    assert not same(state, expected)


@pytest.mark.usefixtures("quick_sac")
def test_a_whole_curriculum_leaves_the_global_generators_alone() -> None:
    before = global_random_states()
    whole_run("sac", "if_better")
    assert global_random_states() == before


# Commits.

COMMIT_ONLY = Phase("joint", 1, 0, 1, commits=True)


def injured_env(injury: float) -> AttentionSurgeryEnv:
    """Return an environment whose patient knows its text, but was committed an injury."""
    env = small_env(taught_patient(), n_incisions=2)
    env.patient.commit(env.operator, np.full(4, injury))
    return env


@pytest.mark.usefixtures("immortal")
def test_an_operation_that_heals_is_judged_better_and_kept() -> None:
    env, notes = injured_env(0.8), Notes()
    learner = learner_of(env)
    learner.update()
    parameters = list(learner.model.parameters())
    storages = [p.data_ptr() for p in parameters]
    targets = {id(p) for target in env.patient.targets for p in target.parameters()}
    state, before = everything(learner)[len(parameters) :], everything(learner)
    plan = config(judge_prompts=32)
    whole = Curriculum(learner, env, ScriptedSurgeon(env, -0.8), plan, np.random.default_rng(5))
    whole.run(COMMIT_ONLY, notes)

    (commit,) = notes.commits
    assert commit.kept
    assert commit.judgement.is_improvement
    np.testing.assert_allclose(commit.coefficients, -0.8, rtol=1e-6)
    # Other values in the targets, and in nothing else; the same objects in the same places.
    after = list(learner.model.parameters())
    assert [id(p) for p in after] == [id(p) for p in parameters]
    assert [p.data_ptr() for p in after] == storages
    for p, old in zip(after, before[: len(after)], strict=True):
        assert torch.equal(p, old) is (id(p) not in targets)
    assert same(everything(learner)[len(parameters) :], state)
    listed = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in after}
    learner.update()  # and learning goes on


@pytest.mark.usefixtures("immortal")
def test_an_operation_that_harms_is_judged_worse_and_undone() -> None:
    env, notes = injured_env(0.0), Notes()
    learner = learner_of(env)
    before = everything(learner)
    plan = config(judge_prompts=32)
    whole = Curriculum(learner, env, ScriptedSurgeon(env, 0.8), plan, np.random.default_rng(5))
    whole.run(COMMIT_ONLY, notes)
    (commit,) = notes.commits
    assert not commit.kept
    assert commit.judgement.kl_ref_gain.high < 0
    assert commit.judgement.heldout_loss_fall.high < 0
    assert same(everything(learner), before)


@pytest.mark.parametrize(
    ("judgement", "kept"),
    [
        (Judgement(BETTER, BETTER), True),
        (Judgement(BETTER, WORSE), False),
        (Judgement(WORSE, BETTER), False),
    ],
)
def test_what_the_judge_says_is_done_and_reported(
    monkeypatch: pytest.MonkeyPatch, judgement: Judgement, kept: bool
) -> None:
    asked: list[dict[str, Any]] = []

    def judge(*arguments: Any, **keywords: Any) -> Judgement:
        asked.append({"coefficients": arguments[2], **keywords})
        return judgement

    monkeypatch.setattr(curriculum_module, "judge", judge)
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.25))
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    (commit,) = notes.commits
    assert (commit.kept, commit.judgement) == (kept, judgement)
    assert commit.coefficients.tolist() == [0.25] * 4
    assert [(*call["coefficients"], call["n_prompts"]) for call in asked] == [
        (0.25, 0.25, 0.25, 0.25, 4)
    ]
    assert same(everything(whole.learner), before) is not kept
    if kept:
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            env.step(np.zeros(4, np.float32))


def test_what_is_committed_is_what_was_judged() -> None:
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.3))
    twin = small_env()
    twin.patient.commit(twin.operator, np.full(4, 0.5 * np.float64(np.float32(0.3)) * 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum_module, "judge", lambda *_, **__: Judgement(BETTER, BETTER))
        whole.run(COMMIT_ONLY, notes)
    weights = list(env.patient.model.parameters())
    assert same(weights, list(twin.patient.model.parameters()))
    assert not same(weights, list(tiny_patient().model.parameters()))


def test_every_attempt_is_judged_on_text_of_its_own() -> None:
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.25))
    whole.run(Phase("joint", 2, 0, 1, commits=True), notes)
    first, second = notes.commits
    assert not first.kept
    assert first.judgement.kl_ref_gain.mean != second.judgement.kl_ref_gain.mean


def test_an_injury_of_the_task_is_never_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum_module, "judge", lambda *_, **__: Judgement(BETTER, BETTER))
    env, notes = small_env(injury=0.5), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.0))
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    assert notes.commits[0].kept
    assert same(everything(whole.learner), before)  # c = 0 is no edit at all


def test_an_operation_that_the_patient_does_not_survive_is_never_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curriculum_module, "judge", lambda *_, **__: Judgement(BETTER, BETTER))
    monkeypatch.setattr(episode_module, "COLLISION_MARGIN", -1e9)  # whatever it does, it flatlines
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.25))
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    assert not notes.commits[0].kept
    assert same(everything(whole.learner), before)
