"""Tests of avatarl_env/env.py."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import avatarl_env.patient
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.patient import Evaluation, Patient
from avatarl_env.scoring import BOUND, TERMS, Term
from avatarl_env.surgery import OPERATORS, SurgicalTheater
from tests.fakes import bits, fingerprint
from tests.patients import (
    SIZES,
    actions,
    global_random_states,
    store_tiny_patient,
    tiny_corpus,
    tiny_env,
    tiny_patient,
)

Transition = tuple[Any, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_tiny_patient(tmp_path_factory.mktemp("model"))


def make(folder: str, **keywords: Any) -> AttentionSurgeryEnv:
    env = gymnasium.make("AttentionSurgery-v0", lm=folder, **{**SIZES, **keywords})
    assert isinstance(env.unwrapped, AttentionSurgeryEnv)
    return env.unwrapped


def operate(env: AttentionSurgeryEnv, choices: np.ndarray) -> list[Transition]:
    """Step through `choices` (n, A) until the operation ends."""
    steps: list[Transition] = []
    for action in choices:
        steps.append(env.step(action))
        if steps[-1][2]:
            break
    return steps


def rewards(steps: list[Transition]) -> list[float]:
    return [step[1] for step in steps]


def equal(left: object, right: object) -> bool:
    """Whether two trajectories are equal to the last bit."""
    return bool(data_equivalence(left, right, exact=True))


# --- both checkers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("episode_length", "injury", "render_mode"),
    [(1, 0.0, "ansi"), (1, 0.5, None), (4, 0.0, None), (4, 0.5, "ansi")],
)
def test_both_checkers_pass_without_a_warning(
    episode_length: int, injury: float, render_mode: str | None, folder: str
) -> None:
    rules = {"episode_length": episode_length, "step_size": 1.0, "injury": injury}
    check_env(make(folder, render_mode=render_mode, **rules))
    sb3_check_env(make(folder, render_mode=render_mode, **rules))


@pytest.mark.parametrize(
    "keywords",
    [
        {"score": {"kl_ref": 1.0, "heldout_loss": 1.0, "distinct": 0.1}, "flatline_penalty": 0.0},
        {"score": {"collision_l2": 1.0}, "operator_options": {"tied": False, "scale": 3.0}},
        {"dtype": "bfloat16", "split": "train"},
    ],
)
def test_both_checkers_pass_whatever_the_task(keywords: dict[str, Any], folder: str) -> None:
    check_env(make(folder, **keywords))
    sb3_check_env(make(folder, **keywords))


def test_make_wraps_it_as_usual(folder: str) -> None:
    env = gymnasium.make("AttentionSurgery-v0", lm=folder, **SIZES)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    *_, truncated, _ = env.step(env.action_space.sample())
    assert truncated is False
    env.close()


def test_a_callers_time_limit_truncates(folder: str) -> None:
    env = gymnasium.make("AttentionSurgery-v0", lm=folder, max_episode_steps=2, **SIZES)
    env.reset(seed=0)
    zeros = np.zeros(4, dtype=np.float32)
    assert env.step(zeros)[2:4] == (False, False)
    assert env.step(zeros)[2:4] == (False, True)


def test_gymnasiums_own_vector_environment_runs_it(folder: str) -> None:
    envs = gymnasium.make_vec(
        "AttentionSurgery-v0", num_envs=2, vectorization_mode="sync", lm=folder, **SIZES
    )
    observations, _ = envs.reset(seed=[3, 4])
    for row, seed in enumerate((3, 4)):
        assert observations[row].tolist() == make(folder).reset(seed=seed)[0].tolist()
    _, reward, *_ = envs.step(np.stack([actions(1)[0], np.zeros(4, dtype=np.float32)]))
    assert reward[0] != 0
    assert reward[1] == 0
    envs.close()


def test_spaces_follow_from_model_and_operator(folder: str) -> None:
    """16 + 2 * 2 layers * 2 heads + 6 terms + 1 + A + 1 numbers to see."""
    env = make(folder)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    assert env.observation_space == gymnasium.spaces.Box(-10, 10, (36,), np.float32)
    untied = make(folder, operator_options={"tied": False})
    assert untied.action_space.shape == (8,)
    assert untied.observation_space.shape == (40,)


SIZE_OF = {
    "head_gain": 4,  # sharpness and gain of two heads
    "spectral_bands": 8,  # four bands of queries and of the output
    "low_rank_seed": 8,
    "layer_truncation": 2,  # the output of two layers
    "seed_rank_one": 6,  # queries, keys and values of two layers
    "output_temperature": 1,
}


def test_every_operator_is_tried_here() -> None:
    assert SIZE_OF.keys() == OPERATORS.keys()


@pytest.mark.parametrize(("name", "n"), SIZE_OF.items())
def test_every_operator_operates(name: str, n: int, folder: str) -> None:
    keywords = {"operator": name, "injury": 0.25}
    env, twin = make(folder, **keywords), tiny_env(**keywords)
    assert env.action_space.shape == (n,)
    assert env.observation_space.shape == (32 + n,)
    before = fingerprint(env.patient.model)
    assert equal(env.reset(seed=0), twin.reset(seed=0))
    choices = 0.3 * actions(2, n)
    steps = operate(env, choices)
    assert equal(steps, operate(twin, choices))
    assert any(rewards(steps))
    assert fingerprint(env.patient.model) == before
    env.reset(seed=0)
    assert rewards(operate(env, np.zeros((4, n), dtype=np.float32))) == [0.0] * 4


@pytest.mark.parametrize("layers", [[1], [-1], ["blocks.1.attn"], ["*.1.attn"], [1, "*.1.*"]])
def test_layers_can_be_named_in_several_ways(layers: list[int | str], folder: str) -> None:
    env, other = make(folder, layers=layers), tiny_env(layers=[1])
    assert env.observation_space.shape == (36,)  # of all layers all the same
    assert equal(env.reset(seed=0), other.reset(seed=0))
    choices = 0.3 * actions(2)
    assert equal(operate(env, choices), operate(other, choices))
    before = {name: bits(p) for name, p in env.patient.model.named_parameters()}
    env.commit()
    changed = [n for n, p in env.patient.model.named_parameters() if bits(p) != before[n]]
    assert changed == ["blocks.1.attn.c_attn.weight", "blocks.1.attn.c_proj.weight"]


# --- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_same_seed_same_trajectory_to_the_last_bit(injury: float, folder: str) -> None:
    left, right = make(folder, injury=injury), tiny_env(injury=injury)
    for seed in (0, 1):
        assert equal(left.reset(seed=seed), right.reset(seed=seed))
        choices = actions(4, seed=seed)
        assert equal(operate(left, choices), operate(right, choices))
    assert equal(left.reset(), right.reset())


def test_another_seed_gives_another_operation() -> None:
    env = tiny_env(injury=0.5)
    assert not equal(env.reset(seed=0), env.reset(seed=1))
    env.reset(seed=0)
    first = rewards(operate(env, actions(4)))
    env.reset(seed=1)
    assert first != rewards(operate(env, actions(4)))


def test_reset_with_a_seed_and_then_without_is_reproducible() -> None:
    env = tiny_env(injury=0.5)
    runs = []
    for _ in range(2):
        first, _ = env.reset(seed=5)
        second = env.reset()
        runs.append([first, *second, *operate(env, actions(4))])
        assert not equal(first, second[0])
    assert equal(*runs)


def test_seed_decides_prompts_dice_and_injury_and_not_what_was_done_before() -> None:
    env, other = tiny_env(injury=0.5), tiny_env(injury=0.5)
    env.reset(seed=9)
    operate(env, actions(2))
    env.action_space.seed(1)
    env.action_space.sample()
    assert equal(env.reset(seed=3), other.reset(seed=3))
    episodes = env._episode, other._episode
    assert episodes[0].prompts.uniforms.tolist() == episodes[1].prompts.uniforms.tolist()
    assert episodes[0].injury.tolist() == episodes[1].injury.tolist()


def test_nothing_of_ours_touches_the_global_generators(folder: str) -> None:
    states = global_random_states()
    env = make(folder, injury=0.5)
    env.reset(seed=0)
    operate(env, actions(4))
    env.commit()
    env.reset()
    env.fork()
    env.set_state(env.get_state())
    assert global_random_states() == states


# --- weights -------------------------------------------------------------------------------------


def test_the_model_is_unoperated_between_calls() -> None:
    env = tiny_env(injury=0.5)
    env.patient.model.train()
    before = fingerprint(env.patient.model)
    env.reset(seed=0)
    assert fingerprint(env.patient.model) == before
    for action in actions(4):
        env.step(action)
        assert fingerprint(env.patient.model) == before
        assert env.patient.model.training


@pytest.mark.parametrize(
    ("last", "error"), [(False, RuntimeError), (True, RuntimeError), (True, KeyboardInterrupt)]
)
def test_a_step_that_fails_never_happened(
    last: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    env, twin = tiny_env(injury=0.5), tiny_env(injury=0.5)
    choices = actions(4)
    n_before = 3 if last else 1
    for each in (env, twin):
        each.reset(seed=0)
        operate(each, choices[:n_before])
    before = fingerprint(env.patient.model)

    def fail(*arguments: object, **keywords: object) -> None:
        raise error("stop")

    with monkeypatch.context() as patched:
        patched.setattr(avatarl_env.patient, "generate", fail)
        for _ in range(2):
            with pytest.raises(error, match="stop"):
                env.step(actions(1, seed=7)[0])
            assert fingerprint(env.patient.model) == before
    assert equal(operate(env, choices[n_before:]), operate(twin, choices[n_before:]))


def test_a_reset_that_fails_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tiny_env(injury=0.5)
    before = fingerprint(env.patient.model)
    calls = []

    def fail_at_the_second(*arguments: object, **keywords: object) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return generate(*arguments, **keywords)

    generate = avatarl_env.patient.generate
    monkeypatch.setattr(avatarl_env.patient, "generate", fail_at_the_second)
    with pytest.raises(RuntimeError, match="stop"):
        env.reset(seed=0)  # the injured evaluation
    assert fingerprint(env.patient.model) == before
    with pytest.raises(RuntimeError, match="under way"):
        env.step(actions(1)[0])


# --- the decision process ------------------------------------------------------------------------


@pytest.mark.parametrize("injury", [0.0, 0.5])
@pytest.mark.parametrize("score", [None, {"heldout_loss": 0.3, "distinct": 1.7, "entropy": -0.1}])
def test_rewards_telescope(injury: float, score: dict[str, float] | None) -> None:
    env = tiny_env(injury=injury, score=score)
    for seed in range(2):
        _, start = env.reset(seed=seed)
        steps = operate(env, 0.3 * actions(4, seed=seed))
        *_, info = steps[-1]
        assert info["flatline"] == ""
        assert sum(rewards(steps)) == info["improvement"] == info["score"] - start["score"] != 0
        assert info["baseline_terms"] == start["score_terms"]


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_zero_actions_give_exactly_nothing(injury: float) -> None:
    env = tiny_env(injury=injury)
    observation, start = env.reset(seed=0)
    steps = operate(env, np.zeros((4, 4), dtype=np.float32))
    assert rewards(steps) == [0.0] * 4
    for seen, *_, info in steps:
        assert info["score_terms"] == start["score_terms"]
        assert seen[:-1].tolist() == observation[:-1].tolist()  # all but the time left
        assert info["flatline"] == ""
    assert [step[0][-1] for step in steps] == [0.75, 0.5, 0.25, 0.0]
    assert steps[-1][4]["is_success"] is False


def test_there_and_back_gives_exactly_nothing() -> None:
    env = tiny_env()
    env.reset(seed=0)
    there = np.array([0.5, -0.25, 0.125, -0.5], dtype=np.float32)
    steps = operate(env, np.stack([there, -there, there, -there]))
    assert len(steps) == 4
    assert steps[0][1] == -steps[1][1] != 0
    assert sum(rewards(steps)) == 0
    assert steps[1][4]["score_terms"] == steps[3][4]["score_terms"]


def test_scores_are_those_of_the_coefficients_and_not_of_the_path() -> None:
    direct, winding = tiny_env(), tiny_env()
    for env in (direct, winding):
        env.reset(seed=0)
    goal = np.array([0.5, -0.25, 0.125, 0.25], dtype=np.float32)
    *_, straight = direct.step(goal)
    *_, around = operate(winding, np.stack([-goal, goal, goal]))[-1]
    assert around["coefficients"].tolist() == straight["coefficients"].tolist()
    assert around["score_terms"] == straight["score_terms"]


@pytest.mark.parametrize("step_size", [0.5, 1.0, 0.25])
def test_coefficients_move_by_the_step_size_and_stop_at_one(step_size: float) -> None:
    env = tiny_env(step_size=step_size, operator_options={"scale": 0.1})
    env.reset(seed=0)
    action = np.array([1.0, -1.0, 0.5, 0.0], dtype=np.float32)
    for n, (observation, *_, info) in enumerate(operate(env, np.tile(action, (4, 1))), start=1):
        moved = step_size * n
        expected = [min(1, moved), -min(1, moved), min(1, moved / 2), 0]
        assert info["coefficients"].tolist() == expected
        assert observation[-5:].tolist() == pytest.approx([*expected, 1 - n / 4])
    assert n == 4


def test_actions_beyond_the_box_are_clipped() -> None:
    wild, tame = tiny_env(), tiny_env()
    for env in (wild, tame):
        env.reset(seed=0)
    action = np.array([0.5, -0.5, 0.25, 0.0], dtype=np.float32)
    sign = np.array([1, -1, 0, 0], dtype=np.float32)
    assert equal(wild.step(action + 40 * sign), tame.step(action + 0.5 * sign))


def test_one_step_makes_it_a_bandit() -> None:
    env = tiny_env(episode_length=1, step_size=1.0)
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(0.5 * actions(1)[0])
    assert terminated is True
    assert truncated is False
    assert type(reward) is float
    assert reward == info["improvement"]
    assert observation[-1] == 0
    with pytest.raises(RuntimeError, match="under way"):
        env.step(actions(1)[0])


def test_improvement_and_baseline_are_seen() -> None:
    env = tiny_env()
    observation, start = env.reset(seed=0)
    terms = start["baseline_terms"]
    assert observation[24:30] == pytest.approx(
        [x * (0.1 if name == "collision_l2" else 1) for name, x in terms.items()], abs=1e-6
    )
    assert observation[30] == 0
    observation, *_, info = env.step(0.3 * actions(1)[0])
    assert observation[30] == pytest.approx(10 * info["improvement"], rel=1e-5)
    # the two first query readings are the first layer's: they follow the log-temperatures
    assert env._episode.present.vitals.query_log_rms[:2] == pytest.approx(
        env._episode.baseline.vitals.query_log_rms[:2] + info["coefficients"][:2], abs=1e-5
    )


def test_types_are_plain() -> None:
    env = tiny_env()
    observation, info = env.reset(seed=0)
    assert observation.dtype == np.float32
    infos = [info]
    for observation, reward, terminated, truncated, info in operate(env, 0.3 * actions(4)):
        assert observation.dtype == np.float32
        assert type(reward) is float
        assert type(terminated) is bool
        assert truncated is False
        infos.append(info)
    assert len(infos) == 5
    for info in infos:
        numbers = [info[name] for name in ("score", "improvement", "lost_score")]
        assert all(type(number) is float for number in (*numbers, *info["score_terms"].values()))
        assert type(info["flatline"]) is str
        assert type(info["is_success"]) is bool


@pytest.mark.parametrize("rules", [{}, {"injury": 0.5}, {"operator_options": {"scale": 300.0}}])
def test_infos_have_the_same_keys_at_every_step(rules: dict[str, Any]) -> None:
    """Libraries that stack infos would fill the gaps with what is no number."""
    env = tiny_env(**rules)
    _, start = env.reset(seed=0)
    infos = [start, *(step[4] for step in operate(env, actions(4)))]
    assert len(infos) >= 2
    assert all([*info] == [*start] for info in infos)
    assert len({info["lost_score"] for info in infos}) == 1  # known from the beginning
    assert not any(info["is_success"] for info in infos[:-1])
    assert not any(info["flatline"] for info in infos[:-1])


# --- flatlines -----------------------------------------------------------------------------------


def assert_flatline(env: AttentionSurgeryEnv, before: list[float], step: Transition) -> str:
    """Check all that holds of every flatline; return its cause."""
    observation, reward, terminated, truncated, info = step
    assert terminated is True
    assert truncated is False
    assert sum([*before, reward]) == -1.0
    assert observation in env.observation_space
    assert np.isfinite(observation).all()
    assert info["is_success"] is False
    for name in ("score", "improvement", "lost_score"):
        assert math.isfinite(info[name])
    assert all(math.isfinite(value) for value in info["score_terms"].values())
    with pytest.raises(RuntimeError, match="under way"):
        env.step(actions(1)[0])
    return str(info["flatline"])


@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize(
    ("terms", "cause"),
    [
        ({"entropy": 0.01}, "entropy 0.010 outside"),
        ({"entropy": 9.0}, "entropy 9.000 outside"),
        ({"collision_l2": 99.0}, "collision_l2 99.00 above"),
    ],
)
def test_bad_terms_flatline(
    terms: dict[str, float], cause: str, n_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = tiny_env()
    env.reset(seed=0)
    before = rewards(operate(env, 0.2 * actions(n_before)))
    measure = avatarl_env.patient.measure_many
    monkeypatch.setattr(
        avatarl_env.patient,
        "measure_many",
        lambda *arguments: [(text, found | terms) for text, found in measure(*arguments)],
    )
    step = env.step(0.2 * actions(1, seed=1)[0])
    assert assert_flatline(env, before, step).startswith(cause)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_weights_that_are_no_numbers_flatline(poison: float) -> None:
    env = tiny_env()
    env.reset(seed=0)
    before = rewards(operate(env, 0.2 * actions(2)))
    with torch.no_grad():
        env.patient.model.blocks[0].attn.c_proj.weight[0, 0] = poison
    cause = assert_flatline(env, before, env.step(0.2 * actions(1, seed=1)[0]))
    assert cause == "non-finite logits"
    observation, info = env.reset()  # a dead patient is no reason to crash
    assert observation in env.observation_space
    assert info["score"] == -BOUND
    assert rewards(operate(env, np.zeros((4, 4), dtype=np.float32))) == [0.0] * 4


def test_brutal_operations_flatline() -> None:
    """A head that is made e^300 times louder leaves float32."""
    env = tiny_env(operator_options={"scale": 300.0}, step_size=1.0)
    before = fingerprint(env.patient.model)
    env.reset(seed=0)
    step = env.step(np.array([0, 0, 1, 1], dtype=np.float32))
    assert assert_flatline(env, [], step) == "non-finite logits"
    assert fingerprint(env.patient.model) == before
    env.reset()
    assert env.step(np.zeros(4, dtype=np.float32))[1] == 0.0


def test_a_flatline_is_replayed_too() -> None:
    env = tiny_env(operator_options={"scale": 300.0}, step_size=1.0, flatline_penalty=0.5)
    env.reset(seed=0)
    state = env.get_state()
    action = np.array([0, 0, 1, 1], dtype=np.float32)
    first = env.step(action)
    assert first[1] == -0.5
    env.set_state(state)
    assert equal(env.step(action), first)


# --- misuse --------------------------------------------------------------------------------------


def test_step_before_reset_and_after_the_end_is_refused() -> None:
    env = tiny_env()
    with pytest.raises(RuntimeError, match=r"step\(\) needs an operation under way: call reset"):
        env.step(actions(1)[0])
    env.reset(seed=0)
    operate(env, np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(RuntimeError, match=r"step\(\) needs an operation under way: call reset"):
        env.step(actions(1)[0])
    env.reset()
    env.step(actions(1)[0])


BAD_ACTIONS: list[Any] = [
    np.zeros(3, dtype=np.float32),
    np.zeros((1, 4), dtype=np.float32),
    np.float32(0.5),
    np.array([0, 0, math.nan, 0], dtype=np.float32),
    np.array([0, 0, math.inf, 0], dtype=np.float32),
    None,
    ["sharper"] * 4,
]


def test_bad_actions_are_refused_and_change_nothing() -> None:
    env, twin = tiny_env(), tiny_env()
    for each in (env, twin):
        each.reset(seed=0)
    for action in BAD_ACTIONS:
        with pytest.raises(ValueError, match=r"^action must be (numbers|\(4,\) finite)") as e:
            env.step(action)
        assert "\n" not in str(e.value)
    assert equal(operate(env, actions(4)), operate(twin, actions(4)))


def test_lists_and_tensors_are_actions_too() -> None:
    env, other = tiny_env(), tiny_env()
    for each in (env, other):
        each.reset(seed=0)
    assert equal(env.step([0.5, 0.0, -0.25, 0.0]), other.step(torch.tensor([0.5, 0, -0.25, 0])))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"operator": "head_gian"}, "operator must be .* did you mean 'head_gain'?"),
        ({"layers": [2]}, r"layers must match .* got 2 \(0: blocks.0.attn, 1: blocks.1.attn\)"),
        ({"layers": ["blocks.1"]}, "layers must match attention layers .* got 'blocks.1'"),
        ({"layers": []}, "layers must be at least one layer, got none"),
        ({"operator_options": {"scale": -1.0}}, "scale must be positive and finite, got -1.0"),
        ({"score": {"kl_reff": 1.0}}, "score must be .* did you mean 'kl_ref'?"),
        ({"split": "test"}, "split must be one of .* got 'test'"),
        ({"n_new": 57}, r"must fit the model's context of 64, got 8 \+ 57"),
        ({"episode_length": 1}, r"episode_length \* step_size must be at least 1"),
        ({"injury": -1.0}, r"injury must be a half-width in \[0, 1\] or .*, got -1.0"),
        ({"injury": 1.5}, r"injury must be .* in \[-1, 1\], as far as coefficients reach, got 1.5"),
        (
            {"injury": [0.5] * 3},
            r"injury must be one number for each of the 4 coef.*, got 3: ",
        ),
        ({"injury": [0, 0, 0, 2]}, r"injury must be .*, got \[0, 0, 0, 2\]"),
        ({"render_mode": "human"}, "render_mode must be None or"),
        ({"dtype": "float8"}, "dtype must be one of .* got 'float8'"),
        ({"device": "tpu9"}, "device must be one that torch has, got 'tpu9'"),
        ({"corpus": "no/such/file.txt"}, "corpus file 'no/such/file.txt' must exist"),
        ({"lm": "no/such/folder"}, "lm must be 'bundled', .* got 'no/such/folder'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    keywords: dict[str, Any], message: str, folder: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        AttentionSurgeryEnv(**{"lm": folder, **SIZES, **keywords})
    assert "\n" not in str(caught.value)


def test_prompts_longer_than_the_split_are_refused() -> None:
    patient = tiny_env().patient
    patient.splits = {**patient.splits, "surgeon": patient.splits["surgeon"][:29]}
    with pytest.raises(ValueError, match=r"prompt_length must be at most 29 \(surgeon\), got 30"):
        AttentionSurgeryEnv(patient, **{**SIZES, "prompt_length": 30})


@pytest.mark.parametrize("keyword", [{"corpus": "playwright"}, {"device": "cuda"}])
def test_keywords_of_stored_models_are_refused_beside_a_live_one(keyword: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="corpus, device and dtype are for stored models"):
        AttentionSurgeryEnv(tiny_env().patient, **SIZES, **keyword)


# --- change and commit ---------------------------------------------------------------------------


def test_a_stale_operation_is_refused() -> None:
    env = tiny_env()
    env.reset(seed=0)
    env.step(actions(1)[0])
    env.model_changed()
    for refused in (lambda: env.step(actions(1)[0]), env.commit):
        with pytest.raises(RuntimeError, match=r"the model .*reset\(\)|commit\(\) needs"):
            refused()
    env.reset()
    env.step(actions(1)[0])


def test_a_change_makes_every_operation_on_the_patient_stale() -> None:
    """A fork shares its parent's model, and so may any other environment."""
    patient = tiny_patient()
    parent, other, bystander = tiny_env(patient), tiny_env(patient), tiny_env()
    for env in (parent, other, bystander):
        env.reset(seed=0)
    fork, state = parent.fork(), other.get_state()
    parent.step(actions(1)[0])
    parent.commit()
    other.set_state(state)  # from before the change: what it knows of the model is wrong
    for env in (parent, fork, other):
        with pytest.raises(RuntimeError, match="the model changed during the operation"):
            env.step(actions(1)[0])
        env.reset()
        env.step(actions(1)[0])
    bystander.step(actions(1)[0])


