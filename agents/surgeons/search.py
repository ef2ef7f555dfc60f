"""Surgeons that search for one operation: the same incisions whatever the model does.

They act open loop. What they find is the best constant answer, the bar that a surgeon has to clear
to show that looking at the patient is worth anything.

Shapes: N rows, A coefficients, P candidates of a generation.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.surgeons.base import (
    BoolArray,
    FloatArray,
    OperationRecord,
    OperationRecorder,
    get_dice,
    prompt_seed,
    set_dice,
)
from avatarl_env.episode import incised
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

Array = NDArray[np.float64]

FILE = "surgeon_search.json"


class SearchSurgeon(ABC):
    """Tries candidates (A,), one on each row, and moves to where the better ones were.

    All candidates of a generation continue the same prompts with the same dice, so that only the
    operations differ. A generation has one candidate for each row, or several where rows are few.
    """

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int, least: int) -> None:
        """Begin at doing nothing; called by the searches.

        Args:
            env: where it operates.
            seed: of prompts and candidates.
            least: candidates that a generation needs.
        """
        self._vector = env
        self._recorder = OperationRecorder(env)
        self._step_size = env.config.step_size
        self._n_incisions = env.config.n_incisions
        self._n_rows = env.num_envs
        self._dice = np.random.default_rng(prompt_seed(seed))
        rounds = math.ceil(least / self._n_rows)
        if self._n_rows * rounds % 2:  # candidates may come in pairs
            rounds += 1
        self._population = self._n_rows * rounds
        self._candidates: Array = np.zeros((0, len(env.operator.labels)))
        self._returns: list[float] = []
        self._seed = 0  # of a generation's prompts
        self._generations: list[list[float]] = []
        self._reached: Array = np.zeros_like(self._candidates)

    @abstractmethod
    def _ask(self, n: int) -> Array:
        """Return new candidates (n, A) in [-1, 1], n even."""

    @abstractmethod
    def _tell(self, candidates: Array, returns: Array) -> None:
        """Learn the returns (n,) of what was asked for last."""

    @abstractmethod
    def _best(self) -> Array:
        """Return what it would do, (A,) in [-1, 1]."""

    def operate(self, n_operations: int) -> list[OperationRecord]:
        """Perform so many whole operations on every row, and learn where a generation is full."""
        for _ in range(n_operations):
            if not self._returns:
                self._candidates = self._ask(self._population)
                self._seed = int(self._dice.integers(2**31))
            done = len(self._returns)
            self._returns += self._perform(self._candidates[done : done + self._n_rows])
            if len(self._returns) == self._population:
                self._tell(self._candidates, np.array(self._returns))
                self._generations.append(self._returns)
                self._returns = []
        return self._recorder.collect()

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the next incisions (N, A) towards the best operation so far."""
        if len(self._reached) != len(observations):
            self._reached = np.zeros((len(observations), len(self._best())))
        self._reached[begins] = 0.0
        actions = self._towards(np.broadcast_to(self._best(), self._reached.shape), self._reached)
        self._reached = incised(self._reached, actions, self._step_size)
        return actions

    def stats(self) -> Mapping[str, float]:
        """Return how many generations there were."""
        return {"surgeon/generations": float(len(self._generations))}

    def save(self, folder: Path) -> None:
        """Write what the candidates of each full generation returned."""
        content = {"population": self._population, "generations": self._generations}
        (folder / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go through another's generations anew; this one must be of the same seed and options.

        Raises:
            ValueError: if its generations were of another size, or this one has searched already.
        """
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content["population"] != self._population:
            raise ValueError(
                f"rows must make generations of {content['population']}, as when it was saved, "
                f"got {self._population}"
            )
        if self._generations or self._returns:
            raise ValueError("surgeon must be new to take over a search, this one has searched")
        for returns in content["generations"]:
            self._tell(self._ask(self._population), np.array(returns))
            self._dice.integers(2**31)
            self._generations.append(returns)

    def get_state(self) -> dict[str, Any]:
        """Return what there is of an unfinished generation, and where the prompts' dice stand."""
        return {
            "returns": self._returns,
            "seed": self._seed,
            "dice": dict(self._dice.bit_generator.state),
            "rows": get_dice(self._vector),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the candidates of an unfinished generation are drawn again."""
        self._returns, self._seed = list(state["returns"]), state["seed"]
        if self._returns:
            self._candidates = self._ask(self._population)
        self._dice.bit_generator.state = state["dice"]
        set_dice(self._vector, state["rows"])

    def _perform(self, goals: Array) -> list[float]:
        """Operate towards ``goals`` (N, A), each row on the same prompts; return the returns."""
        self._recorder.reset(seed=[self._seed] * self._n_rows)
        reached, totals = np.zeros_like(goals), np.zeros(len(goals))
        is_open = np.ones(len(goals), dtype=np.bool_)
        for _ in range(self._n_incisions):
            # A row whose patient died has begun another operation: it does nothing there.
            actions = np.where(is_open[:, None], self._towards(goals, reached), np.float32(0))
            reached = incised(reached, actions, self._step_size)
            _, rewards, terminated, truncated, _ = self._recorder.step(actions)
            totals += np.where(is_open, rewards, 0.0)
            is_open &= ~(terminated | truncated)
        return [float(total) for total in totals]

    def _towards(self, goals: Array, reached: Array) -> FloatArray:
        """Return the incisions that lead furthest towards the goals; exactly 0 once there."""
        way = (goals - reached) / self._step_size
        way[np.abs(way) < 1e-6] = 0.0  # actions are float32
        return np.clip(way, -1.0, 1.0).astype(np.float32)


class CMAESSurgeon(SearchSurgeon):
    """Covariance matrix adaptation, by the library ``cmaes``.

    Its learning rate adapts to noise (LRA-CMA-ES, arXiv 2304.03473). It would do the mean of the
    distribution that it draws from.
    """

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int, *, sigma: float = 0.3) -> None:
        """Begin at doing nothing.

        Args:
            env: where it operates.
            seed: of prompts and candidates.
            sigma: spread of the first candidates, > 0.

        Raises:
            ImportError: if ``cmaes`` is not installed.
        """
        try:
            from cmaes import CMA
        except ImportError as error:
            raise ImportError(
                "surgeon cma_es needs cmaes: pip install 'avatarl-env[search]'"
            ) from error
        n = len(env.operator.labels)
        super().__init__(env, seed, least=4 + int(3 * math.log(n)))
        self._search = CMA(
            mean=np.zeros(n),
            sigma=sigma,
            bounds=np.tile([-1.0, 1.0], (n, 1)),
            seed=seed,
            population_size=self._population,
            lr_adapt=True,
        )

    def _ask(self, n: int) -> Array:
        return np.stack([self._search.ask() for _ in range(n)])

    def _tell(self, candidates: Array, returns: Array) -> None:
        self._search.tell(list(zip(candidates, (-returns).tolist(), strict=True)))  # it minimises

    def _best(self) -> Array:
        mean: Array = np.clip(self._search.mean, -1.0, 1.0)
        return mean


class HillClimbSurgeon(SearchSurgeon):
    """Evolution strategy with antithetic pairs: ``c + sigma * e`` and ``c - sigma * e``.

    ``c <- c + learning_rate * mean_i(d_i * e_i) / rms(d)``, where d_i is the difference of the
    returns of pair i (SPSA, Spall 1992; Salimans et al., arXiv 1703.03864).
    """

    def __init__(
        self,
        env: AttentionSurgeryVectorEnv,
        seed: int,
        *,
        sigma: float = 0.2,
        learning_rate: float = 0.2,
    ) -> None:
        """Begin at doing nothing.

        Args:
            env: where it operates.
            seed: of prompts and candidates.
            sigma: length of the trials, > 0.
            learning_rate: length of the steps, > 0.
        """
        super().__init__(env, seed, least=8)
        self._rng = np.random.default_rng(seed)
        self._sigma, self._learning_rate = sigma, learning_rate
        self._centre = np.zeros(len(env.operator.labels))

    def _ask(self, n: int) -> Array:
        self._noise = self._rng.standard_normal((n // 2, len(self._centre)))
        trials = self._centre + self._sigma * np.concatenate([self._noise, -self._noise])
        return np.clip(trials, -1.0, 1.0)

    def _tell(self, candidates: Array, returns: Array) -> None:
        up, down = np.split(returns, 2)
        size = np.sqrt(np.mean((up - down) ** 2))
        if size > 0:
            slope = ((up - down)[:, None] * self._noise).mean(0) / size
            self._centre = np.clip(self._centre + self._learning_rate * slope, -1.0, 1.0)

    def _best(self) -> Array:
        return self._centre
