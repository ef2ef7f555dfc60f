from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.evaluation.paired import PairedResult
from agents.evaluation.statistics import Interval
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.surgeons.registry import EpisodeRecord, Surgeon, make_surgeon
from agents.training import curriculum as curriculum_module
from agents.training.curriculum import (
    Commit,
    Curriculum,
    CurriculumConfig,
    DivergedError,
    Phase,
    make_phases,
)
from avatarl_env import episode as episode_module
from avatarl_env.patient import Patient
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import global_random_states, tiny_patient
from tests.training_runs import (
    ScriptedSurgeon,
    episode_record,
    everything,
    make_learner,
    same,
    small_env,
    small_eval_env,
    taught_patient,
)

BETTER = Interval(mean=0.1, low=0.01, high=0.2, lower_bound=0.02, n=9)
WORSE = Interval(mean=-0.1, low=-0.2, high=-0.01, lower_bound=-0.18, n=9)


class Notes:
    """A logger that remembers what it was told, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stats: list[GRPOStats] = []
        self.records: list[EpisodeRecord] = []
        self.commits: list[Commit] = []
        self.behavior: list[EpisodeRecord | None] = []

    def updated(self, stats: GRPOStats) -> None:
        self.events.append("updated")
        self.stats.append(stats)

    def operated(self, records: list[EpisodeRecord], surgeon: Surgeon) -> None:
        self.events.append(f"operated {len(records)}")
        self.records += records

    def judged(self, commit: Commit) -> None:
        self.events.append("judged")
        self.commits.append(commit)

    def behaved(self, operation: EpisodeRecord | None) -> None:
        self.events.append("behaved")
        self.behavior.append(operation)


def config(**changes: Any) -> CurriculumConfig:
    sizes = {
        "bootstrap_updates": 3,
        "surgery_rounds": 2,
        "joint_rounds": 2,
        "updates_per_round": 2,
        "operations_per_round": 1,
        "paired_prompts": 4,
    }
    return CurriculumConfig(**{**sizes, **changes})


def learner_of(env: AttentionSurgeryVectorEnv) -> GRPOLearner:
    return make_learner(env.patient.model, env.patient.splits["train"], n_updates=7)


def curriculum(
    env: AttentionSurgeryVectorEnv, surgeon: Surgeon | None, **changes: Any
) -> Curriculum:
    """Return a curriculum on the patient of `env`, with an evaluation environment of two rows."""
    eval_env, plan = small_eval_env(env.patient), config(**changes)
    return Curriculum(learner_of(env), eval_env, surgeon, plan, np.random.default_rng(5))


# Phases as data.

BOOTSTRAP = Phase("bootstrap", 3, 1, 0, commits=False)


@pytest.mark.parametrize("surgeon", ["sac", "random", "zero"])
@pytest.mark.parametrize(("policy", "commits"), [("probe", False), ("if_better", True)])
def test_with_a_surgeon_there_are_three_phases(surgeon: str, policy: str, commits: bool) -> None:
    assert make_phases(config(commit=policy), surgeon) == (
        BOOTSTRAP,
        Phase("surgery", 2, 0, 1, commits=False),
        Phase("joint", 2, 2, 1, commits=commits),
    )


def test_under_policy_rollout_joint_rounds_end_with_a_choice() -> None:
    assert make_phases(config(commit="rollout"), "sac") == (
        BOOTSTRAP,
        Phase("surgery", 2, 0, 1, commits=False),
        Phase("joint", 2, 2, 1, commits=False, rollouts=True),
    )


@pytest.mark.parametrize("policy", ["probe", "if_better", "rollout"])
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
        ({"bootstrap_updates": -1}, "bootstrap_updates must be an integer of at least 0, got -1"),
        ({"surgery_rounds": -1}, "surgery_rounds must be an integer of at least 0, got -1"),
        ({"joint_rounds": -1}, "joint_rounds must be an integer of at least 0, got -1"),
        ({"updates_per_round": -1}, "updates_per_round must be an integer of at least 0, got -1"),
        ({"n_rows": 2.5}, r"n_rows must be an integer of at least 1, got 2\.5"),
        ({"n_rows": "4"}, "n_rows must be an integer of at least 1, got '4'"),
        ({"joint_rounds": True}, "joint_rounds must be an integer of at least 0, got True"),
        ({"n_rows": 0}, "n_rows must be an integer of at least 1, got 0"),
        (
            {"operations_per_round": 0},
            "operations_per_round must be an integer of at least 1, got 0",
        ),
        ({"paired_prompts": 1}, "paired_prompts must be an integer of at least 2, got 1"),
        ({"evaluate_every": 0}, "evaluate_every must be an integer of at least 1, got 0"),
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
    # two operations on each of two rows
    assert notes.events == ["updated", "updated", "updated", "operated 4", "judged"] * 2


def test_a_phase_does_only_what_it_says() -> None:
    env = small_env()
    whole = curriculum(env, ScriptedSurgeon(env))
    for phase, events in (
        (Phase("bootstrap", 2, 1, 0, commits=False), ["updated"] * 2),
        (Phase("surgery", 2, 0, 1, commits=False), ["operated 2"] * 2),
        (Phase("joint", 1, 1, 1, commits=False), ["updated", "operated 2"]),
        (Phase("nothing", 0, 1, 1, commits=True), []),
    ):
        notes = Notes()
        whole.run(phase, notes)
        assert notes.events == events


def test_an_update_makes_the_operation_under_way_stale() -> None:
    env = small_env()
    whole = curriculum(env, None)
    for other in (env, whole.eval_env):
        other.reset(seed=0)
        other.step(np.zeros((2, 4), np.float32))
    whole.run(Phase("bootstrap", 1, 1, 0, commits=False), Notes())
    for other in (env, whole.eval_env):
        with pytest.raises(RuntimeError, match="the model changed during the operation"):
            other.step(np.zeros((2, 4), np.float32))
        with pytest.raises(RuntimeError, match="needs an operation begun on the model as it is"):
            other.commit(0)


@pytest.mark.usefixtures("quick_surgeons")
@pytest.mark.parametrize("name", ["sac", "random", "zero"])
def test_rounds_between_updates_are_paid_for_their_own_work_only(name: str) -> None:
    env, notes = small_env(), Notes()
    whole = curriculum(env, make_surgeon(name, env, 0))
    whole.run(Phase("joint", 3, 2, 1, commits=False), notes)
    assert len(notes.records) >= 6
    for record in notes.records:
        if record.flatline is None:
            improvement = record.terms["kl_ref"] - record.baseline_terms["kl_ref"]
            assert record.total == pytest.approx(improvement, abs=1e-9)
        assert name != "zero" or record.total == 0.0


# Who leaves the model alone.


def whole_run(surgeon: str | None, policy: str) -> tuple[list[Tensor], list[GRPOStats]]:
    """Run a small curriculum; return all that was learned, and what was seen on the way."""
    env, notes = small_env(), Notes()
    made = None if surgeon is None else make_surgeon(surgeon, env, 3)
    whole = curriculum(env, made, commit=policy)
    for phase in make_phases(whole.config, surgeon or "none"):
        whole.run(phase, notes)
    assert len(notes.records) >= (0 if surgeon is None else 8)
    assert len(notes.commits) == (0 if surgeon is None or policy == "probe" else 2)
    return everything(whole.learner), notes.stats


@pytest.mark.usefixtures("quick_surgeons")
@pytest.mark.parametrize(
    ("surgeon", "policy"),
    [("zero", "probe"), ("zero", "if_better"), ("random", "probe"), ("sac", "probe")],
)
def test_model_and_optimizer_are_bit_identical_to_a_run_without_a_surgeon(
    surgeon: str, policy: str
) -> None:
    expected, stats = whole_run(None, policy)
    # Eight matrices, each with Muon's momentum; six others, each with what AdamW keeps: three.
    assert len(expected) == 2 * 8 + 4 * 6
    assert len(list(tiny_patient().model.parameters())) == 8 + 6
    state, stats_with_surgeon = whole_run(surgeon, policy)
    assert same(state, expected)
    assert stats_with_surgeon == stats


@pytest.mark.usefixtures("quick_surgeons")
def test_that_comparison_would_notice_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    yes = PairedResult(BETTER, BETTER)
    monkeypatch.setattr(curriculum_module, "compare_pairs", lambda *_, **__: yes)
    expected, _ = whole_run(None, "if_better")
    state, _ = whole_run("sac", "if_better")
    assert not same(state, expected)


@pytest.mark.usefixtures("quick_surgeons")
def test_a_whole_curriculum_leaves_the_global_generators_alone() -> None:
    before = global_random_states()
    whole_run("sac", "if_better")
    assert global_random_states() == before


# Commits.

COMMIT_ONLY = Phase("joint", 1, 0, 1, commits=True)
YES = PairedResult(BETTER, BETTER)


def injured_env(injury: float) -> AttentionSurgeryVectorEnv:
    """Return an environment whose patient knows its text, but was committed an injury."""
    env = small_env(taught_patient())
    env.patient.commit(env.operator, np.full(4, injury))
    return env


@pytest.mark.usefixtures("immortal")
def test_an_operation_that_heals_is_judged_better_and_kept() -> None:
    env, notes = injured_env(0.8), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, -0.8), paired_prompts=32)
    learner = whole.learner
    learner.update()
    parameters = list(learner.model.parameters())
    storages = [p.data_ptr() for p in parameters]
    targets = {id(p) for target in env.patient.targets for p in target.parameters()}
    state, before = everything(learner)[len(parameters) :], everything(learner)
    whole.run(COMMIT_ONLY, notes)

    (commit,) = notes.commits
    assert commit.kept
    assert commit.result.is_improvement
    np.testing.assert_allclose(commit.coefficients, -0.8, rtol=1e-6)
    # Other values in the targets, and in nothing else; the same objects in the same places.
    after = list(learner.model.parameters())
    assert [id(p) for p in after] == [id(p) for p in parameters]
    assert [p.data_ptr() for p in after] == storages
    for p, old in zip(after, before[: len(after)], strict=True):
        assert torch.equal(p, old) is (id(p) not in targets)
    assert same(everything(learner)[len(parameters) :], state)
    groups = [group for part, _ in learner.optimizer.parts for group in part.param_groups]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in after}
    learner.update()  # and learning goes on


@pytest.mark.usefixtures("immortal")
def test_an_operation_that_harms_is_judged_worse_and_undone() -> None:
    env, notes = injured_env(0.0), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.8), paired_prompts=32)
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    (commit,) = notes.commits
    assert not commit.kept
    assert commit.result.kl_ref_gain.high < 0
    assert commit.result.heldout_loss_fall.high < 0
    assert same(everything(whole.learner), before)


@pytest.mark.parametrize(
    ("judgement", "kept"),
    [
        (PairedResult(BETTER, BETTER), True),
        (PairedResult(BETTER, WORSE), False),
        (PairedResult(WORSE, BETTER), False),
    ],
)
@pytest.mark.usefixtures("immortal")
def test_what_the_judge_says_is_done_and_reported(
    monkeypatch: pytest.MonkeyPatch, judgement: PairedResult, kept: bool
) -> None:
    asked: list[dict[str, Any]] = []

    def compare_pairs(*arguments: Any, **keywords: Any) -> PairedResult:
        asked.append({"coefficients": arguments[2], **keywords})
        return judgement

    monkeypatch.setattr(curriculum_module, "compare_pairs", compare_pairs)
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.25))
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    (commit,) = notes.commits
    assert (commit.kept, commit.result) == (kept, judgement)
    assert commit.coefficients.tolist() == [0.25] * 4
    assert [(*call["coefficients"], call["n_prompts"]) for call in asked] == [
        (0.25, 0.25, 0.25, 0.25, 4)
    ]
    assert same(everything(whole.learner), before) is not kept
    if kept:
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            env.step(np.zeros((2, 4), np.float32))


@pytest.mark.usefixtures("immortal")
def test_what_is_committed_is_what_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum_module, "compare_pairs", lambda *_, **__: YES)
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.3))
    twin = small_env()
    twin.patient.commit(twin.operator, np.full(4, 0.5 * np.float64(np.float32(0.3)) * 2))
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
    assert first.result.kl_ref_gain.mean != second.result.kl_ref_gain.mean


def test_an_injury_of_the_task_is_never_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum_module, "compare_pairs", lambda *_, **__: YES)
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.0))
    whole.eval_env = small_eval_env(env.patient, injury=0.5)
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    assert notes.commits[0].kept
    assert same(everything(whole.learner), before)  # c = 0 is no edit at all


def test_operations_that_no_patient_survives_are_never_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curriculum_module, "compare_pairs", lambda *_, **__: YES)
    monkeypatch.setattr(episode_module, "COLLISION_MARGIN", -1e9)  # whatever it does, it flatlines
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.25))
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    assert not notes.commits[0].kept
    assert same(everything(whole.learner), before)


# The rows of the eval_env.


@pytest.mark.usefixtures("immortal")
@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_of_the_operations_tried_is_judged(
    monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    asked: list[list[float]] = []

    def compare_pairs(*arguments: Any, **_: Any) -> PairedResult:
        asked.append(arguments[2].tolist())
        return YES

    monkeypatch.setattr(curriculum_module, "compare_pairs", compare_pairs)
    env, notes = injured_env(0.8), Notes()
    actions = np.full((3, 4), 0.8, np.float32)  # hurts even more
    actions[best] = -0.8
    whole = curriculum(env, ScriptedSurgeon(env, 0.0))
    whole.eval_env = small_eval_env(env.patient, n_rows=3)
    whole.surgeon = Divided(env, trying=actions)
    whole.run(COMMIT_ONLY, notes)
    assert asked == [pytest.approx([-0.8] * 4)]
    assert notes.commits[0].coefficients.tolist() == asked[0]
    assert notes.commits[0].kept


class Divided(ScriptedSurgeon):
    """Holds its hands still while it practises, and plays `trying` when it is tried."""

    def __init__(self, env: AttentionSurgeryVectorEnv, trying: np.ndarray) -> None:
        super().__init__(env, 0.0)
        self._trying = trying

    def act(self, observations: np.ndarray, begins: np.ndarray) -> np.ndarray:
        n_rows = len(observations)
        return self._trying if n_rows == len(self._trying) else super().act(observations, begins)


def test_a_row_that_flatlines_does_not_hide_one_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curriculum_module, "compare_pairs", lambda *_, **__: YES)
    env, notes = small_env(operator_options={"scale": 50.0}), Notes()
    actions = np.zeros((3, 4), np.float32)
    actions[0] = 1.0
    whole = curriculum(env, Divided(env, trying=actions))
    whole.eval_env = small_eval_env(env.patient, n_rows=3, operator_options={"scale": 50.0})
    monkeypatch.setattr(episode_module, "COLLISION_MARGIN", -1e9)  # who moves dies
    before = everything(whole.learner)
    whole.run(COMMIT_ONLY, notes)
    (commit,) = notes.commits
    assert commit.kept
    assert not commit.coefficients.any()
    assert same(everything(whole.learner), before)


@pytest.mark.usefixtures("quick_surgeons")
@pytest.mark.parametrize("name", ["sac", "random"])
def test_trying_disturbs_nothing_of_the_surgeons_own_environment(name: str) -> None:
    def practice(commits: bool) -> list[tuple[float, list[float]]]:
        env, notes = small_env(), Notes()
        whole = curriculum(env, make_surgeon(name, env, 3))
        if name == "random":  # it draws where it acts, so let somebody else be tried
            tried = Curriculum(whole.learner, whole.eval_env, None, whole.config, whole._rng)
            tried.surgeon = Divided(env, trying=np.zeros((2, 4), np.float32))
        for _ in range(2):
            whole.run(Phase("surgery", 1, 0, 1, commits=commits and name == "sac"), notes)
            if commits and name == "random":
                tried._consider(tried.surgeon)  # type: ignore[arg-type]
        return [(record.total, record.coefficients.tolist()) for record in notes.records]

    assert practice(commits=False) == practice(commits=True)


def test_what_was_tried_has_no_say_in_the_judgement() -> None:
    # The same operation, tried on rows many or few, is judged on the very same text.
    def judged(n_rows: int) -> PairedResult:
        env, notes = small_env(), Notes()
        whole = curriculum(env, ScriptedSurgeon(env, 0.25))
        whole.eval_env = small_eval_env(env.patient, n_rows)
        whole.run(COMMIT_ONLY, notes)
        return notes.commits[0].result

    assert judged(1) == judged(3)


def test_trying_and_judging_is_compute() -> None:
    def spent(commits: bool) -> int:
        env = small_env()
        whole = curriculum(env, ScriptedSurgeon(env, 0.25))
        whole.run(Phase("joint", 1, 0, 1, commits=commits), Notes())
        return env.patient.forward_tokens

    # Two rows of four prompts of 8, continued by 5, the last of which is not read: begun and
    # Stepped twice, then begun again.
    assert spent(commits=False) == (1 + 2 + 1) * 2 * 4 * 12
    # Tried: begun, stepped twice. Tested: four prompts and windows, unoperated and operated.
    assert spent(commits=True) - spent(commits=False) == (1 + 2) * 2 * 4 * 12 + 2 * 4 * (12 + 64)


def test_operators_without_row_edits_go_through_the_loop_with_the_same_numbers(
    in_place_gain: str,
) -> None:
    def run(operator: str) -> Notes:
        patient: Patient = tiny_patient()
        env, notes = small_env(patient, operator=operator), Notes()
        whole = curriculum(env, ScriptedSurgeon(env, 0.25))
        whole.eval_env = small_eval_env(patient, operator=operator)
        whole.run(Phase("joint", 1, 1, 1, commits=True), notes)
        return notes

    notes, expected = run(in_place_gain), run("head_gain")
    assert notes.events == expected.events
    assert notes.stats == expected.stats
    found = [record.total for record in notes.records]
    assert found == pytest.approx([record.total for record in expected.records], abs=1e-4)
    for one, other in zip(notes.commits[0].result, expected.commits[0].result, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# The operated model samples.

CHOICE_ONLY = Phase("joint", 1, 0, 1, commits=False, rollouts=True)


def sampled_for(
    env: AttentionSurgeryVectorEnv, surgeon: Surgeon | None, **changes: Any
) -> Curriculum:
    """Return such a curriculum of an estimator that others may sample for."""
    whole = curriculum(env, surgeon, commit="rollout", **changes)
    whole.learner = make_learner(
        env.patient.model, env.patient.splits["train"], n_updates=7, estimator="rloo"
    )
    return whole


def spy_on_updates(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note at each update whether the operated model samples."""
    seen: list[bool] = []
    update = GRPOLearner.update

    def spy(self: GRPOLearner, operated: Any = None) -> GRPOStats:
        seen.append(operated is not None)
        return update(self, operated)

    monkeypatch.setattr(GRPOLearner, "update", spy)
    return seen