def test_a_stale_state_stays_stale() -> None:
    env = tiny_env()
    env.reset(seed=0)
    env.model_changed()
    state = pickle.loads(pickle.dumps(env.get_state()))
    other = tiny_env()
    other.set_state(state)
    for each in (env, other):
        with pytest.raises(RuntimeError, match="the model changed"):
            each.step(actions(1)[0])


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_commit_keeps_the_operation_and_never_the_injury(injury: float) -> None:
    env = tiny_env(injury=injury)
    model = env.patient.model
    env.reset(seed=0)
    *_, info = operate(env, 0.4 * actions(2))[-1]
    with SurgicalTheater(model, env.patient.targets) as theater:
        env.operator.apply(theater, info["coefficients"])
        expected = fingerprint(model)
    parameters, places = list(model.parameters()), [p.data_ptr() for p in model.parameters()]
    before = fingerprint(model)
    env.commit()
    assert fingerprint(model) == expected != before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == places
    assert model.lm_head.weight is model.embed.weight


def test_commit_requires_reset_and_then_the_operated_model_is_the_baseline() -> None:
    env = tiny_env()
    with pytest.raises(RuntimeError, match=r"commit\(\) needs an operation"):
        env.commit()
    env.reset(seed=0)
    *_, info = operate(env, 0.4 * actions(2))[-1]
    env.commit()
    for refused in (lambda: env.step(actions(1)[0]), env.commit):
        with pytest.raises(RuntimeError, match="reset"):
            refused()
    _, start = env.reset(seed=0)  # the same prompts and dice
    assert start["baseline_terms"] == info["score_terms"]
    assert rewards(operate(env, np.zeros((4, 4), dtype=np.float32))) == [0.0] * 4


