"""The control that has a trained surgeon's actions, but not its timing.

Shapes: N rows, A coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.surgeons.base import BoolArray, FloatArray, Surgeon
from agents.surgeons.baselines import ZeroSurgeon
from avatarl_env.vector_env import AttentionSurgeryVectorEnv


class ReplaySurgeon(ZeroSurgeon):
    """Draws from the actions of a trained surgeon, shuffled over operations and incisions.

    As a whole its actions are those of the trained one, but none answers what the surgeon sees:
    what the trained one gains over this is owed to looking at the patient.
    """

    def __init__(
        self, env: AttentionSurgeryVectorEnv, seed: int, *, source: Surgeon, n_operations: int = 4
    ) -> None:
        """Let the trained surgeon operate, and keep its actions.

        Args:
            env: where both operate.
            seed: of prompts and shuffling.
            source: the trained surgeon; asked for deterministic actions, it learns nothing here.
            n_operations: on every row, whose actions are kept.
        """
        super().__init__(env, seed)
        self._rng = np.random.default_rng(seed)
        self._actions = self._watch(source, n_operations)
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the next of the shuffled actions, whatever the observations."""
        while len(self._order) < len(observations):
            again = self._rng.permutation(len(self._actions))
            self._order = np.concatenate([self._order, again])
        now, self._order = np.split(self._order, [len(observations)])
        actions: FloatArray = self._actions[now]
        return actions

    def get_state(self) -> dict[str, Any]:
        """Return where the dice stand, and what is left of the shuffled actions."""
        order = {"left": self._order, "shuffling": dict(self._rng.bit_generator.state)}
        return {**super().get_state(), **order, "actions": self._actions}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().set_state(state)
        self._order, self._actions = np.asarray(state["left"]), np.asarray(state["actions"])
        self._rng.bit_generator.state = state["shuffling"]

    def _watch(self, source: Surgeon, n_operations: int) -> FloatArray:
        """Return the actions of so many operations on every row, (n, A)."""
        observations, _ = self._env.reset(seed=self._seed)
        self._seed = None
        begins = np.ones(len(observations), dtype=np.bool_)
        taken = []
        for _ in range(n_operations * self._n_incisions):
            taken.append(source.act(observations, begins))
            observations, _, terminated, truncated, _ = self._env.step(taken[-1])
            begins = terminated | truncated
        self._env.collect()
        return np.concatenate(taken)
