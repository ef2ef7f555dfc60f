"""Stable-Baselines3 trains on the environment as it does on any other."""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor

from agents.surgeons.vec_env import SB3VecEnv
from tests.patients import tiny_env
from tests.third_party.conftest import ENV_ID

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OFF_POLICY = {"learning_starts": 4, "batch_size": 8, "gradient_steps": 2, "buffer_size": 64}
ON_POLICY = {"n_steps": 8, "batch_size": 8, "n_epochs": 2}
ALGORITHMS: dict[Any, dict[str, Any]] = {SAC: OFF_POLICY, PPO: ON_POLICY}


def assert_it_learned(model: Any, before: dict[str, torch.Tensor], *losses: str) -> None:
    """Check that updates were made, that they moved the policy, and of what losses."""
    assert model._n_updates > 0
    after = model.policy.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.isfinite().all() for parameter in after.values())
    for name in losses:
        assert math.isfinite(model.logger.name_to_value[f"train/{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("route", ["make_vec_env", "adapter"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_trains(algorithm: Any, route: str, keywords: dict[str, Any]) -> None:
    if route == "make_vec_env":
        env = make_vec_env(ENV_ID, n_envs=2, env_kwargs=keywords)
    else:
        env = VecMonitor(SB3VecEnv(gymnasium.make_vec(ENV_ID, num_envs=2, **keywords)))
    model = algorithm(
        "MlpPolicy", env, seed=0, policy_kwargs={"net_arch": [8]}, **ALGORITHMS[algorithm]
    )
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(total_timesteps=16)
    assert model.num_timesteps == 16
    assert len(model.ep_info_buffer) >= 8  # operations of at most two steps
    losses = ("critic_loss", "actor_loss") if algorithm is SAC else ("loss", "value_loss")
    assert_it_learned(model, before, *losses)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=2)
    assert math.isfinite(mean)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_runs_in_processes_of_its_own(method: str, keywords: dict[str, Any]) -> None:
    options = {"start_method": method}
    alone = make_vec_env(ENV_ID, n_envs=1, seed=3, env_kwargs=keywords)
    apart = make_vec_env(
        ENV_ID,
        n_envs=1,
        seed=3,
        env_kwargs=keywords,
        vec_env_cls=SubprocVecEnv,
        vec_env_kwargs=options,
    )
    try:
        assert apart.reset() == pytest.approx(alone.reset(), abs=1e-4)
        action = np.full((1, 4), 0.1, dtype=np.float32)
        for found, expected in zip(apart.step(action)[:2], alone.step(action)[:2], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
    finally:
        apart.close()


@pytest.mark.slow
@pytest.mark.parametrize("dies", [True, False])
def test_the_critic_of_a_bandit_learns_the_mean_reward(dies: bool) -> None:
    """With one step nothing follows: also at gamma 0.99 the critic is the reward's mean.

    Where every operation kills the patient the reward is one constant, minus the penalty.
    """
    rules: dict[str, Any] = {"episode_length": 1, "step_size": 1.0, "n_prompts": 4}
    if dies:
        rules |= {"operator": "low_rank_seed", "operator_options": {"scale": 1e300}}
        rules |= {"score": {"distinct": 1.0}}  # which cannot fall by more than the penalty
    model = SAC(
        "MlpPolicy",
        tiny_env(**rules),
        learning_starts=64,
        learning_rate=3e-3,
        batch_size=64,
        buffer_size=64,
        gradient_steps=200,
        policy_kwargs={"net_arch": [16]},
        seed=0,
    )
    assert model.gamma == 0.99
    model.learn(total_timesteps=66)
    buffer = model.replay_buffer
    assert buffer.dones.all()
    assert not buffer.timeouts.any()
    observations = torch.as_tensor(buffer.observations[:, 0])
    actions = torch.as_tensor(buffer.actions[:, 0])
    with torch.no_grad():
        values = torch.stack(model.critic(observations, actions)).numpy()
    rewards = buffer.rewards
    if dies:
        assert (rewards == -1).all()
    assert values.mean() == pytest.approx(float(rewards.mean()), abs=0.05)