def test_commit_at_zero_and_after_the_end() -> None:
    env = tiny_env()
    before = fingerprint(env.patient.model)
    env.reset(seed=0)
    env.commit()
    assert fingerprint(env.patient.model) == before
    env.reset()
    assert operate(env, 0.3 * actions(4))[-1][2]
    env.commit()
    assert fingerprint(env.patient.model) != before


def test_forward_tokens_count_every_evaluation() -> None:
    env = tiny_env(injury=0.5)
    per_evaluation = 32 * (8 + 3)  # the last token written is not read
    env.reset(seed=0)
    assert env.patient.forward_tokens == 2 * per_evaluation
    env.step(np.zeros(4, np.float32))  # what c = 0 leads to is known already
    assert env.patient.forward_tokens == 2 * per_evaluation
    operate(env, np.full((3, 4), 0.1, np.float32))
    assert env.patient.forward_tokens == 5 * per_evaluation


# --- injury --------------------------------------------------------------------------------------


def test_an_injury_lowers_the_baseline_and_undoing_it_heals() -> None:
    env, healthy = tiny_env(injury=0.5, episode_length=1, step_size=1.0), tiny_env()
    hidden = []
    for seed in range(3):
        _, start = env.reset(seed=seed)
        _, reference = healthy.reset(seed=seed)
        injury = env._episode.injury
        hidden.append(injury.tolist())
        assert np.abs(injury).max() <= 0.5
        assert start["score"] != reference["score"]
        _, reward, _, _, info = env.step((-injury).astype(np.float32))
        assert info["score"] == pytest.approx(reference["score"], abs=1e-4)
        assert info["lost_score"] == reference["score"] - start["score"]
        assert reward == pytest.approx(info["lost_score"], abs=1e-4)
    assert len({tuple(injury) for injury in hidden}) == 3