@pytest.mark.usefixtures("immortal")
def test_what_helps_is_what_the_model_samples_under_from_the_next_round_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, notes = injured_env(0.8), Notes()
    whole = sampled_for(env, ScriptedSurgeon(env, -0.8))
    seen = spy_on_updates(monkeypatch)
    whole.run(Phase("joint", 2, 2, 1, commits=False, rollouts=True), notes)
    assert notes.events == ["updated", "updated", "operated 2", "behaved"] * 2
    assert seen == [False, False, True, True]
    ending = notes.behavior[0]
    assert ending is not None
    assert ending.total > 0
    np.testing.assert_allclose(ending.coefficients, -0.8, rtol=1e-6)
    assert notes.commits == []
    # In there the model is what a commit would make of it, and afterwards what it was.
    before = everything(whole.learner)
    operated = whole._operated()
    assert operated is not None
    with operated:
        inside = [p.detach().clone() for p in env.patient.model.parameters()]
    assert same(everything(whole.learner), before)
    env.patient.commit(env.operator, ending.coefficients)
    assert not same(inside, before[: len(inside)])
    assert (notes.behavior[1] is None) is (whole.operation is None)
    if notes.behavior[1] is not None:
        assert same(inside, list(env.patient.model.parameters()))


@pytest.mark.usefixtures("immortal")
def test_choosing_writes_nothing() -> None:
    env, notes = injured_env(0.8), Notes()
    whole = sampled_for(env, ScriptedSurgeon(env, -0.8))
    whole.learner.update()
    before = everything(whole.learner)
    whole.run(CHOICE_ONLY, notes)
    assert notes.behavior[0] is not None
    assert same(everything(whole.learner), before)


