"""Surgeons that search for one operation: the same steps whatever the model does.

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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agents.extras import import_extra
from agents.surgeons.base import (
    BoolArray,
    EpisodeRecord,
    EpisodeRecorder,
    FloatArray,
    check_positive,
    prompt_seed,
)
from avatarl_env.episode import step_coefficients
from avatarl_env.files import read_json, write_atomically
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from cmaes import CMA

Array = NDArray[np.float64]

FILE = "surgeon_search.json"


class SearchSurgeon(ABC):
    """Tries candidates (A,), one on each row, and moves to where the better ones were.

    All candidates of a generation continue the same prompts with the same dice, so that only the
    operations differ. A generation has one candidate for each row, or several where rows are few.
    """

    def __init__(
        self, env: AttentionSurgeryVectorEnv, seed: int, least: int, **options: float
    ) -> None:
        """Begin at doing nothing; called by the searches.

        Args:
            env: where it operates.
            seed: of prompts and candidates.
            least: candidates that a generation needs.
            **options: the search's own numbers, all positive.

        Raises:
            ValueError: if one of them is not.
        """
        for name, value in options.items():
            check_positive(name, value)
        self._recorder = EpisodeRecorder(env)
        self._step_size = env.config.step_size
        self._reach = env.config.max_coefficient
        self._episode_length = env.config.episode_length
        self._n_rows = env.num_envs
        self._n_coefficients = len(env.operator.labels)
        self._rounds = math.ceil(least / self._n_rows)
        if self._n_rows * self._rounds % 2:  # candidates may come in pairs
            self._rounds += 1
        self._population = self._n_rows * self._rounds
        self._seed = seed
        self._about = {
            "coefficients": self._n_coefficients,
            "population": self._population,
            "seed": seed,
            **options,
        }
        self._prompt_rng = np.random.default_rng(prompt_seed(seed))
        self._generations: list[list[float]] = []
        self._reached: Array = np.zeros((0, self._n_coefficients))

    @abstractmethod
    def _begin(self) -> None:
        """Be as new: nothing asked for, nothing told."""

    @abstractmethod
    def _ask(self, n: int) -> Array:
        """Return new candidates (n, A) in [-1, 1], n even."""

    @abstractmethod
    def _tell(self, candidates: Array, returns: Array) -> None:
        """Learn the returns (n,) of what was asked for last."""

    @abstractmethod
    def _best(self) -> Array:
        """Return what it would do, (A,) in [-1, 1]."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Perform so many whole operations on every row, or as many as fill whole generations.

        The language model may learn between two calls: returns of before and after are not
        compared.
        """
        for _ in range(math.ceil(n_operations / self._rounds)):
            candidates = self._ask(self._population)
            seed = int(self._prompt_rng.integers(2**31))  # of the generation's prompts
            parts = np.split(candidates, self._rounds)
            returns = [total for part in parts for total in self._perform(part, seed)]
            self._tell(candidates, np.array(returns))
            self._generations.append(returns)
        return self._recorder.collect()

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the next steps (N, A) towards the best operation so far."""
        if len(self._reached) != len(observations):
            self._reached = np.zeros((len(observations), self._n_coefficients))
        self._reached[begins] = 0.0
        actions = self._towards(np.broadcast_to(self._best(), self._reached.shape), self._reached)
        self._reached = step_coefficients(self._reached, actions, self._step_size, self._reach)
        return actions

    def stats(self) -> Mapping[str, float]:
        """Return how many generations there were."""
        return {"surgeon/generations": float(len(self._generations))}

    def save(self, folder: Path) -> None:
        """Write what the candidates of each generation returned, and where that led."""
        content = {
            "about": self._about,
            "generations": self._generations,
            "best": self._best().tolist(),
        }
        write_atomically(folder / FILE, json.dumps(content) + "\n")

    def load(self, folder: Path) -> None:
        """Go through another's generations anew; what this one has found is forgotten.

        Raises:
            ValueError: if the other was made for something else, or with other options, or if its
                generations lead elsewhere now, as another version of a library may make them.
        """
        content = read_json(folder / FILE)
        for name, value in self._about.items():
            if content["about"][name] != value:
                raise ValueError(
                    f"{name} must be {content['about'][name]}, as when the search was saved, "
                    f"got {value}"
                )
        self._begin()
        self._prompt_rng = np.random.default_rng(prompt_seed(self._seed))
        self._generations = content["generations"]
        for returns in self._generations:
            self._tell(self._ask(self._population), np.array(returns))
            self._prompt_rng.integers(2**31)
        if not np.allclose(self._best(), content["best"], rtol=0.0, atol=1e-6):
            raise ValueError(
                f"{folder / FILE} must lead where it led when it was saved: is a library of "
                "another version?"
            )

    def get_state(self) -> dict[str, Any]:
        """Return nothing: a generation ends with the round, and each has prompts of its own."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""
        assert not state

    def _perform(self, goals: Array, seed: int) -> list[float]:
        """Operate towards `goals` (N, A), each row on the same prompts; return the returns."""
        self._recorder.reset(seed=[seed] * self._n_rows)
        reached, totals = np.zeros_like(goals), np.zeros(len(goals))
        is_open = np.ones(len(goals), dtype=np.bool_)
        for _ in range(self._episode_length):
            # A row whose patient died has begun another operation: it does nothing there.
            actions = np.where(is_open[:, None], self._towards(goals, reached), np.float32(0))
            reached = step_coefficients(reached, actions, self._step_size, self._reach)
            _, rewards, terminated, truncated, _ = self._recorder.step(actions)
            totals += np.where(is_open, rewards, 0.0)
            is_open &= ~(terminated | truncated)
        return [float(total) for total in totals]

    def _towards(self, goals: Array, reached: Array) -> FloatArray:
        """Return the steps that lead furthest towards the goals; exactly 0 once there."""
        way = (goals - reached) / self._step_size
        way[np.abs(way) < 1e-6] = 0.0  # actions are float32
        return np.clip(way, -1.0, 1.0).astype(np.float32)


class CMAESSurgeon(SearchSurgeon):
    """Covariance matrix adaptation, by the library `cmaes`.

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
            ImportError: if `cmaes` is not installed.
            ValueError: if sigma is not positive.
        """
        n = len(env.operator.labels)
        super().__init__(env, seed, 4 + int(3 * math.log(n)), sigma=sigma)
        self._sigma = sigma
        self._search = self._new()

    def _new(self) -> CMA:
        n = self._n_coefficients
        search: CMA = import_extra("cmaes", "search", "surgeon cma_es").CMA(
            mean=np.zeros(n),
            sigma=self._sigma,
            bounds=np.tile([-self._reach, self._reach], (n, 1)),
            seed=self._seed,
            population_size=self._population,
            lr_adapt=True,
        )
        return search

    def _begin(self) -> None:
        self._search = self._new()

    def _ask(self, n: int) -> Array:
        return np.stack([self._search.ask() for _ in range(n)])

    def _tell(self, candidates: Array, returns: Array) -> None:
        self._search.tell(list(zip(candidates, (-returns).tolist(), strict=True)))  # it minimises

    def _best(self) -> Array:
        mean: Array = np.clip(self._search.mean, -self._reach, self._reach)
        return mean


class EvolutionStrategySurgeon(SearchSurgeon):
    """Evolution strategy with antithetic pairs: `c + sigma * e` and `c - sigma * e`.

    `c <- c + learning_rate * mean_i(d_i * e_i) / rms(d)`, where d_i is the difference of the
    returns of pair i (Salimans et al., arXiv 1703.03864; with one pair SPSA, Spall 1992). Trials
    are kept within reach, and e_i is half of the distance that this leaves between the two, over
    sigma.
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
            sigma: spread of the trials in each coefficient, > 0.
            learning_rate: > 0. A step is about so long where the score is a slope and pairs are
                many, and `learning_rate * sqrt(2 A / P)` where returns are mere noise: steps
                become no shorter where the score is flat.

        Raises:
            ValueError: if a number is not positive.
        """
        super().__init__(env, seed, 8, sigma=sigma, learning_rate=learning_rate)
        self._sigma, self._learning_rate = sigma, learning_rate
        self._rng = np.random.default_rng(seed)
        self._centre: Array = np.zeros(self._n_coefficients)

    def _begin(self) -> None:
        self._rng = np.random.default_rng(self._seed)
        self._centre = np.zeros(self._n_coefficients)

    def _ask(self, n: int) -> Array:
        noise = self._sigma * self._rng.standard_normal((n // 2, self._n_coefficients))
        pairs = np.stack([self._centre + noise, self._centre - noise], axis=1)  # (n / 2, 2, A)
        return np.clip(pairs.reshape(n, self._n_coefficients), -self._reach, self._reach)

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
