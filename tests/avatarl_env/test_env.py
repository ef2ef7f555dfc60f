"""Tests of avatarl_env/env.py beyond the contract: observations, rewards, flatlines, injuries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import wrappers

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.episode import Episode
from avatarl_env.scoring import BOUND, TERMS, Term
from tests.fakes import fingerprint
from tests.patients import SIZES, actions, plain, tiny_corpus, tiny_env, tiny_patient

ENV_ID = "avatarl_env:AttentionSurgery-v0"
GIVEN = [0.5, -0.25, 0.0, 0.75]
ZEROS = np.zeros(4, dtype=np.float32)


def operate(env: gymnasium.Env[Any, Any], acts: np.ndarray) -> list[Any]:
    """Step through `acts` until the operation ends."""
    steps: list[Any] = []
    for act in acts:
        steps.append(env.step(act))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


def episode_of(env: AttentionSurgeryEnv) -> Episode:
    """Return a copy of the operation under way."""
    episode = env.get_state()["episode"]
    assert isinstance(episode, Episode)
    return episode


# --- spaces, info and observation -----------------------------------------------------------------


def test_spaces_follow_from_model_and_operator() -> None:
    """16 + 2 * 2 layers * 2 heads + 6 terms + 1 + A + 1 numbers are observed."""
    env = tiny_env()
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    assert env.observation_space == gymnasium.spaces.Box(-10, 10, (36,), np.float32)
    untied = tiny_env(operator_options={"tied": False}, layers=[1], injury=[0.0] * 4)
    assert untied.action_space.shape == (4,)
    assert untied.observation_space.shape == (36,)  # of all layers all the same


@pytest.mark.parametrize("rules", [{}, {"injury": 0.5}, {"operator_options": {"scale": 300.0}}])
def test_infos_are_plain_and_have_the_same_keys_at_every_step(rules: dict[str, Any]) -> None:
    env = tiny_env(**rules)
    observation, start = env.reset(seed=0)
    steps = operate(env, actions(4))
    infos = [start, *(step[4] for step in steps)]
    for info in infos:
        assert [*info] == [*start]
        numbers = [info[name] for name in ("score", "improvement", "lost_score")]
        numbers += [*info["score_terms"].values(), *info["baseline_terms"].values()]
        assert all(type(number) is float and math.isfinite(number) for number in numbers)
        assert type(info["flatline"]) is str
        assert type(info["is_success"]) is bool
        assert info["lost_score"] == start["lost_score"]
    assert not any(info["is_success"] or info["flatline"] for info in infos[:-1])
    for observation, reward, terminated, truncated, _ in steps:
        assert observation.dtype == np.float32
        assert type(reward) is float
        assert type(terminated) is bool
        assert truncated is False


def test_improvement_baseline_coefficients_and_time_are_observed() -> None:
    env = tiny_env(step_size=0.25, operator_options={"scale": 0.1})
    observation, start = env.reset(seed=0)
    terms = start["baseline_terms"]
    expected = [x * (0.1 if name == "collision_l2" else 1) for name, x in terms.items()]
    assert observation[24:30] == pytest.approx(expected, abs=1e-6)
    assert observation[30] == 0
    for n in range(1, 5):
        observation, *_, info = env.step([1.0, -1.0, 0.5, 0.0])
        coefficients = [0.25 * n, -0.25 * n, 0.125 * n, 0.0]
        assert info["coefficients"].tolist() == coefficients
        assert observation[30] == pytest.approx(10 * info["improvement"], rel=1e-5)
        assert observation[31:].tolist() == pytest.approx([*coefficients, 1 - n / 4])


# --- the decision process -------------------------------------------------------------------------


def test_scores_depend_on_the_coefficients_and_not_on_the_path() -> None:
    direct, winding = tiny_env(), tiny_env()
    for env in (direct, winding):
        env.reset(seed=0)
    goal = np.array([0.5, -0.25, 0.125, 0.25], dtype=np.float32)
    *_, straight = direct.step(goal)
    *_, around = operate(winding, np.stack([-goal, goal, goal]))[-1]
    assert around["coefficients"].tolist() == straight["coefficients"].tolist()
    assert around["score_terms"] == straight["score_terms"]


def test_an_episode_of_one_step_is_a_bandit() -> None:
    env = tiny_env(episode_length=1, step_size=1.0)
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(0.5 * actions(1)[0])
    assert (terminated, truncated) == (True, False)
    assert reward == info["improvement"] != 0
    assert observation[-1] == 0
    with pytest.raises(RuntimeError, match="under way"):
        env.step(ZEROS)


# --- flatlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize(
    ("operator", "options", "cause"),
    [
        ("head_gain", {"scale": 300.0}, "non-finite logits"),
        ("output_temperature", {"scale": 9.0}, "entropy"),
    ],
)
def test_destructive_operations_flatline(
    operator: str, options: dict[str, float], cause: str, n_before: int
) -> None:
    env = tiny_env(operator=operator, operator_options=options, flatline_penalty=0.5)
    n = len(env.operator.labels)
    before = fingerprint(env.patient.model)
    env.reset(seed=0)
    state = env.get_state()
    acts = np.zeros((n_before + 1, n), np.float32)
    acts[:n_before] = 1e-3
    acts[-1] = 1
    steps = operate(env, acts)
    observation, _, terminated, truncated, info = steps[-1]
    assert len(steps) == n_before + 1
    assert (terminated, truncated) == (True, False)
    assert info["flatline"].startswith(cause)
    least = 0.0 if cause == "non-finite logits" else info["improvement"]
    assert sum(step[1] for step in steps) == min(-0.5, least)
    assert math.isfinite(info["improvement"])
    assert observation in env.observation_space
    assert fingerprint(env.patient.model) == before
    with pytest.raises(RuntimeError, match="under way"):
        env.step(acts[0])
    env.set_state(state)
    assert plain(operate(env, acts)) == plain(steps)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_weights_flatline(poison: float) -> None:
    env = tiny_env()
    env.reset(seed=0)
    with torch.no_grad():
        env.patient.model.blocks[0].attn.c_proj.weight[0, 0] = poison
    *_, info = env.step(0.2 * actions(1)[0])
    assert info["flatline"] == "non-finite logits"
    observation, info = env.reset()
    assert observation in env.observation_space
    assert info["score"] == -BOUND
    assert [step[1] for step in operate(env, np.zeros((4, 4)))] == [0.0] * 4


# --- injury ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("injury", [0.5, GIVEN, tuple(GIVEN), np.array(GIVEN)])
def test_an_injury_is_hidden_lowers_the_baseline_and_can_be_undone(injury: Any) -> None:
    env, healthy = tiny_env(injury=injury, episode_length=1, step_size=1.0), tiny_env()
    hidden = []
    for seed in range(3):
        _, start = env.reset(seed=seed)
        _, reference = healthy.reset(seed=seed)  # the same prompts and noise
        own = episode_of(env).injury
        hidden.append(own.tolist())
        assert not start["coefficients"].any()
        assert np.abs(own).max() <= 0.75
        assert start["score"] != reference["score"]
        _, reward, *_, info = env.step((-own).astype(np.float32))
        assert info["score"] == pytest.approx(reference["score"], abs=1e-4)
        assert info["lost_score"] == reference["score"] - start["score"]
        assert reward == pytest.approx(info["lost_score"], abs=1e-4)
    if isinstance(injury, float):
        assert len({tuple(each) for each in hidden}) == 3
    else:
        assert hidden == [GIVEN] * 3


# --- terms ----------------------------------------------------------------------------------------


def test_registered_terms_are_measured_but_not_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment keeps the terms that were registered when it was made."""
    expected = tiny_env().observation_space
    monkeypatch.setitem(TERMS, "mine", Term(lambda generations, reference: [1.0], 1.0))
    weights = {"kl_ref": 1.0, "mine": 1.0}
    env, twin = (tiny_env(score=weights, render_mode="ansi") for _ in range(2))
    assert env.observation_space == expected
    observation, info = twin.reset(seed=0)
    assert info["score_terms"]["mine"] == 1.0
    assert observation.tolist() == tiny_env().reset(seed=0)[0].tolist()
    steps = operate(twin, 0.3 * actions(4))
    monkeypatch.setitem(TERMS, "kl_ref", Term(lambda generations, reference: [7.0], -1.0))
    monkeypatch.setitem(TERMS, "later", Term(lambda generations, reference: [2.0], 1.0))
    monkeypatch.delitem(TERMS, "mine")
    assert plain(env.reset(seed=0)) == plain((observation, info))
    assert plain(operate(env, 0.3 * actions(4))) == plain(steps)
    assert "mine" in str(env.render())
    assert env.verify(0.3 * actions(4), 0).agrees
    with pytest.raises(ValueError, match="got 'mine'"):
        tiny_env(score=weights)


