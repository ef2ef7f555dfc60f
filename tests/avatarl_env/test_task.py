"""Tests of avatarl_env/task.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import avatarl_env.patient
from avatarl_env.episode import Episode, EpisodeConfig
from avatarl_env.patient import Patient
from avatarl_env.surgery import Overlay, SurgicalTheater
from avatarl_env.task import Draw, SurgeryTask
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import fingerprint
from tests.patients import SIZES, actions, assert_same_reading, tiny_env, tiny_patient

RULES: dict[str, Any] = {"n_prompts": 4, "prompt_length": 8, "n_new": 4}


@pytest.fixture
def patient() -> Patient:
    return tiny_patient()


def task_on(patient: Patient, injury: float = 0.0, **keywords: Any) -> SurgeryTask:
    return SurgeryTask(patient, EpisodeConfig(**RULES, injury=injury), **keywords)


def begin(task: SurgeryTask, *seeds: int) -> list[Episode]:
    return task.begin([task.draw(np.random.default_rng(seed)) for seed in seeds])


def moves(n: int, n_coefficients: int = 4) -> np.ndarray:
    return 0.3 * actions(n, n_coefficients)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the model is operated on, in order: in a theater, or by an overlay."""
    taken: list[str] = []
    for kind in (SurgicalTheater, Overlay):

        def enter(self: Any, enter: Any = kind.__enter__, name: str = kind.__name__) -> Any:
            taken.append(name)
            return enter(self)

        monkeypatch.setattr(kind, "__enter__", enter)
    return taken


# --- chance --------------------------------------------------------------------------------------


