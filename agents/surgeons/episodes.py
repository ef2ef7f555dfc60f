"""The control that has a trained surgeon's actions and their timing, but does not look.

Shapes: N rows, A coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.surgeons.base import BoolArray, EpisodeRecord, FloatArray, Surgeon, check_count
from agents.surgeons.baselines import ZeroSurgeon
from avatarl_env.vector_env import AttentionSurgeryVectorEnv


class ReplaySurgeon(ZeroSurgeon):
    """Does what a trained surgeon did elsewhere: shuffled over rows and operations.

    The k-th step of an operation is the k-th of one that the trained surgeon performed, on
    other prompts, and each step is taken from another of its operations. So as a whole actions
    and their timing are those of the trained surgeon, but none answers what it would see: what it
    gains over this is owed to looking at the patient. Where all of its operations are the same,
    that is nothing.

    It is watched anew whenever there is to be operated, on the language model as that is then.
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
        """Take the trained surgeon; it is watched later.

        Args:
            env: where both operate.
            seed: of prompts and shuffling.
            source: the trained surgeon; asked for deterministic actions, it learns nothing here.
            n_operations: that are watched at a time on every row, at least 1.
            about: name, seed and options that the source was made with, if it is to be saved.

        Raises:
            ValueError: if there are none.
        """
        check_count("n_operations", n_operations)
        super().__init__(env, seed)
        self.about = about
        self._rng = np.random.default_rng(seed)
        self._source = source
        self._n_watched = n_operations
        self._seen: list[FloatArray] = []
        """Actions (n, A) by the number of the step; n becomes less where patients die."""
        self._step: NDArray[np.int64] = np.zeros(0, np.int64)
        """(N,) number of the next step."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Watch the trained surgeon, then perform so many whole operations on every row."""
        self._seen = self._watch()
        return super().operate(n_operations)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return actions of the same steps of other operations, whatever the observations.

        Who has not operated yet watches first; operations under way are not disturbed.
        """
        if not self._seen:
            state, seed = self._vector.get_state(), self._seed
            self._seen = self._watch()
            self._vector.set_state(state)
            self._seed = seed
        if len(self._step) != len(observations):
            self._step = np.zeros(len(observations), np.int64)
        self._step[begins] = 0
        actions = np.zeros((len(observations), self._n_coefficients), np.float32)
        which = np.minimum(self._step, len(self._seen) - 1)
        for number in np.unique(which):
            rows, seen = np.flatnonzero(which == number), self._seen[number]
            # Each once, before any comes again.
            actions[rows] = seen[np.resize(self._rng.permutation(len(seen)), len(rows))]
        self._step += 1
        return actions

    def save(self, folder: Path) -> None:
        """Write the trained surgeon."""
        self._source.save(folder)

    def load(self, folder: Path) -> None:
        """Let the trained surgeon take over what one like it wrote."""
        self._source.load(folder)

    def get_state(self) -> dict[str, Any]:
        """Return where all dice stand, and what was seen."""
        own = {"seen": self._seen, "shuffling": dict(self._rng.bit_generator.state)}
        return {**super().get_state(), **own, "source": self._source.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._source.set_state(state["source"])
        super().set_state(state)
        self._seen = [np.asarray(actions) for actions in state["seen"]]
        self._rng.bit_generator.state = state["shuffling"]

    def _watch(self) -> list[FloatArray]:
        """Return the trained surgeon's actions (n, A) by the number of the step."""
        observations, _ = self._env.reset(seed=self._seed)
        self._seed = None
        begins = np.ones(len(observations), dtype=np.bool_)
        step = np.zeros(len(observations), np.int64)
        taken: list[list[FloatArray]] = [[] for _ in range(self._episode_length)]
        for _ in range(self._n_watched * self._episode_length):
            step = np.where(begins, 0, step + 1)
            actions = self._source.act(observations, begins)
            for number, action in zip(step, actions, strict=True):
                taken[number].append(action)
            observations, _, terminated, truncated, _ = self._env.step(actions)
            begins = terminated | truncated
        self._env.collect()
        return [np.stack(actions) for actions in taken if actions]
