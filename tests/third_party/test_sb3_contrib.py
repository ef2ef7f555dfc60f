"""sb3-contrib trains on the environment as it does on any other."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from tests.third_party.conftest import ENV_ID

pytest.importorskip("sb3_contrib")

from sb3_contrib import TQC, RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OFF_POLICY = {"learning_starts": 4, "batch_size": 8, "gradient_steps": 2, "buffer_size": 64}
ON_POLICY = {"n_steps": 8, "batch_size": 8, "n_epochs": 2}
CASES = [
    (TQC, "MlpPolicy", OFF_POLICY, "critic_loss"),
    (RecurrentPPO, "MlpLstmPolicy", ON_POLICY, "loss"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "policy", "options", "loss"), CASES)
def test_it_trains(
    algorithm: Any,
    policy: str,
    options: dict[str, Any],
    loss: str,
    keywords: dict[str, Any],
) -> None:
    env = make_vec_env(ENV_ID, n_envs=2, env_kwargs=keywords)
    model = algorithm(policy, env, seed=0, policy_kwargs={"net_arch": [8]}, **options)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(total_timesteps=16)
    env.close()
    assert model._n_updates > 0
    after = model.policy.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert math.isfinite(model.logger.name_to_value[f"train/{loss}"])