def test_a_draw_is_all_the_chance_there_is(patient: Patient) -> None:
    task = task_on(patient, injury=0.5)
    first, again, other = (task.draw(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert isinstance(first, Draw)
    assert first.prompts.tokens.shape == (4, 8)
    assert first.prompts.uniforms.shape == (4, 4)
    assert first.injury.shape == (4,)
    assert np.abs(first.injury).max() <= 0.5
    for one, same, different in (
        (first.prompts.tokens, again.prompts.tokens, other.prompts.tokens),
        (first.prompts.uniforms, again.prompts.uniforms, other.prompts.uniforms),
        (first.injury, again.injury, other.injury),
    ):
        assert one.tolist() == same.tolist() != different.tolist()
    (left,), (right,) = task.begin([first]), task.begin([again])
    assert left.baseline.terms == right.baseline.terms


def test_an_injury_does_not_move_the_prompts(patient: Patient) -> None:
    healthy, injured = (
        task_on(patient, injury).draw(np.random.default_rng(0)) for injury in (0, 1)
    )
    assert not healthy.injury.any()
    assert healthy.prompts.tokens.tolist() == injured.prompts.tokens.tolist()
    assert healthy.prompts.uniforms.tolist() == injured.prompts.uniforms.tolist()


# --- beginning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_operations_begin_at_zero_with_their_own_baselines(injury: float, patient: Patient) -> None:
    task = task_on(patient, injury)
    together = begin(task, 0, 1, 2)
    for seed, episode in enumerate(together):
        (alone,) = begin(task, seed)
        assert episode.injury.tolist() == alone.injury.tolist()
        assert not episode.coefficients.any()
        assert episode.present is episode.baseline
        assert_same_reading(episode.baseline, alone.baseline, alone.prompts.uniforms)
        for name, value in episode.healthy_terms.items():
            assert value == pytest.approx(alone.healthy_terms[name], abs=1e-4)
        assert (episode.healthy_terms != episode.baseline.terms) == (injury > 0)


def test_healthy_terms_are_those_of_the_model_as_it_is(patient: Patient) -> None:
    task = task_on(patient, injury=0.5)
    (episode,) = begin(task, 0)
    assert episode.healthy_terms == patient.evaluate(episode.prompts).terms
    expected = patient.evaluate_operated(task.operator, episode.injury, episode.prompts)
    assert episode.baseline.terms == expected.terms


@pytest.mark.parametrize(("injury", "n_evaluations"), [(0.0, 1), (0.5, 2)])
def test_a_beginning_costs_one_evaluation_and_an_injury_another(
    injury: float, n_evaluations: int, patient: Patient
) -> None:
    begin(task_on(patient, injury), 0, 1)
    assert patient.forward_tokens == 2 * n_evaluations * 4 * (8 + 3)


def test_no_operations_are_no_error(patient: Patient) -> None:
    for injury in (0.0, 0.5):
        task = task_on(patient, injury)
        assert task.begin([]) == []
        assert task.step([], np.zeros((0, 4))) == []
    assert patient.forward_tokens == 0


# --- steps -----------------------------------------------------------------------------------


def test_one_operation_is_performed_in_place_and_several_side_by_side(
    patient: Patient, ways: list[str]
) -> None:
    task = task_on(patient)
    for n, way in ((1, "SurgicalTheater"), (2, "Overlay"), (3, "Overlay")):
        ways.clear()
        episodes = begin(task, *range(n))
        task.step(episodes, moves(n))
        assert ways == [way] * 2  # baselines go the way of steps


@pytest.mark.parametrize("injury", [0.0, 0.5])
@pytest.mark.parametrize("name", ["head_gain", "spectral_bands", "low_rank_seed"])
def test_side_by_side_is_one_by_one(name: str, injury: float, patient: Patient) -> None:
    task = task_on(patient, injury, operator=name)
    n_coefficients = task.action_space().shape[0]
    before = fingerprint(patient.model)
    together = begin(task, 0, 1, 2)
    alone = [episode for seed in range(3) for episode in begin(task, seed)]
    for step in range(4):
        acts = 0.3 * actions(3, n_coefficients, seed=step)
        found = task.step(together, acts)
        expected = [
            outcome
            for episode, action in zip(alone, acts, strict=True)
            for outcome in task.step([episode], action[None])
        ]
        for one, other, outcome, twin in zip(together, alone, found, expected, strict=True):
            assert_same_reading(one.present, other.present, other.prompts.uniforms)
            assert one.coefficients.tolist() == other.coefficients.tolist()
            assert outcome.reward == pytest.approx(twin.reward, abs=1e-4)
            assert outcome.terminated == twin.terminated == (step == 3)
            assert outcome.info.keys() == twin.info.keys()
            assert task.observe(one) == pytest.approx(task.observe(other), abs=1e-4)
    assert fingerprint(patient.model) == before


def test_what_is_evaluated_is_injury_plus_coefficients(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_on(patient, injury=0.5)
    episodes = begin(task, 0, 1)
    seen: list[np.ndarray] = []
    evaluate = Patient.evaluate_many

    def noted(self: Patient, prompts: Any, operator: Any, coefficients: Any, terms: Any) -> Any:
        seen.append(np.asarray(coefficients))
        return evaluate(self, prompts, operator, coefficients, terms)

    monkeypatch.setattr(Patient, "evaluate_many", noted)
    acts = np.array([[1.0, 0, 0, 0], [0, -0.5, 0, 0]])
    task.step(episodes, acts)
    expected = [e.injury + 0.5 * act for e, act in zip(episodes, acts, strict=True)]
    assert seen[0].tolist() == np.array(expected).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3)),
        np.zeros((1, 4)),
        np.zeros((3, 4)),
        np.zeros((2, 4, 1)),
        np.zeros(2),
        np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]),
        np.array([[0, -np.inf, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_bad_actions_touch_no_operation(bad: np.ndarray, patient: Patient) -> None:
    task = task_on(patient)
    episodes = begin(task, 0, 1)
    spent = patient.forward_tokens
    with pytest.raises(ValueError, match=r"action must be \(4,\) finite numbers|zip\(\) argument"):
        task.step(episodes, bad)
    assert patient.forward_tokens == spent
    assert all(episode.n_done == 0 and not episode.coefficients.any() for episode in episodes)


@pytest.mark.parametrize("n", [1, 2])
def test_an_evaluation_that_fails_touches_no_operation(
    n: int, patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("stop")

    task = task_on(patient)
    episodes = begin(task, *range(n))
    monkeypatch.setattr(avatarl_env.patient, "generate", fail)
    with pytest.raises(RuntimeError, match="stop"):
        task.step(episodes, moves(n))
    assert all(episode.n_done == 0 and not episode.coefficients.any() for episode in episodes)


# --- what the surgeon sees -----------------------------------------------------------------------


def test_spaces_and_observations_are_fresh(patient: Patient) -> None:
    task = task_on(patient)
    (episode,) = begin(task, 0)
    first, second = task.observe(episode), task.observe(episode)
    assert first.tolist() == second.tolist()
    assert not np.shares_memory(first, second)
    assert first in task.observation_space()
    assert task.observation_space() is not task.observation_space()
    assert task.action_space() is not task.action_space()
    assert task.action_space() == task.action_space()


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_the_single_environment_is_the_task_alone(injury: float, patient: Patient) -> None:
    env = tiny_env(patient, injury=injury, **RULES)
    observation, info = env.reset(seed=3)
    task = task_on(patient, injury)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3)))
    (episode,) = task.begin([task.draw(rng)])
    assert task.observe(episode).tolist() == observation.tolist()
    assert episode.info(task.score)["score_terms"] == info["score_terms"]


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers", [[1], [-1], 1, "blocks.1.attn", ["blocks.1.attn"], ["*.1.*"], [1, "*.1.attn", -1]]
)
def test_layers_by_number_name_or_glob(layers: Any, patient: Patient) -> None:
    task = task_on(patient, layers=layers, operator_options={"tied": False})
    assert [target.name for target in task.operator.targets] == ["blocks.1.attn"]
    assert task.action_space().shape == (4,)
    assert task.observation_space() == task_on(patient).observation_space()  # it sees them all


