"""Open-loop surgeons, which search for one operation that is the same for every patient.

The best constant operation is a baseline for surgeons that use their observations.

Shapes: N rows, A coefficients, P candidates of a generation.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.errors import import_extra
from agents.surgeons.base import Surgeon, prompt_seed
from agents.surgeons.episodes import (
    BoolArray,
    EpisodeRecord,
    FloatArray,
    play,
    require_same_step,
)
from avatarl_env.episode import step_coefficients
from avatarl_env.files import read_json, write_atomically
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from cmaes import CMA

Array = NDArray[np.float64]

FILE = "surgeon_search.json"


class Approach:
    """Open-loop policy that moves every row to its goal in the fewest steps and stays there."""

    def __init__(self, goals: Array, step_size: float, reach: float) -> None:
        """Set the goals (N, A), coefficients in [-reach, reach]."""
        self.goals = goals
        self._step_size = step_size
        self._reach = reach
        self._reached = np.zeros_like(goals)

    def __call__(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the next actions (N, A), exactly 0 at the goal."""
        self._reached[begins] = 0.0
        way = (self.goals - self._reached) / self._step_size
        way[np.abs(way) < 1e-6] = 0.0  # actions are float32
        actions: FloatArray = np.clip(way, -1.0, 1.0).astype(np.float32)
        self._reached = step_coefficients(self._reached, actions, self._step_size, self._reach)
        return actions