# --- live models and wrappers ---------------------------------------------------------------------


def test_from_model_shares_the_model_and_takes_a_corpus_or_its_path(tmp_path: Path) -> None:
    patient = tiny_patient()
    path = tmp_path / "text.txt"
    path.write_text(patient.corpus.text, encoding="utf-8")
    for corpus in (tiny_corpus(), str(path)):
        env = AttentionSurgeryEnv.from_model(patient.model, patient.tokenizer, corpus, **SIZES)
        assert env.patient.model is patient.model
        assert plain(env.reset(seed=0)) == plain(tiny_env().reset(seed=0))


def test_gymnasiums_wrappers_work(folder: str) -> None:
    """Time limits, statistics, rescaled actions and stacked observations."""
    for limit, flags in ((1, (False, True)), (2, (False, True)), (4, (True, True))):
        env = gymnasium.make(ENV_ID, lm=folder, max_episode_steps=limit, **SIZES)
        env.reset(seed=0)
        steps = operate(env, np.zeros((4, 4), np.float32))
        assert len(steps) == limit
        assert steps[-1][2:4] == flags
    acts = 0.3 * actions(4)
    low, high = np.zeros(4, np.float32), np.ones(4, np.float32)
    scaled: Any = wrappers.RecordEpisodeStatistics(wrappers.RescaleAction(tiny_env(), low, high))
    stacked, single = wrappers.FrameStackObservation(tiny_env(), 2), tiny_env()
    first = [env.reset(seed=0)[0] for env in (scaled, stacked, single)]
    assert stacked.observation_space.shape == (2, 36)
    expected = operate(single, acts)
    *_, info = operate(scaled, (acts + 1) / 2)[-1]
    assert info["episode"]["r"] == pytest.approx(expected[-1][4]["improvement"], abs=1e-4)
    assert info["episode"]["l"] == 4
    assert operate(stacked, acts)[0][0].tolist() == [first[2].tolist(), expected[0][0].tolist()]