def test_the_injury_is_hidden() -> None:
    env = tiny_env(injury=0.5)
    _, info = env.reset(seed=0)
    injury = env._episode.injury
    assert info["coefficients"].tolist() == [0.0] * 4
    steps = operate(env, np.zeros((4, 4), dtype=np.float32))
    shown = [
        number
        for observation, *_, info in steps
        for number in (*observation, *info["coefficients"], *info["score_terms"].values())
    ]
    assert all(abs(number - hidden) > 1e-6 for number in shown for hidden in injury)


def test_injuries_are_spread_over_their_box(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tiny_env(injury=1.0)
    env.reset(seed=0)
    reading = env._episode.baseline
    monkeypatch.setattr(Patient, "_evaluate", lambda *_, **__: [reading])
    drawn = []
    for _ in range(50):
        env.reset()
        drawn.append(env._episode.injury)
    sizes = np.abs(drawn)
    assert 0.95 < sizes.max() <= 1.0
    assert sizes.mean() == pytest.approx(0.5, abs=0.065)  # three standard errors of 200


GIVEN = [0.5, -0.25, 0.0, 0.75]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_given_injury_is_that_of_every_operation(kind: Callable[[Any], Any]) -> None:
    env, healthy = tiny_env(injury=kind(GIVEN), episode_length=1, step_size=1.0), tiny_env()
    assert env.config.injury == tuple(GIVEN)
    for seed in range(2):
        _, start = env.reset(seed=seed)
        _, reference = healthy.reset(seed=seed)  # the same prompts and dice
        assert env._episode.injury.tolist() == GIVEN
        assert start["score"] != reference["score"]
        *_, info = env.step(-np.array(GIVEN, np.float32))
        assert info["score"] == pytest.approx(reference["score"], abs=1e-4)
        assert info["lost_score"] == reference["score"] - start["score"]


def test_a_given_injury_of_nothing_is_none() -> None:
    env, healthy = tiny_env(injury=[0.0] * 4), tiny_env()
    assert equal(env.reset(seed=0), healthy.reset(seed=0))
    assert env.patient.forward_tokens == healthy.patient.forward_tokens
    assert equal(operate(env, actions(4)), operate(healthy, actions(4)))


def test_a_given_injury_cannot_be_changed_from_outside() -> None:
    env = tiny_env(injury=GIVEN)
    env.reset(seed=0)
    env._episode.injury[:] = 9.0
    env.reset()
    assert env._episode.injury.tolist() == GIVEN


def test_prompts_are_the_same_whatever_the_injury() -> None:
    """Also those of later operations."""
    envs = [tiny_env(injury=injury) for injury in (0.0, 0.5, GIVEN)]
    for seed in (0, None, None):
        drawn = set()
        for env in envs:
            env.reset(seed=seed)
            drawn.add(env._episode.prompts.tokens.tobytes())
            drawn.add(env._episode.prompts.uniforms.tobytes())
        assert len(drawn) == 2


def test_random_injuries_are_drawn_as_ever() -> None:
    env = tiny_env(injury=0.5)
    env.reset(seed=3)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3)))
    n_windows = len(env.patient.splits["surgeon"]) - 8 + 1
    rng.integers(0, n_windows, size=32)
    rng.random((32, 4), dtype=np.float32)
    assert env._episode.injury.tolist() == rng.uniform(-0.5, 0.5, 4).tolist()