class SearchSurgeon(Surgeon):
    """Evaluates candidates (A,), one on each row, and moves towards the better ones.

    All candidates of a generation have the same prompts and noise, so that only the operations
    differ. A generation takes one operation on every row, or several if there are few rows.
    """

    def __init__(
        self, env: AttentionSurgeryVectorEnv, seed: int, least: int, **options: float
    ) -> None:
        """Start at zero.

        Args:
            env: its environment.
            seed: of prompts and candidates.
            least: smallest number of candidates in a generation.
            **options: of the search; a stored search must have the same.
        """
        super().__init__(env, seed)
        self._reach = env.config.max_coefficient
        self._seed = seed
        self._rounds = math.ceil(least / env.num_envs)
        if env.num_envs * self._rounds % 2:  # candidates may come in pairs
            self._rounds += 1
        self._population = env.num_envs * self._rounds
        self._about = {
            "coefficients": self.n_coefficients,
            "population": self._population,
            "seed": seed,
            **options,
        }
        self._approach = self._towards(np.zeros((0, self.n_coefficients)))
        self._restart()

    @abstractmethod
    def _restart(self) -> None:
        """Reset the search to its start."""
        self._prompt_rng = np.random.default_rng(prompt_seed(self._seed))
        self._generations: list[list[float]] = []

    @abstractmethod
    def _ask(self, n: int) -> Array:
        """Return new candidates (n, A) in [-1, 1], n even."""

    @abstractmethod
    def _tell(self, candidates: Array, returns: Array) -> None:
        """Learn from the returns (n,) of the last candidates."""

    @abstractmethod
    def _best(self) -> Array:
        """Return the best operation so far, (A,) in [-1, 1]."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Evaluate whole generations, at least `n_operations` operations on every row.

        Only returns of one generation are compared: the language model may change between calls.
        """
        require_same_step(self.env, "to search")
        records = []
        for _ in range(math.ceil(n_operations / self._rounds)):
            candidates = self._ask(self._population)
            seed = int(self._prompt_rng.integers(2**31))  # of the generation's prompts
            returns: list[float] = []
            for goals in np.split(candidates, self._rounds):
                seeds = [seed] * self.env.num_envs
                tried = play(self.env, self._towards(goals), seeds)
                returns += [r.total for r in sorted(tried, key=lambda record: record.row)]
                records += tried
            self._tell(candidates, np.array(returns))
            self._generations.append(returns)
        return records

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the next steps (N, A) towards the best operation so far."""
        if len(self._approach.goals) != len(observations):
            self._approach = self._towards(np.zeros((len(observations), self.n_coefficients)))
        self._approach.goals = np.broadcast_to(self._best(), self._approach.goals.shape)
        return self._approach(observations, begins)

    def stats(self) -> Mapping[str, float]:
        """Return the number of generations so far."""
        return {"surgeon/generations": float(len(self._generations))}

    def save(self, folder: Path) -> None:
        """Write the returns of all candidates in each generation, and the best operation."""
        content = {
            "about": self._about,
            "generations": self._generations,
            "best": self._best().tolist(),
        }
        write_atomically(folder / FILE, json.dumps(content) + "\n")

    def load(self, folder: Path) -> None:
        """Repeat a stored search with its returns.

        Raises:
            ValueError: if it has other options, or its result is not reproduced, which can happen
                with another version of a library.
        """
        content = read_json(folder / FILE)
        for name, value in self._about.items():
            if content["about"][name] != value:
                raise ValueError(
                    f"{name} must be {content['about'][name]}, as in the stored search, got {value}"
                )
        self._restart()
        self._generations = content["generations"]
        for returns in self._generations:
            self._tell(self._ask(self._population), np.array(returns))
            self._prompt_rng.integers(2**31)
        if not np.allclose(self._best(), content["best"], rtol=0.0, atol=1e-6):
            raise ValueError(
                f"{FILE} must lead to the operation stored in it: it was written with another "
                "version of a library"
            )

    def _towards(self, goals: Array) -> Approach:
        return Approach(goals, self.env.config.step_size, self._reach)


class CMAESSurgeon(SearchSurgeon):
    """Covariance matrix adaptation by the library `cmaes`.

    The learning rate adapts to noise (LRA-CMA-ES, arXiv 2304.03473). The best operation is the mean
    of the search distribution.
    """

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int, *, sigma: float = 0.3) -> None:
        """Start at zero.

        Args:
            env: its environment.
            seed: of prompts and candidates.
            sigma: standard deviation of the first candidates, at least 1e-6.

        Raises:
            ImportError: if `cmaes` is not installed.
        """
        self._sigma = sigma
        n = len(env.operator.labels)
        super().__init__(env, seed, 4 + int(3 * math.log(n)), sigma=sigma)

    def _restart(self) -> None:
        super()._restart()
        n = self.n_coefficients
        self._search: CMA = import_extra("cmaes", "search", "surgeon cma_es").CMA(
            mean=np.zeros(n),
            sigma=self._sigma,
            bounds=np.tile([-self._reach, self._reach], (n, 1)),
            seed=self._seed,
            population_size=self._population,
            lr_adapt=True,
        )

    def _ask(self, n: int) -> Array:
        return np.stack([self._search.ask() for _ in range(n)])

    def _tell(self, candidates: Array, returns: Array) -> None:
        self._search.tell(list(zip(candidates, (-returns).tolist(), strict=True)))  # it minimises

    def _best(self) -> Array:
        mean: Array = np.clip(self._search.mean, -self._reach, self._reach)
        return mean


class EvolutionStrategySurgeon(SearchSurgeon):
    """Evolution strategy with antithetic pairs: `c + sigma * e` and `c - sigma * e`.

    `c <- c + learning_rate * mean_i(d_i * e_i) / rms(d)`, where d_i is the difference between the
    returns of pair i (Salimans et al., arXiv 1703.03864; with one pair SPSA, Spall 1992).
    Candidates are clipped to the reach; e_i is half the difference of the clipped pair over sigma.
    """

    def __init__(
        self,
        env: AttentionSurgeryVectorEnv,
        seed: int,
        *,
        sigma: float = 0.2,
        learning_rate: float = 0.2,
    ) -> None:
        """Start at zero.

        Args:
            env: its environment.
            seed: of prompts and candidates.
            sigma: standard deviation of the candidates in each coefficient, at least 1e-6.
            learning_rate: at least 0. About the length of a step if the score is linear and there
                are many pairs; pure noise gives steps of `learning_rate * sqrt(2 A / P)`, so steps
                do not become shorter at an optimum.
        """
        self._sigma, self._learning_rate = sigma, learning_rate
        super().__init__(env, seed, 8, sigma=sigma, learning_rate=learning_rate)

    def _restart(self) -> None:
        super()._restart()
        self._rng = np.random.default_rng(self._seed)
        self._centre: Array = np.zeros(self.n_coefficients)

    def _ask(self, n: int) -> Array:
        noise = self._sigma * self._rng.standard_normal((n // 2, self.n_coefficients))
        pairs = np.stack([self._centre + noise, self._centre - noise], axis=1)  # (n / 2, 2, A)
        return np.clip(pairs.reshape(n, self.n_coefficients), -self._reach, self._reach)

    def _tell(self, candidates: Array, returns: Array) -> None:
        noise = (candidates[0::2] - candidates[1::2]) / (2 * self._sigma)
        better = returns[0::2] - returns[1::2]
        size = np.sqrt(np.mean(better**2))
        if size > 0:
            slope = (better[:, None] * noise).mean(0) / size
            centre = self._centre + self._learning_rate * slope
            self._centre = np.clip(centre, -self._reach, self._reach)

    def _best(self) -> Array:
        return self._centre