@pytest.mark.usefixtures("immortal")
def test_what_harms_is_not_chosen_and_the_model_samples_as_it_stands() -> None:
    env, notes = small_env(taught_patient()), Notes()
    whole = sampled_for(env, ScriptedSurgeon(env, 0.8))
    whole.operation = np.full(4, 0.1)  # chosen the round before
    whole.run(CHOICE_ONLY, notes)
    assert notes.behavior == [None]
    assert whole.operation is None


def test_an_operation_that_no_patient_survives_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lethal = [episode_record([0.5] * 4, 9.0, "entropy")]
    monkeypatch.setattr(curriculum_module, "final_operations", lambda *_: lethal)
    env, notes = small_env(), Notes()
    whole = sampled_for(env, ScriptedSurgeon(env, 0.25))
    whole.run(CHOICE_ONLY, notes)
    assert notes.behavior == [None]
    assert whole.operation is None


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_of_the_operations_tried_is_chosen(
    monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    endings = [episode_record([i / 10] * 4, 0.5) for i in range(3)]
    endings[best] = endings[best]._replace(total=0.75)
    monkeypatch.setattr(curriculum_module, "final_operations", lambda *_: endings)
    env, notes = small_env(), Notes()
    whole = sampled_for(env, ScriptedSurgeon(env, 0.25))
    whole.run(CHOICE_ONLY, notes)
    assert notes.behavior == [endings[best]]
    assert whole.operation is not None
    assert whole.operation.tolist() == [best / 10] * 4


@pytest.mark.usefixtures("quick_surgeons", "immortal")
@pytest.mark.parametrize("name", ["sac", "random", "zero"])
def test_nothing_is_ever_committed_where_the_operated_model_samples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("committed")

    monkeypatch.setattr(Patient, "commit", never)
    env, notes = small_env(), Notes()
    whole = sampled_for(env, make_surgeon(name, env, 0))
    for phase in make_phases(whole.config, name):
        whole.run(phase, notes)
    assert notes.events.count("updated") == 7
    assert len(notes.behavior) == 2
    assert name != "zero" or notes.behavior == [None, None]  # what is no better is not chosen


def test_a_commit_is_made_known_to_the_old_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum_module, "compare_pairs", lambda *_, **__: YES)
    monkeypatch.setattr(episode_module, "ENTROPY_RANGE", (0.0, 100.0))
    monkeypatch.setattr(episode_module, "COLLISION_MARGIN", 1e9)
    env, notes = small_env(), Notes()
    whole = curriculum(env, ScriptedSurgeon(env, 0.3))
    whole.learner = make_learner(
        env.patient.model, env.patient.splits["train"], estimator="grpo", sync_every=50
    )
    whole.learner.update()
    whole.run(COMMIT_ONLY, notes)
    assert notes.commits[0].kept
    old = whole.learner.get_state()["old"]
    assert same(list(old.values()), list(env.patient.model.parameters()))


def test_a_model_that_cannot_be_learned_from_ends_the_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curriculum_module, "MOST_BAD_UPDATES", 3)
    env, notes = small_env(), Notes()
    with torch.no_grad():
        env.patient.model.embed.weight.fill_(torch.nan)
    whole = curriculum(env, None)
    with pytest.raises(DivergedError, match=r"^3 updates in a row .* up to update 3$"):
        whole.run(Phase("bootstrap", 9, 1, 0, commits=False), notes)
    assert len(notes.stats) == 3