def test_no_injury_loses_nothing_and_costs_one_evaluation() -> None:
    env = tiny_env()
    env.reset(seed=0)
    assert env.patient.forward_tokens == 32 * 11
    assert operate(env, np.zeros((4, 4), dtype=np.float32))[-1][4]["lost_score"] == 0.0


def test_flatline_bounds_span_the_healthy_and_the_injured_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Healthy entropy 4, injured entropy 1: from 0.5 to 6 nats are survived."""
    entropies = iter([4.0, 1.0, 0.51, 5.99, 6.01])
    evaluate = Patient._evaluate

    def evaluate_as_told(self: Patient, prompts: Any, terms: Any) -> list[Evaluation]:
        (reading,) = evaluate(self, prompts, terms)
        terms = reading.terms | {"entropy": next(entropies), "collision_l2": 0.0}
        return [reading._replace(terms=terms)]

    monkeypatch.setattr(Patient, "_evaluate", evaluate_as_told)
    env = tiny_env(injury=0.5)
    env.reset(seed=0)
    infos = [step[4] for step in operate(env, 0.1 * actions(4))]
    cause = "entropy 6.010 outside [0.500, 6.000] nats"
    assert [info["flatline"] for info in infos] == ["", "", cause]


# --- terms ---------------------------------------------------------------------------------------


def test_terms_are_those_there_were_when_the_environment_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else an operation under way, or its picture, could be of other terms than it began with."""
    monkeypatch.setitem(TERMS, "mine", Term(lambda generations, reference: [1.0], 1.0))
    weights = {"kl_ref": 1.0, "mine": 1.0}
    env, twin = (tiny_env(score=weights, render_mode="ansi") for _ in range(2))
    start = env.reset(seed=0)[1]
    expected = [twin.reset(seed=0), *operate(twin, 0.3 * actions(4))]
    monkeypatch.setitem(TERMS, "kl_ref", Term(lambda generations, reference: [7.0], -1.0))
    monkeypatch.setitem(TERMS, "later", Term(lambda generations, reference: [2.0], 1.0))
    monkeypatch.delitem(TERMS, "mine")
    assert equal([*operate(env, 0.3 * actions(4))], expected[1:])
    assert env._episode.present.terms.keys() == start["score_terms"].keys()
    assert "mine" in env.render()
    assert equal(env.reset(seed=0), expected[0])
    assert env.verify(0.3 * actions(4), 0).agrees
    with pytest.raises(ValueError, match="got 'mine'"):
        tiny_env(score=weights)


