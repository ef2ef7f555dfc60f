"""The environment in plain Gymnasium, used as its documentation shows."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from tests.third_party.conftest import ENV_ID


def test_a_random_loop(keywords: dict[str, Any]) -> None:
    env = gymnasium.make(ENV_ID, **keywords)
    observation, info = env.reset(seed=42)
    env.action_space.seed(42)
    returns, total = [], 0.0
    for _ in range(6):
        action = 0.3 * env.action_space.sample()
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        total += reward
        if terminated or truncated:
            returns.append(total)
            assert total == info["improvement"] or info["flatline"]
            observation, info = env.reset()
            total = 0.0
    env.close()
    assert len(returns) >= 3
    assert len(set(returns)) == len(returns)


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_a_vector_loop(mode: str, keywords: dict[str, Any]) -> None:
    envs = gymnasium.make_vec(ENV_ID, num_envs=3, autoreset_mode=mode, **keywords)
    observations, infos = envs.reset(seed=42)
    envs.action_space.seed(42)
    totals, returns = np.zeros(3), []
    for _ in range(6):
        observations, rewards, terminated, truncated, infos = envs.step(
            0.3 * envs.action_space.sample()
        )
        assert observations in envs.observation_space
        totals += rewards
        ended = terminated | truncated
        final = infos["final_info"] if mode == "SameStep" and ended.any() else infos
        for row in np.flatnonzero(ended):
            returns.append(totals[row])
            if not final["flatline"][row]:
                assert totals[row] == pytest.approx(final["improvement"][row], abs=1e-12)
        totals[ended] = 0.0
    envs.close()
    assert len(returns) >= (9 if mode == "SameStep" else 6)
