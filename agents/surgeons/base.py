"""What every surgeon can do, and the record that is kept of each operation.

Shapes: A coefficients, O numbers in an observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsFloat

import gymnasium
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class OperationRecord(NamedTuple):
    """One finished operation."""

    total: float
    """Return: the improvement of the score, or minus the flatline penalty."""
    length: int
    """Incisions made."""
    mean_abs_action: float
    """Mean of |action| over incisions and coefficients, in [0, 1]."""
    coefficients: NDArray[np.float64]
    """(A,) at the end."""
    flatline: str | None
    """What the patient died of, or None."""
    terms: dict[str, float]
    """Score terms at the end."""
    baseline_terms: dict[str, float]
    """Score terms of the unoperated model."""
    lost_score: float
    """What the injury had cost; 0 without one."""


class Surgeon(Protocol):
    """A learner that operates. One constructor call per run, then rounds of operations."""

    def operate(self, n_operations: int) -> list[OperationRecord]:
        """Perform whole operations, beginning with a fresh reset, and learn from them."""

    def act(self, observation: FloatArray) -> FloatArray:
        """Return the deterministic action (A,) for an observation (O,)."""

    def stats(self) -> Mapping[str, float]:
        """Return what there is to say of the learning since the last call, by metric name."""

    def save(self, folder: Path) -> None:
        """Write what the surgeon learned into an existing folder."""


class OperationRecorder(gymnasium.Wrapper[FloatArray, FloatArray, FloatArray, FloatArray]):
    """Keeps a record of each operation that ends."""

    def __init__(self, env: gymnasium.Env[FloatArray, FloatArray]) -> None:
        """Wrap an ``AttentionSurgery-v0``."""
        super().__init__(env)
        self.records: list[OperationRecord] = []
        self._total = 0.0
        self._actions: list[float] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Forget an unfinished operation and begin another."""
        self._total = 0.0
        self._actions = []
        return self.env.reset(seed=seed, options=options)

    def step(
        self, action: FloatArray
    ) -> tuple[FloatArray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Make an incision and take note."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._total += float(reward)
        self._actions.append(float(np.abs(action).mean()))
        if terminated or truncated:
            self.records.append(
                OperationRecord(
                    self._total,
                    len(self._actions),
                    float(np.mean(self._actions)),
                    info["coefficients"],
                    info.get("flatline"),
                    info["score_terms"],
                    info["baseline_terms"],
                    info.get("lost_score", 0.0),
                )
            )
        return observation, reward, terminated, truncated, info

    def collect(self) -> list[OperationRecord]:
        """Return the records since the last call."""
        records, self.records = self.records, []
        return records