class Subclass(AttentionSurgeryEnv):
    """An environment with a keyword of its own, which it hands on by mistake."""

    def __init__(self, *arguments: Any, extra: int = 1, **keywords: Any) -> None:
        super().__init__(*arguments, extra=extra, **keywords)


def test_a_subclass_keywords_are_not_the_environments() -> None:
    with pytest.raises(ValueError, match=r"keyword must be one of \[.*'corpus'.* argument 'extra'"):
        Subclass(tiny_env().patient, **SIZES)


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
def test_state_replays_exactly(pickled: bool) -> None:
    env = tiny_env(injury=0.5)
    env.reset(seed=0)
    operate(env, 0.3 * actions(1))
    state = env.get_state()
    if pickled:
        state = pickle.loads(pickle.dumps(state))
    choices = 0.3 * actions(3, seed=1)
    future = [operate(env, choices), env.reset(), operate(env, choices)]
    for _ in range(2):
        env.set_state(state)
        assert equal([operate(env, choices), env.reset(), operate(env, choices)], future)
    other = tiny_env(injury=0.5)
    other.set_state(state)
    assert equal([operate(other, choices), other.reset(), operate(other, choices)], future)


def test_state_before_the_first_reset() -> None:
    env, other = tiny_env(), tiny_env()
    other.set_state(env.get_state())
    with pytest.raises(RuntimeError, match="under way"):
        other.step(actions(1)[0])
    assert equal(env.reset(), other.reset())


