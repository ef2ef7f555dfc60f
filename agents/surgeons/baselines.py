"""Surgeons that do not learn: the controls that a learning one is compared with.

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
    """Never moves a coefficient, so every reward is exactly 0."""

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
        """Return new random actions, whatever the observations."""
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

    Step k of an operation takes the action of step k of some operation that the trained surgeon
    performed on other prompts, and each step is taken from another operation. Actions and their
    timing are thus distributed as the trained surgeon's, but do not depend on the observations: the
    trained surgeon's advantage over this control is what it gains by looking at the patient. It is
    0 if all its operations are the same.

    The trained surgeon is watched anew in each `operate`, on the language model as it is then.
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
        """Take the trained surgeon.

        Args:
            env: where both operate.
            seed: of prompts and shuffling.
            source: the trained surgeon; asked for deterministic actions only.
            n_operations: operations to watch on every row at a time, at least 1.
            about: name, seed and options that `source` was made with, if this is to be saved.
        """
        super().__init__(env, seed)
        self.about = about
        self._rng = np.random.default_rng(seed)
        self._source = source
        self._n_watched = n_operations
        self._seen: list[FloatArray] = []
        """Actions (n, A) at each step; n falls where patients flatline."""
        self._step: NDArray[np.int64] = np.zeros(0, np.int64)
        """(N,) index of the next step."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Watch the trained surgeon, then operate."""
        self._seen = self._watch()
        return super().operate(n_operations)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return actions of the same steps of other operations, whatever the observations.

        Watches the trained surgeon first if it has not yet; operations in progress are restored.
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
        """Return the states of all generators and the actions seen."""
        own = {"seen": self._seen, "shuffling": dict(self._rng.bit_generator.state)}
        return {**super().get_state(), **own, "source": self._source.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
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
