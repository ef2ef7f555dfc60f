"""Stable-Baselines3 algorithms as surgeons: one adapter, one table of defaults."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agents.surgeons.base import (
    FloatArray,
    OperationRecord,
    OperationRecorder,
    prompt_seed,
)
from agents.surgeons.randomness import PrivateRandomness
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

# An operation is a finite task of a few steps: nothing is discounted.
GAMMA = 1.0


class Algorithm(NamedTuple):
    """Where an algorithm lives and how it is set up for short finite operations."""

    module: str
    name: str
    options: Mapping[str, Any]


ALGORITHMS: dict[str, Algorithm] = {
    "sac": Algorithm(
        "stable_baselines3",
        "SAC",
        {
            # An evaluation of the language model costs a hundred gradient steps of these nets.
            "policy_kwargs": {"net_arch": [128, 128]},
            "learning_rate": 1e-3,
            "batch_size": 256,
            # Old transitions tell of a language model that is no more.
            "buffer_size": 20_000,
            "learning_starts": 128,
            # After each incision on every row.
            "train_freq": (1, "step"),
            "gradient_steps": 16,
            # Rewards are scaled to a spread of one; SB3's first coefficient, 1, drowns them.
            "ent_coef": "auto_0.1",
        },
    ),
}


class SB3Surgeon:
    """An off-policy algorithm of Stable-Baselines3 that learns from whole operations."""

    def __init__(
        self, name: str, env: AttentionSurgeryVectorEnv, seed: int, **options: Any
    ) -> None:
        """Build the algorithm.

        Args:
            name: a key of :data:`ALGORITHMS`.
            env: where it operates, on all rows at once.
            seed: of the algorithm and of the environment's prompts.
            **options: the algorithm's own keyword arguments, over the table's.
        """
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

        from agents.surgeons.vec_env import SB3VecEnv

        algorithm = ALGORITHMS[name]
        make = getattr(importlib.import_module(algorithm.module), algorithm.name)
        self._recorder = OperationRecorder(env)
        self._steps_per_operation = env.num_envs * env.config.n_incisions
        self._randomness = PrivateRandomness(seed)
        with self._randomness.use():
            # Observations by running mean and spread, rewards (hundredths of a nat) by spread.
            self._env = VecNormalize(VecMonitor(SB3VecEnv(self._recorder)), gamma=GAMMA)
            settings = {"gamma": GAMMA, "device": "cpu", **algorithm.options, **options}
            self.model: OffPolicyAlgorithm = make("MlpPolicy", self._env, seed=seed, **settings)
            # SB3 gives prompts and first actions one seed: they would be made of the same dice.
            self._env.seed(prompt_seed(seed))
        self.model.set_logger(Logger(folder=None, output_formats=[]))

    def operate(self, n_operations: int) -> list[OperationRecord]:
        """Perform so many whole operations on every row, beginning afresh, and learn from them."""
        # SB3 keeps the last observation between calls of learn(). It belongs to the model as it
        # was then: going on from it would pay the model's own progress out to the surgeon.
        self.model._last_obs = None
        with self._randomness.use():
            self.model.learn(
                n_operations * self._steps_per_operation,
                log_interval=None,  # type: ignore[arg-type]  # never, says the code
                reset_num_timesteps=False,
            )
        return self._recorder.collect()

    def act(self, observations: FloatArray) -> FloatArray:
        """Return the deterministic actions (N, A) for observations (N, O)."""
        normalised = self._env.normalize_obs(observations)
        with self._randomness.use():
            actions, _ = self.model.predict(np.asarray(normalised), deterministic=True)
        return np.asarray(actions, dtype=np.float32)

    def stats(self) -> Mapping[str, float]:
        """Return the algorithm's latest losses, ``surgeon/actor_loss`` and so on."""
        return {
            key.replace("train/", "surgeon/"): float(value)
            for key, value in self.model.logger.name_to_value.items()
            if key.startswith("train/")
        }

    def save(self, folder: Path) -> None:
        """Write ``surgeon.zip`` and ``surgeon_normalisation.json`` into an existing folder."""
        from stable_baselines3.common.running_mean_std import RunningMeanStd

        self.model.save(folder / "surgeon.zip")
        rms = self._env.obs_rms
        assert isinstance(rms, RunningMeanStd)
        content = {
            "mean": rms.mean.tolist(),
            "var": rms.var.tolist(),
            "count": float(rms.count),
            "return_var": float(self._env.ret_rms.var),
        }
        path = folder / "surgeon_normalisation.json"
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