def test_a_fork_goes_on_as_its_parent_would() -> None:
    env = tiny_env(injury=0.5)
    env.reset(seed=0)
    operate(env, 0.3 * actions(1))
    fork, again = env.fork(), env.fork()
    assert fork.patient is env.patient
    choices = 0.3 * actions(3, seed=1)
    futures = [
        [operate(each, choices), each.reset(), operate(each, choices)]
        for each in (fork, again, env)  # the parent last: it was not moved by its forks
    ]
    assert equal(futures[0], futures[1])
    assert equal(futures[0], futures[2])


def test_a_fork_is_independent() -> None:
    env = tiny_env(injury=0.5)
    env.reset(seed=0)
    env.action_space.seed(0)
    fork, expected = env.fork(), env.fork()
    operate(fork, actions(2))
    fork.reset(seed=7)
    operate(fork, actions(4))
    choices = 0.3 * actions(4, seed=2)
    assert equal(operate(env, choices), operate(expected, choices))
    assert equal(env.reset(), expected.reset())
    assert fork.action_space.sample().tolist() == env.action_space.sample().tolist()


def test_a_fork_before_the_first_reset() -> None:
    env = tiny_env()
    fork = env.fork()
    with pytest.raises(RuntimeError, match="under way"):
        fork.step(actions(1)[0])
    assert equal(fork.reset(seed=0), env.reset(seed=0))


