"""Adapter from Gymnasium's vector environments to Stable-Baselines3's.

Importing this module imports Stable-Baselines3.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from agents.surgeons.episodes import require_same_step, row_info


class SB3VecEnv(VecEnv):
    """Adapter from any Gymnasium vector environment, in mode SAME_STEP.

    Stable-Baselines3 expects this mode. This package's own environment is switched to it; others
    must be created in it.

    ::

        env = gymnasium.make_vec("avatarl_env:AttentionSurgery-v0", num_envs=32)
        model = SAC("MlpPolicy", VecMonitor(SB3VecEnv(env)), gamma=1.0)

    Row i is seeded with `seed + i`. When an episode ends, `final_obs` becomes
    `terminal_observation`, and `final_info` the info of the row.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Wrap the environment.

        Raises:
            ValueError: if its autoreset mode is not SAME_STEP and cannot be switched.
        """
        require_same_step(env, "for Stable-Baselines3")
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Reset all rows, with the seeds and options set since the last reset.

        Raises:
            ValueError: if rows have different options.
        """
        seed, options = self._seeds[0], self._options[0]  # seeds count up, as Gymnasium's do
        if any(other is not options and other != options for other in self._options):
            raise ValueError(f"options must be the same for all rows, got {self._options}")
        self._reset_seeds()
        self._reset_options()
        observations, infos = self.env.reset(seed=seed, options=options or None)
        self.reset_infos = [row_info(infos, row) for row in range(self.num_envs)]
        copied: VecEnvObs = deepcopy(observations)
        return copied

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions (N, A) for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all rows."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        dones = terminated | truncated
        rows: list[dict[str, Any]] = []
        for row in range(self.num_envs):
            info = row_info(infos, row)
            if dones[row]:
                self.reset_infos[row] = info
                final_obs, info = info.pop("final_obs"), info.pop("final_info")
                info["terminal_observation"] = final_obs
            info["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
            rows.append(info)
        # Copies, since some environments write the next step into the same arrays.
        return deepcopy(observations), np.array(rewards, dtype=np.float32), dones, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the vector environment, once for each row."""
        return [getattr(self.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector environment, for all rows."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **keywords: Any
    ) -> list[Any]:
        """Call a method of the vector environment, once; return the result for each row."""
        return [getattr(self.env, method_name)(*args, **keywords)] * self._count(indices)

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """Return False for each row: rows have no wrappers of their own."""
        return [False] * self._count(indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return an image of each row, or None unless the render mode is rgb_array."""
        if self.render_mode != "rgb_array":
            return [None] * self.num_envs
        images: Any = self.env.render()
        return list(images)

    def _count(self, indices: Any) -> int:
        return len(list(self._get_indices(indices)))
