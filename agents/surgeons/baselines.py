"""Surgeons that do not learn: controls for the learning ones.

Shapes: N rows, A coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.surgeons.base import Surgeon
from agents.surgeons.episodes import BoolArray, EpisodeRecord, FloatArray
from avatarl_env.vector_env import AttentionSurgeryVectorEnv


class ZeroSurgeon(Surgeon):
    """Leaves all coefficients at zero, so every reward is exactly 0."""

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return zeros."""
        return np.zeros((len(observations), self.n_coefficients), np.float32)


class RandomSurgeon(Surgeon):
    """Draws every action uniformly from [-1, 1]."""

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int) -> None:
        """Take the environment; `seed` decides prompts and actions."""
        super().__init__(env, seed)
        self._rng = np.random.default_rng(seed)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return new random actions."""
        shape = (len(observations), self.n_coefficients)
        return self._rng.uniform(-1.0, 1.0, shape).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        """Return the states of all generators."""
        return {**super().get_state(), "actions": dict(self._rng.bit_generator.state)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the generators."""
        super().set_state(state)
        self._rng.bit_generator.state = state["actions"]


class ReplaySurgeon(Surgeon):
    """Repeats a trained surgeon's actions, shuffled over rows and operations.

    At step k of an operation it takes an action that the trained surgeon took at step k of another
    operation, on other prompts; the source operation is drawn anew for each step. Actions thus have
    the trained surgeon's distribution at each step, but do not depend on the observations. The
    trained surgeon's advantage over this control is the value of its observations, 0 if all its
    operations are the same.

    Each `operate` first records the trained surgeon on the current language model.
    """

    def __init__(
        self,
        env: AttentionSurgeryVectorEnv,
        seed: int,
        *,
        source: Surgeon,
        n_operations: int = 1,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the trained surgeon.

        Args:
            env: of both surgeons.
            seed: of prompts and shuffling.
            source: the trained surgeon; only its deterministic actions are used.
            n_operations: operations of `source` to record on every row, at least 1.
            about: name, seed and options of `source`, needed to save this surgeon.
        """
        super().__init__(env, seed)
        self.about = about
        self._rng = np.random.default_rng(seed)
        self._source = source
        self._n_watched = n_operations
        self._seen: list[FloatArray] = []
        """Recorded actions (n, A) at each step; n decreases after flatlines."""
        self._step: NDArray[np.int64] = np.zeros(0, np.int64)
        """(N,) index of the next step."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Record the trained surgeon, then operate."""
        self._seen = self._watch()
        return super().operate(n_operations)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return actions of the same steps of other operations.

        The first call records the trained surgeon and then restores operations in progress.
        """
        if not self._seen:
            state, seed = self.env.get_state(), self.next_seed
            self._seen = self._watch()
            self.env.set_state(state)
            self.next_seed = seed
        if len(self._step) != len(observations):
            self._step = np.zeros(len(observations), np.int64)
        self._step[begins] = 0
        actions = np.zeros((len(observations), self.n_coefficients), np.float32)
        steps = np.minimum(self._step, len(self._seen) - 1)
        for step in np.unique(steps):
            rows, seen = np.flatnonzero(steps == step), self._seen[step]
            # Each action is used once before any is used again.
            actions[rows] = seen[np.resize(self._rng.permutation(len(seen)), len(rows))]
        self._step += 1
        return actions

    def save(self, folder: Path) -> None:
        """Write the trained surgeon."""
        self._source.save(folder)

    def load(self, folder: Path) -> None:
        """Read the trained surgeon."""
        self._source.load(folder)

    def get_state(self) -> dict[str, Any]:
        """Return the states of all generators and the recorded actions."""
        own = {"seen": self._seen, "shuffling": dict(self._rng.bit_generator.state)}
        return {**super().get_state(), **own, "source": self._source.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        self._source.set_state(state["source"])
        super().set_state(state)
        self._seen = [np.asarray(actions) for actions in state["seen"]]
        self._rng.bit_generator.state = state["shuffling"]

    def _watch(self) -> list[FloatArray]:
        """Return the trained surgeon's actions (n, A) at each step of an operation."""
        taken: list[list[FloatArray]] = [[] for _ in range(self.episode_length)]
        step = np.zeros(self.env.num_envs, np.int64)

        def act(observations: FloatArray, begins: BoolArray) -> FloatArray:
            step[:] = np.where(begins, 0, step + 1)
            actions = self._source.act(observations, begins)
            for k, action in zip(step, actions, strict=True):
                taken[k].append(action)
            return actions

        self._practise(act, self._n_watched)
        return [np.stack(actions) for actions in taken if actions]