# --- live models ---------------------------------------------------------------------------------


def test_from_model_shares_the_callers_model() -> None:
    patient = tiny_patient()
    env = AttentionSurgeryEnv.from_model(
        patient.model, patient.tokenizer, tiny_corpus(), injury=0.5, **SIZES
    )
    assert env.patient.model is patient.model
    assert equal(env.reset(seed=0), tiny_env(injury=0.5).reset(seed=0))
    before = [bits(p) for p in patient.model.parameters()]
    operate(env, 0.3 * actions(2))
    env.commit()
    assert [bits(p) for p in patient.model.parameters()] != before


def test_what_the_caller_changes_is_what_the_next_operation_sees() -> None:
    """Learning between operations is nobody's reward: zero actions still give exactly nothing."""
    env = tiny_env()
    _, start = env.reset(seed=0)
    with torch.no_grad():
        env.patient.model.embed.weight.mul_(1.1)
    env.model_changed()
    _, after = env.reset(seed=0)
    assert after["baseline_terms"] != start["baseline_terms"]
    assert rewards(operate(env, np.zeros((4, 4), dtype=np.float32))) == [0.0] * 4


def test_an_unknown_render_mode_is_an_error_that_stable_baselines3_can_do_without() -> None:
    with pytest.raises(TypeError, match="render_mode must be None or one of"):
        tiny_env(render_mode="depth_array")


def test_a_live_model_may_name_its_corpus(tmp_path: Path) -> None:
    patient = tiny_patient()
    path = tmp_path / "text.txt"
    path.write_text(patient.corpus.text, encoding="utf-8")
    env = AttentionSurgeryEnv.from_model(patient.model, patient.tokenizer, str(path), **SIZES)
    assert env.patient.corpus.text == patient.corpus.text
