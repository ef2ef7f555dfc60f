"""Surgeons that do not learn: the bars that a learning one has to clear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.surgeons.base import (
    BoolArray,
    EpisodeRecord,
    EpisodeRecorder,
    FloatArray,
    prompt_seed,
)
from avatarl_env.vector_env import AttentionSurgeryVectorEnv


class ZeroSurgeon:
    """Never moves a coefficient: every reward is exactly 0."""

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int) -> None:
        """Take the environment; `seed` decides the prompts."""
        self._vector = env
        self._env = EpisodeRecorder(env)
        self._seed: int | None = prompt_seed(seed)
        self._episode_length = env.config.episode_length
        self._n_coefficients = len(env.operator.labels)

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Perform so many whole operations on every row."""
        observations, _ = self._env.reset(seed=self._seed)
        self._seed = None
        begins = np.ones(len(observations), dtype=np.bool_)
        for _ in range(n_operations * self._episode_length):
            actions = self.act(observations, begins)
            observations, _, terminated, truncated, _ = self._env.step(actions)
            begins = terminated | truncated
        return self._env.collect()

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return zeros."""
        return np.zeros((len(observations), self._n_coefficients), np.float32)

    def stats(self) -> Mapping[str, float]:
        """Return nothing: there is no learning."""
        return {}

    def save(self, folder: Path) -> None:
        """Write nothing: there is nothing learned."""

    def load(self, folder: Path) -> None:
        """Read nothing."""

    def get_state(self) -> dict[str, Any]:
        """Return where the prompts' dice stand."""
        return {"seed": self._seed, "rng_state": self._vector.get_rng_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._seed = state["seed"]
        self._vector.set_rng_state(state["rng_state"])


class RandomSurgeon(ZeroSurgeon):
    """Draws every action uniformly from [-1, 1]."""

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int) -> None:
        """Take the environment; `seed` decides prompts and actions."""
        super().__init__(env, seed)
        self._rng = np.random.default_rng(seed)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return new draws, whatever the observations."""
        shape = (len(observations), self._n_coefficients)
        return self._rng.uniform(-1.0, 1.0, shape).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        """Return where the dice stand, those of the actions too."""
        return {**super().get_state(), "actions": dict(self._rng.bit_generator.state)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().set_state(state)
        self._rng.bit_generator.state = state["actions"]
