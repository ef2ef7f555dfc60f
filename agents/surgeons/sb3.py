"""One adapter that makes any Stable-Baselines3 algorithm a surgeon."""

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
from agents.surgeons.base import Surgeon, prompt_seed
from agents.surgeons.episodes import (
    BoolArray,
    EpisodeRecord,
    EpisodeRecorder,
    FloatArray,
    require_same_step,
)
from agents.surgeons.randomness import PrivateRandomness
from agents.surgeons.stored import check_like, fill, filled, read_into
from avatarl_env.files import read_json, write_atomically
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer

__all__ = ["ALGORITHMS", "SB3Surgeon"]

ZIP, NORMALISATION = "surgeon.zip", "surgeon_normalisation.json"
COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
LARGEST_WEIGHT = 1e6  # far above the weights of healthy networks
# Deterministic, and not slower than a GPU for networks of this size.
DEVICE = "cpu"


class SB3Surgeon(Surgeon):
    """An algorithm of Stable-Baselines3, or with its interface, as a surgeon."""

    def __init__(
        self, name: str, env: AttentionSurgeryVectorEnv, seed: int, /, **options: Any
    ) -> None:
        """Build the algorithm.

        Args:
            name: a key of `ALGORITHMS`.
            env: its environment.
            seed: of the algorithm and of the environment's prompts.
            **options: override the table's settings; see `settings_of`.

        Raises:
            ImportError: if the library is not installed.
            ValueError: if an option is unknown, or a value does not fit.
        """
        from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

        from agents.surgeons.vec_env import SB3VecEnv

        super().__init__(env, seed)
        algorithm = ALGORITHMS[name]
        settings = settings_of(name, env, options)
        require_same_step(env, "for Stable-Baselines3")
        self._recorder = EpisodeRecorder(env)
        self._seed = seed
        self._memory: Any = None  # of a recurrent policy, between calls of act()
        self._learning_starts: int = settings.get("learning_starts", 0)
        self._randomness = PrivateRandomness(seed)
        with self._randomness.use():
            # Observations are scaled to mean 0 and variance 1, rewards (hundredths of a nat) too.
            self._env = VecNormalize(
                VecMonitor(SB3VecEnv(self._recorder)), gamma=settings.get("gamma", GAMMA)
            )
            self.model: BaseAlgorithm = class_of(algorithm)(
                algorithm.policy, self._env, seed=seed, device=DEVICE, **settings
            )
            # SB3 gives prompts and first actions the same seed, which would make them dependent.
            self._env.seed(prompt_seed(seed))
        self._silence()

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Perform whole operations on every row, starting with a reset, and learn from them.

        Raises:
            DivergedError: if the networks have diverged.
        """
        # SB3 keeps the last observation between calls of learn(). It is of an earlier language
        # model: continuing from it would reward the surgeon for the model's own progress.
        self.model._last_obs = None
        try:
            with self._randomness.use():
                self.model.learn(
                    n_operations * self.episode_length * self.env.num_envs,
                    log_interval=None,  # type: ignore[arg-type]  # never
                    reset_num_timesteps=False,
                )
        except ValueError as error:  # from torch's distributions or our check of actions
            self._refuse_diverged(error)
            raise
        self._refuse_diverged()
        return self._recorder.collect()

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return deterministic actions (N, A) for observations (N, O)."""
        if begins.all():
            self._memory = None
        normalised = np.asarray(self._env.normalize_obs(observations))
        with self._randomness.use():
            actions, self._memory = self.model.predict(
                normalised, self._memory, episode_start=begins, deterministic=True
            )
        return np.asarray(actions, dtype=np.float32)

    def stats(self) -> Mapping[str, float]:
        """Return the algorithm's latest losses (`surgeon/actor_loss`, ...).

        An off-policy algorithm also has the number of transitions in its replay buffer.
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

        `BaseAlgorithm.load` reads the zip too, by unpickling; `load` here does not unpickle.
        """
        archive = io.BytesIO()  # torch would hide the error of a full disk
        self.model.save(archive)
        write_atomically(folder / ZIP, archive.getvalue())
        write_atomically(folder / NORMALISATION, json.dumps(self._normalisation()) + "\n")

    def load(self, folder: Path) -> None:
        """Read the files of another surgeon of this kind; nothing is unpickled.

        The replay buffer starts empty, so an off-policy algorithm first collects new operations,
        with new random numbers.

        Raises:
            Exception: of any type if a file is missing, damaged, or of a surgeon of another kind or
                size (`load_surgeon` turns it into a ValueError).
        """
        content, own = read_json(folder / NORMALISATION), self._normalisation()
        sizes = content.get("sizes")
        if sizes != own["sizes"]:
            raise ValueError(f"its sizes must be {own['sizes']}, got {sizes}")
        check_like(content, own, NORMALISATION)
        with self._randomness.use():
            read_into(self.model, folder / ZIP)
        for name in COUNTERS:
            setattr(self.model, name, content["counters"][name])
        for prefix, scale in self._scales().items():
            scale.mean, scale.var = (np.array(content[prefix + part]) for part in ("mean", "var"))
            scale.count = content[f"{prefix}count"]
        if hasattr(self.model, "weights"):  # ARS's own copy
            parameters = nn.utils.parameters_to_vector(self.model.policy.parameters())
            self.model.weights = parameters.detach()
        n_done = self.model.num_timesteps
        if self._buffer is not None:
            self._buffer.reset()
            self.model.learning_starts = self._learning_starts + n_done  # type: ignore[attr-defined]
        # A seed that depends on the progress: the surgeon's own would repeat the exploration.
        seed = int(np.random.SeedSequence([self._seed, n_done]).generate_state(1)[0] >> 1)
        self._randomness = PrivateRandomness(seed)
        self.model.action_space.seed(seed)
        self._env.seed(prompt_seed(seed))
        self._silence()

    def get_state(self) -> dict[str, Any]:
        """Return the contents of the replay buffer and the states of all generators."""
        buffer = self._buffer
        return {
            "generators": self._randomness.get_state(),
            "actions": dict(self.model.action_space.np_random.bit_generator.state),
            "rows": self.env.get_rng_state(),
            "seeds": list(self._env.unwrapped._seeds),  # of the next reset; None after the first
            "learning_starts": getattr(self.model, "learning_starts", None),
            "buffer": None if buffer is None else filled(buffer),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state, after `load`."""
        self._randomness.set_state(state["generators"])
        self.model.action_space.np_random.bit_generator.state = state["actions"]
        self.env.set_rng_state(state["rows"])
        self._env.unwrapped._seeds = list(state["seeds"])
        if self._buffer is not None:
            self.model.learning_starts = int(state["learning_starts"])  # type: ignore[attr-defined]
            fill(self._buffer, state["buffer"])

    @property
    def _buffer(self) -> ReplayBuffer | None:
        """Replay buffer of an off-policy algorithm."""
        buffer: ReplayBuffer | None = getattr(self.model, "replay_buffer", None)
        return buffer

    def _scales(self) -> dict[str, Any]:
        """Return the running statistics of observations and of returns, by prefix."""
        return {"": self._env.obs_rms, "return_": self._env.ret_rms}

    def _normalisation(self) -> dict[str, Any]:
        """Return sizes, running statistics and counters, for JSON."""
        spaces = {"observation": self._env.observation_space, "action": self._env.action_space}
        return {
            "sizes": {name: math.prod(space.shape or ()) for name, space in spaces.items()},
            **{
                prefix + part: np.asarray(getattr(scale, part)).tolist()
                for prefix, scale in self._scales().items()
                for part in ("mean", "var", "count")
            },
            "counters": {name: getattr(self.model, name) for name in COUNTERS},
        }

    def _refuse_diverged(self, error: Exception | None = None) -> None:
        """Raise a DivergedError if a weight is not finite or is far too large."""
        for name, p in self.model.policy.named_parameters():
            if not (p.detach().abs() <= LARGEST_WEIGHT).all():
                raise DivergedError(
                    f"the surgeon's {name} must be numbers of at most {LARGEST_WEIGHT:g} in size, "
                    f"got others after {self.model.num_timesteps} steps; its learning_rate may be "
                    "too high"
                ) from error

    def _silence(self) -> None:
        """Keep the algorithm from printing its metrics."""
        from stable_baselines3.common.logger import Logger

        self.model.set_logger(Logger(folder=None, output_formats=[]))
