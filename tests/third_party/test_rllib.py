"""RLlib's loop over a vector environment, reimplemented: its package pins another Gymnasium.

Given `gym_env_vectorize_mode=VECTOR_ENTRY_POINT` it makes the environment with `make_vec` and
assumes the autoreset mode NEXT_STEP: what the step after an episode's end returns is the first
observation of the next episode, and no transition.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from tests.third_party.conftest import ENV_ID

N_ROWS, N_STEPS, N_EPISODES = 3, 4, 24


class Episode:
    """What RLlib keeps of an episode: one more observation than actions."""

    def __init__(self, observation: np.ndarray) -> None:
        self.observations = [observation]
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []

    def add(self, action: np.ndarray, observation: np.ndarray, reward: float) -> None:
        self.actions.append(action)
        self.observations.append(observation)
        self.rewards.append(reward)


def sample(envs: Any, n_episodes: int, rng: np.random.Generator) -> list[tuple[int, Episode]]:
    """Run the loop of its runner until so many episodes have ended; return them by row."""
    observations, _ = envs.reset(seed=7)
    running = [Episode(observation) for observation in observations]
    was_reset = np.zeros(envs.num_envs, dtype=bool)
    done: list[tuple[int, Episode]] = []
    while len(done) < n_episodes:
        # So small that no operation flatlines: every episode has its full length.
        actions = rng.uniform(-0.02, 0.02, envs.action_space.shape).astype(np.float32)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        for row in range(envs.num_envs):
            if was_reset[row]:
                running[row] = Episode(observations[row])
                continue
            running[row].add(actions[row], observations[row], float(rewards[row]))
            if terminated[row] or truncated[row]:
                done.append((row, running[row]))
        was_reset = terminated | truncated
    return done


def test_every_episode_is_whole_and_ends_with_its_own_observation(
    keywords: dict[str, Any],
) -> None:
    rules = {**keywords, "episode_length": N_STEPS}
    envs = gymnasium.make_vec(ENV_ID, num_envs=N_ROWS, **rules)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    episodes = sample(envs, N_EPISODES, np.random.default_rng(0))
    envs.close()
    assert [len(episode.actions) for _, episode in episodes] == [N_STEPS] * N_EPISODES
    # A vector environment without autoreset must return the same for the same actions.
    twin = gymnasium.make_vec(ENV_ID, num_envs=N_ROWS, autoreset_mode="Disabled", **rules)
    for batch in range(N_EPISODES // N_ROWS):
        rows = dict(episodes[batch * N_ROWS : (batch + 1) * N_ROWS])
        assert sorted(rows) == list(range(N_ROWS))
        observations, _ = twin.reset(seed=7) if batch == 0 else twin.reset()
        for step in range(N_STEPS + 1):
            for row, episode in rows.items():
                assert np.array_equal(episode.observations[step], observations[row])
            if step == N_STEPS:
                break
            moves = np.array([rows[row].actions[step] for row in range(N_ROWS)])
            observations, rewards, terminated, _, _ = twin.step(moves)
            assert rewards.tolist() == [rows[row].rewards[step] for row in range(N_ROWS)]
        assert terminated.all()
        assert observations[:, -1].tolist() == [0.0] * N_ROWS  # no time left
    twin.close()
