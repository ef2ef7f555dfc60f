"""Surgeons that do not learn: the bars that a learning one has to clear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gymnasium
import numpy as np

from agents.surgeons.base import FloatArray, OperationRecord, OperationRecorder


class ZeroSurgeon:
    """Never moves a coefficient: every reward is exactly 0."""

    def __init__(self, env: gymnasium.Env[FloatArray, FloatArray], seed: int) -> None:
        """Take the environment; ``seed`` decides the prompts."""
        self._env = OperationRecorder(env)
        self._seed: int | None = seed
        assert env.action_space.shape is not None
        self._shape = env.action_space.shape

    def operate(self, n_operations: int) -> list[OperationRecord]:
        """Perform whole operations."""
        for _ in range(n_operations):
            observation, _ = self._env.reset(seed=self._seed)
            self._seed = None
            is_over = False
            while not is_over:
                observation, _, terminated, truncated, _ = self._env.step(self.act(observation))
                is_over = terminated or truncated
        return self._env.collect()

    def act(self, observation: FloatArray) -> FloatArray:
        """Return zeros."""
        return np.zeros(self._shape, np.float32)

    def stats(self) -> Mapping[str, float]:
        """Return nothing: there is no learning."""
        return {}

    def save(self, folder: Path) -> None:
        """Write nothing: there is nothing learned."""


class RandomSurgeon(ZeroSurgeon):
    """Draws every action uniformly from [-1, 1]."""

    def __init__(self, env: gymnasium.Env[FloatArray, FloatArray], seed: int) -> None:
        """Take the environment; ``seed`` decides prompts and actions."""
        super().__init__(env, seed)
        # A child of the seed: the seed itself starts the environment's own generator, and actions
        # from the same stream would not be independent of the prompts.
        self._rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])

    def act(self, observation: FloatArray) -> FloatArray:
        """Return a new draw, whatever the observation."""
        return self._rng.uniform(-1.0, 1.0, self._shape).astype(np.float32)
