"""Stable-Baselines3 algorithms as surgeons: one adapter for all of them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from agents.errors import DivergedError
from agents.surgeons.algorithms import ALGORITHMS, GAMMA, class_of, settings_of
from agents.surgeons.base import (
    BoolArray,
    EpisodeRecord,
    EpisodeRecorder,
    FloatArray,
    ask_for_same_step,
    prompt_seed,
)
from agents.surgeons.randomness import PrivateRandomness
from agents.surgeons.stored import COUNTERS, fill, filled, read_into, read_normalisation
from avatarl_env.files import write_atomically
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.running_mean_std import RunningMeanStd

__all__ = ["ALGORITHMS", "SB3Surgeon"]

ZIP, NORMALISATION = "surgeon.zip", "surgeon_normalisation.json"
LARGEST_WEIGHT = 1e6  # healthy networks are far below
# Two runs of one seed are equal on the CPU; nets of this size are no faster elsewhere.
DEVICE = "cpu"


class SB3Surgeon:
    """An algorithm of Stable-Baselines3, or made like them, that learns from whole operations."""

    def __init__(
        self, name: str, env: AttentionSurgeryVectorEnv, seed: int, /, **options: Any
    ) -> None:
        """Build the algorithm.

        Args:
            name: a key of `ALGORITHMS`.
            env: where it operates, on all rows at once.
            seed: of the algorithm and of the environment's prompts.
            **options: the algorithm's own keyword arguments, over the table's; `action_noise`
                may be a number, the spread of a normal distribution.

        Raises:
            ImportError: if the library is not installed.
            ValueError: if the algorithm has no such option, or one does not fit.
        """
        from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

        from agents.surgeons.vec_env import SB3VecEnv

        algorithm = ALGORITHMS[name]
        settings = settings_of(name, env, options)
        ask_for_same_step(env, "for Stable-Baselines3")
        self._vector = env
        self._recorder = EpisodeRecorder(env)
        self._steps_per_operation = env.num_envs * env.config.episode_length
        self._seed = seed
        self._states: Any = None  # of a recurrent policy, between calls of act()
        self._randomness = PrivateRandomness(seed)
        # What is this environment's, wherever the rest was learned.
        own = (*algorithm.rollout, "action_noise", "learning_starts")
        self._own = {option: settings[option] for option in own if option in settings}
        with self._randomness.use():
            # Observations by running mean and spread, rewards (hundredths of a nat) by spread.
            self._env = VecNormalize(
                VecMonitor(SB3VecEnv(self._recorder)), gamma=settings.get("gamma", GAMMA)
            )
            self.model: BaseAlgorithm = class_of(algorithm)(
                algorithm.policy, self._env, seed=seed, device=DEVICE, **settings
            )
            # SB3 gives prompts and first actions one seed: they would be made of the same dice.
            self._env.seed(prompt_seed(seed))
        self._silence()

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Perform so many whole operations on every row, beginning afresh, and learn from them.

        Raises:
            DivergedError: if that left the networks with weights that nothing can be learned from.
        """
        # SB3 keeps the last observation between calls of learn(). It belongs to the model as it
        # was then: going on from it would pay the model's own progress out to the surgeon.
        self.model._last_obs = None
        try:
            with self._randomness.use():
                self.model.learn(
                    n_operations * self._steps_per_operation,
                    log_interval=None,  # type: ignore[arg-type]  # never, says the code
                    reset_num_timesteps=False,
                )
        except ValueError as error:  # torch's of distributions, ours of actions
            self._refuse_diverged(error)
            raise
        self._refuse_diverged()
        return self._recorder.collect()

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return the deterministic actions (N, A) for observations (N, O)."""
        if begins.all():
            self._states = None
        normalised = np.asarray(self._env.normalize_obs(observations))
        with self._randomness.use():
            actions, self._states = self.model.predict(
                normalised, self._states, episode_start=begins, deterministic=True
            )
        return np.asarray(actions, dtype=np.float32)

    def stats(self) -> Mapping[str, float]:
        """Return the algorithm's latest losses, `surgeon/actor_loss` and so on.

        And how many transitions it remembers, if it is off-policy and has any.
        """
        stats = {
            key.replace("train/", "surgeon/"): float(value)
            for key, value in self.model.logger.name_to_value.items()
            if key.startswith("train/")
        }
        buffer = self._buffer
        if buffer is not None and buffer.size():
            stats["surgeon/replay_buffer_size"] = float(buffer.size() * buffer.n_envs)
        return stats

    def save(self, folder: Path) -> None:
        """Write `surgeon.zip` and `surgeon_normalisation.json` into an existing folder.

        The first is what `BaseAlgorithm.load` reads. That unpickles; `load` does not.
        """
        archive = io.BytesIO()  # written by us, for torch hides that a disk is full
        self.model.save(archive)
        write_atomically(folder / ZIP, archive.getvalue())
        observations, returns = self._normalisations()
        content = {
            "sizes": self._sizes(),
            "mean": observations.mean.tolist(),
            "var": observations.var.tolist(),
            "count": float(observations.count),
            "return_mean": float(returns.mean),
            "return_var": float(returns.var),
            "return_count": float(returns.count),
            "counters": {name: getattr(self.model, name) for name in COUNTERS},
        }
        write_atomically(folder / NORMALISATION, json.dumps(content) + "\n")

    def load(self, folder: Path) -> None:
        """Take over what another surgeon of this kind wrote; nothing is unpickled.

        The replay buffer starts empty, so an off-policy algorithm first collects new operations.
        The random numbers are new too: they do not repeat those of the surgeon that was saved.

        Raises:
            ValueError: if a file is missing, damaged, of an earlier format, or of a surgeon of
                another kind or size.
        """
        observations, returns = self._normalisations()
        content = read_normalisation(folder / NORMALISATION, self._sizes())
        with self._randomness.use():
            read_into(self.model, folder / ZIP)
        for name in COUNTERS:
            setattr(self.model, name, content["counters"][name])
        if hasattr(self.model, "weights"):  # ARS's own copy
            self.model.weights = nn.utils.parameters_to_vector(
                self.model.policy.parameters()
            ).detach()
        if self._buffer is not None:
            self._buffer.reset()
        n_done = self.model.num_timesteps
        if "learning_starts" in self._own:
            self.model.learning_starts = self._own["learning_starts"] + n_done  # type: ignore[attr-defined]
        # A seed of its own for where it is: the same again would repeat what was explored already.
        seed = int(np.random.SeedSequence([self._seed, n_done]).generate_state(1)[0] >> 1)
        self._randomness = PrivateRandomness(seed)
        self.model.action_space.seed(seed)
        self._env.seed(prompt_seed(seed))
        observations.mean = np.array(content["mean"])
        observations.var = np.array(content["var"])
        observations.count = content["count"]
        returns.mean = np.array(content["return_mean"])
        returns.var = np.array(content["return_var"])
        returns.count = content["return_count"]
        self._silence()

    def get_state(self) -> dict[str, Any]:
        """Return the replay buffer, as far as it is filled, and where all dice stand."""
        buffer = self._buffer
        return {
            "generators": self._randomness.get_state(),
            "actions": dict(self.model.action_space.np_random.bit_generator.state),
            "rows": self._vector.get_rng_state(),
            "seeds": list(self._env.unwrapped._seeds),  # for the next reset, mostly none
            "learning_starts": getattr(self.model, "learning_starts", None),
            "buffer": None if buffer is None else filled(buffer),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._randomness.set_state(state["generators"])
        self.model.action_space.np_random.bit_generator.state = state["actions"]
        self._vector.set_rng_state(state["rows"])
        self._env.unwrapped._seeds = list(state["seeds"])
        if self._buffer is not None:
            self.model.learning_starts = int(state["learning_starts"])  # type: ignore[attr-defined]
            fill(self._buffer, state["buffer"])

    @property
    def _buffer(self) -> ReplayBuffer | None:
        """What an off-policy algorithm remembers."""
        buffer: ReplayBuffer | None = getattr(self.model, "replay_buffer", None)
        return buffer

    def _sizes(self) -> dict[str, int]:
        """Return the sizes that a surgeon is made for."""
        spaces = {"observation": self._env.observation_space, "action": self._env.action_space}
        return {name: math.prod(space.shape or ()) for name, space in spaces.items()}

    def _normalisations(self) -> tuple[RunningMeanStd, RunningMeanStd]:
        """Return the running statistics of observations and of returns."""
        from stable_baselines3.common.running_mean_std import RunningMeanStd

        assert isinstance(self._env.obs_rms, RunningMeanStd)
        return self._env.obs_rms, self._env.ret_rms

    def _refuse_diverged(self, error: Exception | None = None) -> None:
        """Raise a DivergedError if a weight is no number, or as large as none ought to be."""
        for name, p in self.model.policy.named_parameters():
            if not (p.detach().abs() <= LARGEST_WEIGHT).all():
                raise DivergedError(
                    f"the surgeon's {name} must be numbers of at most {LARGEST_WEIGHT:g} in size, "
                    f"got others after {self.model.num_timesteps} steps; its learning_rate may be "
                    "too high"
                ) from error

    def _silence(self) -> None:
        """Let the algorithm keep its figures without printing them."""
        from stable_baselines3.common.logger import Logger

        self.model.set_logger(Logger(folder=None, output_formats=[]))
