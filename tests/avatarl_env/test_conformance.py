"""What Gymnasium's and Stable-Baselines3's own checks and wrappers ask of the environments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.rendering.ansi import RENDER_MODES
from avatarl_env.surgery import OPERATORS
from tests.patients import actions, store_tiny_patient, tiny_env

ENV_ID = "avatarl_env:AttentionSurgery-v0"
SIZES = {"n_prompts": 2, "prompt_length": 8, "n_new": 4, "episode_length": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_tiny_patient(tmp_path_factory.mktemp("model"))


def make(folder: str, **keywords: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make(ENV_ID, lm=folder, **{**SIZES, **keywords})


def small(**keywords: Any) -> AttentionSurgeryEnv:
    return tiny_env(**{**SIZES, **keywords})


def rollout(env: gymnasium.Env[Any, Any], moves: np.ndarray) -> list[Any]:
    """Reset once with a seed and once without, and step through each operation."""
    seen: list[Any] = []
    for seed in (7, None):
        seen.append(env.reset(seed=seed))
        for move in moves:
            seen.append(env.step(move))
            if seen[-1][2] or seen[-1][3]:
                break
    return seen


def equal(left: object, right: object) -> bool:
    return bool(data_equivalence(left, right, exact=True))


# --- checkers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("render_mode", [None, *RENDER_MODES])
@pytest.mark.parametrize("operator", OPERATORS)
def test_both_checkers_pass_for_every_operator_and_render_mode(
    operator: str, render_mode: str | None, folder: str
) -> None:
    """Gymnasium's renders in every mode there is, whatever the environment's own."""
    env = make(folder, operator=operator, render_mode=render_mode)
    check_env(env.unwrapped, skip_render_check=render_mode is not None)
    sb3_check_env(env.unwrapped)


@pytest.mark.parametrize("injury", [0.5, [0.5, -0.25, 0.0, 1.0]])
def test_both_checkers_pass_with_an_injury(injury: Any, folder: str) -> None:
    env = make(folder, injury=injury)
    check_env(env.unwrapped, skip_render_check=True)
    sb3_check_env(env.unwrapped)


# --- the same thing again ------------------------------------------------------------------------


def test_a_given_injury_survives_json(folder: str) -> None:
    env = make(folder, injury=[0.5, -0.25, 0.0, 1.0], render_mode="rgb_array")
    assert env.spec is not None
    restored = EnvSpec.from_json(env.spec.to_json())
    assert restored == env.spec
    again = gymnasium.make(restored)
    assert again.unwrapped.config.injury == (0.5, -0.25, 0.0, 1.0)
    moves = 0.3 * actions(3)
    assert equal(rollout(env, moves), rollout(again, moves))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("operator", OPERATORS)
def test_copies_go_on_alike(operator: str, duplicate: Callable[[Any], Any], folder: str) -> None:
    env = make(folder, operator=operator, injury=0.3)
    n = env.action_space.shape[0]
    env.reset(seed=0)
    env.step(0.3 * actions(1, n)[0])
    other = duplicate(env)
    assert other.spec == env.spec
    assert other.unwrapped.patient.model is not env.unwrapped.patient.model
    moves = 0.3 * actions(2, n, seed=1)
    for _ in range(2):
        assert equal([env.step(m) for m in moves], [other.step(m) for m in moves])
        assert equal(env.reset(), other.reset())


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_instances_roll_out_alike_to_the_last_bit(operator: str, folder: str) -> None:
    """After a seed, and after the reset without one that follows."""
    envs = [make(folder, operator=operator, injury=0.3) for _ in range(2)]
    moves = 0.3 * actions(3, *envs[0].action_space.shape)
    first, second = (rollout(env, moves) for env in envs)
    assert equal(first, second)
    assert equal(rollout(envs[0], moves), first)
    n_of_first = next(n for n, seen in enumerate(first[1:], 1) if len(seen) == 2)
    assert not equal(first[0], first[n_of_first])


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_processes_of_their_own_roll_out_as_one(context: str, folder: str) -> None:
    options: dict[str, Any] = {"num_envs": 1, "lm": folder, **SIZES}
    alone = gymnasium.make_vec(ENV_ID, vectorization_mode="sync", **options)
    apart = gymnasium.make_vec(
        ENV_ID, vectorization_mode="async", vector_kwargs={"context": context}, **options
    )
    try:
        assert apart.reset(seed=4)[0] == pytest.approx(alone.reset(seed=4)[0], abs=1e-4)
        for move in 0.3 * actions(4)[:, None]:  # and on into the next operation
            found, expected = apart.step(move), alone.step(move)
            assert found[0] == pytest.approx(expected[0], abs=1e-4)
            assert found[1] == pytest.approx(expected[1], abs=1e-4)
            assert found[2].tolist() == expected[2].tolist()
    finally:
        apart.close()


# --- wrappers ------------------------------------------------------------------------------------


def test_episode_statistics_are_the_improvement() -> None:
    env = wrappers.RecordEpisodeStatistics(small())
    *_, info = rollout(env, 0.3 * actions(3))[-1]
    assert info["episode"]["l"] == 3
    assert info["episode"]["r"] == pytest.approx(info["improvement"], abs=1e-12)


def test_observations_can_be_normalised() -> None:
    env = wrappers.NormalizeObservation(small())
    seen = [step[0] for _ in range(4) for step in rollout(env, 0.3 * actions(3))]
    late = np.array(seen[-8:])
    assert np.isfinite(late).all()
    assert late[:, -1].min() < -0.5 < 0.5 < late[:, -1].max()  # the time left, about its mean


def test_rewards_can_be_normalised() -> None:
    env, plain = wrappers.NormalizeReward(small(), gamma=1.0), small()
    moves = 0.3 * actions(3)
    pairs = zip(rollout(env, moves), rollout(plain, moves), strict=True)
    rewards = [(step[1], other[1]) for step, other in pairs if len(step) == 5]
    assert all(np.sign(scaled) == np.sign(reward) for scaled, reward in rewards)
    assert any(scaled != reward for scaled, reward in rewards)


def test_actions_can_be_rescaled() -> None:
    low, high = np.zeros(4, dtype=np.float32), np.ones(4, dtype=np.float32)
    env = wrappers.RescaleAction(small(), low, high)
    assert env.action_space == gymnasium.spaces.Box(0, 1, (4,), np.float32)
    moves = np.array([[0.25, -0.5, 0.125, 0.0], [0.5, 0.5, -0.25, 0.0], [0, 0, 0, 0.25]])
    rescaled = ((moves + 1) / 2).astype(np.float32)
    assert equal(rollout(env, rescaled), rollout(small(), moves.astype(np.float32)))


def test_a_time_limit_truncates_and_does_not_terminate() -> None:
    """Unless the last step comes with it: then it is the end as well."""
    for limit, flags in ((1, (False, True)), (2, (False, True)), (3, (True, True))):
        env = wrappers.TimeLimit(small(), limit)
        env.reset(seed=0)
        steps = [env.step(np.zeros(4, np.float32)) for _ in range(limit)]
        assert steps[-1][2:4] == flags
        assert all(step[2:4] == (False, False) for step in steps[:-1])
        env.reset()
        assert env.step(np.zeros(4, np.float32))[3] is (limit == 1)


def test_observations_can_be_stacked() -> None:
    env = wrappers.FrameStackObservation(small(), 2)
    plain = small()
    stacked, single = (rollout(each, 0.3 * actions(3)) for each in (env, plain))
    assert env.observation_space.shape == (2, *plain.observation_space.shape)
    for before, after, found in zip(single[:3], single[1:4], stacked[1:4], strict=True):
        assert found[0].tolist() == [before[0].tolist(), after[0].tolist()]
    assert stacked[4][0][1].tolist() == single[4][0].tolist()  # a fresh operation


def test_an_observation_may_be_the_picture() -> None:
    env = wrappers.AddRenderObservation(small(render_mode="rgb_array"))
    observation, _ = env.reset(seed=0)
    assert env.observation_space.shape == (400, 600, 3)
    assert observation in env.observation_space
