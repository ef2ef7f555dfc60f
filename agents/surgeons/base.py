"""What every surgeon can do, and the record that is kept of each operation.

Shapes: N rows, A coefficients, O numbers in an observation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from avatarl_env.vector_env import AttentionSurgeryVectorEnv

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


class EpisodeRecord(NamedTuple):
    """One finished operation."""

    total: float
    """Return: the improvement of the score, or minus the flatline penalty."""
    length: int
    """Steps made."""
    mean_abs_action: float
    """Mean of |action| over steps and coefficients, in [0, 1]."""
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
    """A learner that operates on every row of a vector environment at once."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Perform so many whole operations on every row, beginning afresh, and learn from them.

        Or more, where what is learned from them needs more. A row whose patient flatlines goes on
        with the next operation at once; what of that is unfinished at the end is learned from too,
        but leaves no record.
        """

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the deterministic actions (N, A) for observations (N, O).

        Call it for every step, and say for each row, (N,), whether its operation begins with
        this one: a surgeon may remember.
        """

    def stats(self) -> Mapping[str, float]:
        """Return what there is to say of the learning since the last call, by metric name."""

    def save(self, folder: Path) -> None:
        """Write what the surgeon learned into an existing folder."""

    def load(self, folder: Path) -> None:
        """Take over what a surgeon of the same name, seed and options wrote."""

    def get_state(self) -> dict[str, Any]:
        """Return what `save` leaves out and going on exactly needs: a tree of plain data.

        Asked for between two rounds: no operation is under way.
        """

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on exactly from there, after `load`; tuples may have become lists."""


class EpisodeRecorder(VectorWrapper[Any, Any, Any, Any, Any]):
    """Keeps a record of each operation that ends."""

    def __init__(self, env: AttentionSurgeryVectorEnv) -> None:
        """Wrap a vector environment."""
        super().__init__(env)
        self.records: list[EpisodeRecord] = []
        self._totals = np.zeros(env.num_envs)
        self._efforts: list[list[float]] = [[] for _ in range(env.num_envs)]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Forget unfinished operations and begin others, in mode SAME_STEP.

        Raises:
            ValueError: if the autoreset mode is another and cannot be switched.
        """
        ask_for_same_step(self.env, "to practise")
        for row in range(self.num_envs):
            self._forget(row)
        return self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]

    def step(
        self, actions: FloatArray
    ) -> tuple[FloatArray, FloatArray, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Make a step on every row and take note."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        self._totals += rewards
        for row, effort in enumerate(np.abs(actions).mean(axis=1)):
            self._efforts[row].append(float(effort))
        for row in np.flatnonzero(terminated | truncated).tolist():
            self.records.append(self._record(row, row_info(infos["final_info"], row)))
            self._forget(row)
        return observations, rewards, terminated, truncated, infos

    def collect(self) -> list[EpisodeRecord]:
        """Return the records since the last call."""
        records, self.records = self.records, []
        return records

    def _record(self, row: int, info: dict[str, Any]) -> EpisodeRecord:
        return EpisodeRecord(
            float(self._totals[row]),
            len(self._efforts[row]),
            float(np.mean(self._efforts[row])),
            info["coefficients"],
            info["flatline"] or None,
            info["score_terms"],
            info["baseline_terms"],
            info["lost_score"],
        )

    def _forget(self, row: int) -> None:
        self._totals[row] = 0.0
        self._efforts[row] = []


def ask_for_same_step(env: VectorEnv[Any, Any, Any], purpose: str) -> None:
    """Switch our own vector environment to mode SAME_STEP; another has to be in it already.

    Raises:
        ValueError: if it is in another mode.
    """
    if isinstance(env, AttentionSurgeryVectorEnv):
        env.autoreset_mode = AutoresetMode.SAME_STEP
    mode = env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.SAME_STEP:
        raise ValueError(
            f"autoreset_mode must be SAME_STEP {purpose}, got {mode}: "
            'make the environment with autoreset_mode="SameStep"'
        )


def prompt_seed(seed: int) -> int:
    """Return the seed of row 0's prompts for a surgeon's seed; row i's is so many more.

    Spread out, so that surgeons of neighbouring seeds share no prompts, and actions drawn from the
    seed itself are made of other dice.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)


def check_positive(name: str, value: object) -> None:
    """Raise a ValueError unless an option is a positive finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):  # type: ignore[operator]
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless an option is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def row_info(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return one row's part of a vector environment's infos.

    Where there is a mask called `_name`, rows that it leaves out have no `name`.
    """
    info: dict[str, Any] = {}
    for name, values in infos.items():
        has_it = infos.get(f"_{name}")
        if name.startswith("_") or (has_it is not None and not has_it[row]):
            continue
        if isinstance(values, dict):
            info[name] = row_info(values, row)
        else:
            value = values[row]
            info[name] = value.item() if isinstance(value, np.generic) else copy(value)
    return info
