"""Play episodes on a vector environment and keep a record of each.

Shapes: N rows, A coefficients, O numbers in an observation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from avatarl_env.vector_env import AttentionSurgeryVectorEnv

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Act = Callable[[FloatArray, BoolArray], FloatArray]
"""Actions (N, A) for observations (N, O); the mask (N,) marks rows at the start of an episode."""


class EpisodeRecord(NamedTuple):
    """One finished operation."""

    total: float
    """Return: the improvement of the score; after a flatline at most `-flatline_penalty`."""
    length: int
    """Steps."""
    mean_abs_action: float
    """Mean of |action| over steps and coefficients, in [0, 1]."""
    coefficients: NDArray[np.float64]
    """(A,) final coefficients."""
    flatline: str | None
    """Cause of the flatline, or None."""
    terms: dict[str, float]
    """Score terms at the end."""
    baseline_terms: dict[str, float]
    """Score terms of the unoperated model."""
    lost_score: float
    """Score lost to the injury; 0 without one."""
    row: int = 0
    """Row of the vector environment."""


class EpisodeRecorder(VectorWrapper[Any, Any, Any, Any, Any]):
    """Record each operation when it ends."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Wrap a vector environment."""
        super().__init__(env)
        self.records: list[EpisodeRecord] = []
        self._totals = np.zeros(env.num_envs)
        self._efforts = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._is_resetting = np.zeros(env.num_envs, np.bool_)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Reset every row; unfinished operations leave no record."""
        self._restart(np.ones(self.num_envs, np.bool_))
        self._is_resetting[:] = False
        return self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]

    def step(
        self, actions: FloatArray
    ) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step every row."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        played = ~self._is_resetting  # in mode NEXT_STEP, a reset takes a step
        self._totals += rewards
        self._lengths += played
        self._efforts += np.where(played, np.abs(actions).mean(axis=1), 0.0)
        ended = terminated | truncated
        final_infos = infos.get("final_info", infos)  # in mode SAME_STEP, or in the others
        for row in np.flatnonzero(ended).tolist():
            self.records.append(self._record(row, row_info(final_infos, row)))
        self._restart(ended)
        return observations, rewards, terminated, truncated, infos

    def collect(self) -> list[EpisodeRecord]:
        """Return the records since the last call."""
        records, self.records = self.records, []
        return records

    def _record(self, row: int, info: dict[str, Any]) -> EpisodeRecord:
        return EpisodeRecord(
            total=float(self._totals[row]),
            length=int(self._lengths[row]),
            mean_abs_action=float(self._efforts[row] / self._lengths[row]),
            coefficients=info["coefficients"],
            flatline=info["flatline"] or None,
            terms=info["score_terms"],
            baseline_terms=info["baseline_terms"],
            lost_score=info["lost_score"],
            row=row,
        )

    def _restart(self, rows: BoolArray) -> None:
        self._totals[rows] = self._efforts[rows] = self._lengths[rows] = 0
        mode = self.env.metadata.get("autoreset_mode")
        self._is_resetting = rows & (mode == AutoresetMode.NEXT_STEP)


def play(
    env: VectorEnv[Any, Any, Any],
    act: Act,
    seed: int | list[int] | None,
    n_steps: int | None = None,
) -> list[EpisodeRecord]:
    """Reset all rows and play episodes on them.

    Args:
        env: in mode SAME_STEP; or in mode NEXT_STEP for one episode on each row, which saves the
            evaluation of another baseline.
        act: the policy; called once for each step.
        seed: as for `reset`; None continues the rows' generators.
        n_steps: number of steps; by default, until every row has finished one episode.

    Returns:
        Records of all finished episodes (with `n_steps`) or of each row's first one, in the order
        in which they ended.
    """
    recorder = EpisodeRecorder(env)
    observations, _ = recorder.reset(seed=seed)
    begins = np.ones(env.num_envs, np.bool_)
    first: dict[int, EpisodeRecord] = {}
    for _ in count() if n_steps is None else range(n_steps):
        observations, _, terminated, truncated, _ = recorder.step(act(observations, begins))
        begins = terminated | truncated
        if n_steps is None:
            for record in recorder.collect():
                first.setdefault(record.row, record)
            if len(first) == env.num_envs:
                break
    return recorder.collect() if n_steps is not None else list(first.values())


def check_records(records: Any) -> None:
    """Raise a TypeError unless this is a valid result of `Surgeon.operate`."""
    if not isinstance(records, list) or not all(isinstance(r, EpisodeRecord) for r in records):
        raise TypeError(f"operate must return a list of EpisodeRecord, got {records!r:.100}")


def require_same_step(env: VectorEnv[Any, Any, Any], purpose: str) -> None:
    """Make sure that an environment is in autoreset mode SAME_STEP; switch it if it is ours.

    Raises:
        ValueError: if an environment of another package is in another mode.
    """
    if isinstance(env, AttentionSurgeryVectorEnv):
        env.autoreset_mode = AutoresetMode.SAME_STEP
    mode = env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.SAME_STEP:
        raise ValueError(
            f"autoreset_mode must be SAME_STEP {purpose}, got {mode}: "
            'make the environment with autoreset_mode="SameStep"'
        )


def row_info(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return one row of a vector environment's infos, as plain values and copies.

    An entry `name` is left out if its mask `_name` is False for the row.
    """
    info: dict[str, Any] = {}
    for name, values in infos.items():
        mask = infos.get(f"_{name}")
        if name.startswith("_") or (mask is not None and not mask[row]):
            continue
        if isinstance(values, dict):
            info[name] = row_info(values, row)
        else:
            value = values[row]
            info[name] = value.item() if isinstance(value, np.generic) else copy(value)
    return info
