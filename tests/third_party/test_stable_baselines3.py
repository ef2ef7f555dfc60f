"""Stable-Baselines3 and sb3-contrib train on the environment as on any other."""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from sb3_contrib import TQC, RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor

from agents.surgeons.vec_env import SB3VecEnv
from tests.third_party.conftest import ENV_ID

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OFF_POLICY = {"learning_starts": 4, "batch_size": 8, "gradient_steps": 2, "buffer_size": 64}
ON_POLICY = {"n_steps": 8, "batch_size": 8, "n_epochs": 2}
CASES = [
    (SAC, "MlpPolicy", OFF_POLICY, ("critic_loss", "actor_loss")),
    (PPO, "MlpPolicy", ON_POLICY, ("loss", "value_loss")),
    (TQC, "MlpPolicy", OFF_POLICY, ("critic_loss",)),
    (RecurrentPPO, "MlpLstmPolicy", ON_POLICY, ("loss",)),
]


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
@pytest.mark.parametrize(("algorithm", "policy", "options", "losses"), CASES)
def test_it_trains(
    algorithm: Any,
    policy: str,
    options: dict[str, Any],
    losses: tuple[str, ...],
    route: str,
    keywords: dict[str, Any],
) -> None:
    if route == "make_vec_env":
        env = make_vec_env(ENV_ID, n_envs=2, env_kwargs=keywords)
    else:
        env = VecMonitor(SB3VecEnv(gymnasium.make_vec(ENV_ID, num_envs=2, **keywords)))
    model = algorithm(policy, env, seed=0, policy_kwargs={"net_arch": [8]}, **options)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(total_timesteps=16)
    assert model.num_timesteps == 16
    assert len(model.ep_info_buffer) >= 8  # operations of at most two steps
    assert_it_learned(model, before, *losses)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=2)
    assert math.isfinite(mean)
    env.close()


@pytest.mark.slow
def test_it_runs_in_child_processes(keywords: dict[str, Any]) -> None:
    alone = make_vec_env(ENV_ID, n_envs=1, seed=3, env_kwargs=keywords)
    apart = make_vec_env(
        ENV_ID,
        n_envs=1,
        seed=3,
        env_kwargs=keywords,
        vec_env_cls=SubprocVecEnv,
        vec_env_kwargs={"start_method": "spawn"},
    )
    try:
        assert apart.reset() == pytest.approx(alone.reset(), abs=1e-4)
        action = np.full((1, 4), 0.1, dtype=np.float32)
        for found, expected in zip(apart.step(action)[:2], alone.step(action)[:2], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
    finally:
        apart.close()