@pytest.mark.parametrize(
    ("layers", "n"), [(None, 2), ([0, 1], 2), (["*"], 2), ([1, 0], 2), ([0], 1)]
)
def test_all_layers_unless_some_are_named(layers: Any, n: int, patient: Patient) -> None:
    task = task_on(patient, layers=layers, operator_options={"tied": False})
    assert [target.layer for target in task.operator.targets] == [*range(n)]
    assert task.action_space().shape == (4 * n,)


def test_only_the_chosen_layers_are_operated_on(patient: Patient) -> None:
    task = task_on(patient, layers=[1])
    (episode,) = begin(task, 0)
    task.step([episode], moves(1))
    rise = episode.present.vitals.query_log_rms - episode.baseline.vitals.query_log_rms
    assert rise[:2].tolist() == [0, 0]
    assert rise[2:] == pytest.approx(episode.coefficients[:2], abs=1e-5)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"operator": "head_gian"}, "operator must be .* did you mean 'head_gain'?"),
        ({"operator": "spectral_band"}, "did you mean 'spectral_bands'?"),
        ({"score": {"kl_reff": 1.0}}, "score must be .* did you mean 'kl_ref'?"),
        ({"layers": [2]}, r"layers must match .* got 2 \(0: blocks.0.attn, 1: blocks.1.attn\)"),
        ({"layers": [-3]}, "layers must match .* got -3"),
        ({"layers": ["blocks.2.attn"]}, r"layers must match .* got 'blocks.2.attn' \(0: blocks"),
        ({"layers": [0, "h.*"]}, r"layers must match .* got 'h.\*'"),
        ({"layers": []}, "layers must be at least one layer, got none"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    keywords: dict[str, Any], message: str, patient: Patient
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        task_on(patient, **keywords)
    assert "\n" not in str(caught.value)


def test_text_that_does_not_fit_is_refused(patient: Patient) -> None:
    config = EpisodeConfig(prompt_length=60, n_new=5)
    with pytest.raises(ValueError, match="must fit the model's context of 64, got 60"):
        SurgeryTask(patient, config)
    patient.splits = {**patient.splits, "surgeon": patient.splits["surgeon"][:7]}
    with pytest.raises(ValueError, match=r"prompt_length must be at most 7 \(surgeon\), got 8"):
        task_on(patient)


def test_an_step_that_moves_nothing_is_not_evaluated_and_pays_nothing() -> None:
    """Also where the other rows are back at zero, so that one row alone is left."""
    env = AttentionSurgeryVectorEnv(3, tiny_patient(), **SIZES, episode_length=3)
    env.reset(seed=0)
    there = np.full((3, 4), 0.2, np.float32)
    env.step(there)
    spent = env.patient.forward_tokens
    back = -there
    back[0] = 0
    versions = [p._version for p in env.patient.model.parameters()]
    _, rewards, *_ = env.step(back)
    assert rewards[0] == 0
    assert env.patient.forward_tokens == spent
    assert [p._version for p in env.patient.model.parameters()] == versions
    assert rewards[1:].any()
