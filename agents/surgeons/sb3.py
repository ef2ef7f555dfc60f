"""Stable-Baselines3 algorithms as surgeons: one adapter, one table of defaults."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agents.surgeons.base import (
    BoolArray,
    FloatArray,
    OperationRecord,
    OperationRecorder,
    get_dice,
    prompt_seed,
    set_dice,
)
from agents.surgeons.randomness import PrivateRandomness
from avatarl_env.choices import check_choice
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.noise import ActionNoise
    from stable_baselines3.common.running_mean_std import RunningMeanStd

ZIP, NORMALISATION = "surgeon.zip", "surgeon_normalisation.json"
# An operation is a finite task of a few steps: nothing is discounted.
GAMMA = 1.0
# Two runs of one seed are equal on the CPU; nets of this size are no faster elsewhere.
DEVICE = "cpu"
# What the adapter decides.
FIXED = {"policy", "env", "seed", "device", "_init_setup_model", "tensorboard_log", "verbose"}


class Algorithm(NamedTuple):
    """Where an algorithm lives and how it is set up for short finite operations."""

    module: str
    name: str
    options: Mapping[str, Any]
    """Over the library's own defaults."""
    policy: str = "MlpPolicy"
    rollout: tuple[str, ...] = ()
    """Options that stand for the steps or transitions of one operation on every row."""


# An evaluation of the language model costs a hundred gradient steps of these nets.
_NETS: dict[str, Any] = {"net_arch": [128, 128]}
_OFF_POLICY = {
    "policy_kwargs": _NETS,
    "learning_rate": 1e-3,
    "batch_size": 256,
    # Old transitions tell of a language model that is no more.
    "buffer_size": 20_000,
    "learning_starts": 128,
    # After each incision on every row.
    "train_freq": (1, "step"),
    "gradient_steps": 16,
}
# Rewards are scaled to a spread of one; SB3's first coefficient, 1, drowns them.
_ENTROPY = {"ent_coef": "auto_0.1"}
# A deterministic policy has to be told to explore: the spread of a normal distribution.
_NOISE = {"action_noise": 0.5, "gradient_steps": 64, "learning_starts": 512}
# A spread of exp(-1) at first; of 1, SB3's, most actions would be clipped to -1 or 1.
_GAUSSIAN = {**_NETS, "log_std_init": -1.0}
_ON_POLICY = {
    "policy_kwargs": _GAUSSIAN,
    "learning_rate": 1e-3,
    # Operations are so short that whole returns are no noisier than what a critic thinks of them.
    "gae_lambda": 1.0,
}
_WHOLE = ("n_steps", "batch_size")

ALGORITHMS: dict[str, Algorithm] = {
    "sac": Algorithm("stable_baselines3", "SAC", {**_OFF_POLICY, **_ENTROPY}),
    # The critics have to be ahead: an actor that runs after young ones ends where tanh is flat.
    "td3": Algorithm("stable_baselines3", "TD3", {**_OFF_POLICY, **_NOISE, "policy_delay": 8}),
    "ddpg": Algorithm("stable_baselines3", "DDPG", {**_OFF_POLICY, **_NOISE}),
    "ppo": Algorithm("stable_baselines3", "PPO", _ON_POLICY, rollout=_WHOLE),
    "a2c": Algorithm(
        "stable_baselines3",
        "A2C",
        {**_ON_POLICY, "normalize_advantage": True},
        rollout=("n_steps",),
    ),
    "tqc": Algorithm("sb3_contrib", "TQC", {**_OFF_POLICY, **_ENTROPY}),
    "crossq": Algorithm("sb3_contrib", "CrossQ", {**_OFF_POLICY, **_ENTROPY}),
    "trpo": Algorithm("sb3_contrib", "TRPO", _ON_POLICY, rollout=_WHOLE),
    "ars": Algorithm(
        "sb3_contrib",
        "ARS",
        # One pair of policies an update, each tried on every row: rows are many, rounds few.
        {"n_delta": 1, "delta_std": 0.1, "learning_rate": 0.1},
        policy="LinearPolicy",
        rollout=("n_eval_episodes",),
    ),
    "recurrent_ppo": Algorithm(
        "sb3_contrib",
        "RecurrentPPO",
        {**_ON_POLICY, "policy_kwargs": {**_GAUSSIAN, "lstm_hidden_size": 64}},
        policy="MlpLstmPolicy",
        rollout=_WHOLE,
    ),
}
"""Algorithms by name; every entry is one of the registry's surgeons."""


class SB3Surgeon:
    """An algorithm of Stable-Baselines3, or made like them, that learns from whole operations."""

    def __init__(
        self, name: str, env: AttentionSurgeryVectorEnv, seed: int, **options: Any
    ) -> None:
        """Build the algorithm.

        Args:
            name: a key of :data:`ALGORITHMS`.
            env: where it operates, on all rows at once.
            seed: of the algorithm and of the environment's prompts.
            **options: the algorithm's own keyword arguments, over the table's; ``action_noise``
                may be a number, the spread of a normal distribution.

        Raises:
            ImportError: if the library is not installed.
            ValueError: if the algorithm has no such option.
        """
        from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

        from agents.surgeons.vec_env import SB3VecEnv

        algorithm = ALGORITHMS[name]
        make = _class_of(algorithm)
        for option in options:
            check_choice(f"{name} option", option, set(signature(make).parameters) - FIXED)
        self._vector = env
        self._recorder = OperationRecorder(env)
        self._steps_per_operation = env.num_envs * env.config.n_incisions
        self._seed = seed
        self._states: Any = None  # of a recurrent policy, between calls of act()
        self._randomness = PrivateRandomness(seed)
        # The libraries add to what they are given: copies, so that it stays as it is.
        settings = _settings(algorithm, env) | copy.deepcopy(options)
        if isinstance(settings.get("action_noise"), int | float):
            settings["action_noise"] = _noise(settings["action_noise"], len(env.operator.labels))
        with self._randomness.use():
            # Observations by running mean and spread, rewards (hundredths of a nat) by spread.
            self._env = VecNormalize(VecMonitor(SB3VecEnv(self._recorder)), gamma=GAMMA)
            self.model: BaseAlgorithm = make(
                algorithm.policy, self._env, seed=seed, device=DEVICE, **settings
            )
            # SB3 gives prompts and first actions one seed: they would be made of the same dice.
            self._env.seed(prompt_seed(seed))
        self._silence()

    def operate(self, n_operations: int) -> list[OperationRecord]:
        """Perform so many whole operations on every row, beginning afresh, and learn from them."""
        # SB3 keeps the last observation between calls of learn(). It belongs to the model as it
        # was then: going on from it would pay the model's own progress out to the surgeon.
        self.model._last_obs = None
        with self._randomness.use():
            self.model.learn(
                n_operations * self._steps_per_operation,
                log_interval=None,  # type: ignore[arg-type]  # never, says the code
                reset_num_timesteps=False,
            )
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
        """Return the algorithm's latest losses, ``surgeon/actor_loss`` and so on."""
        return {
            key.replace("train/", "surgeon/"): float(value)
            for key, value in self.model.logger.name_to_value.items()
            if key.startswith("train/")
        }

    def save(self, folder: Path) -> None:
        """Write ``surgeon.zip`` and ``surgeon_normalisation.json`` into an existing folder."""
        self.model.save(folder / ZIP)
        observations, returns = self._normalisations()
        content = {
            "mean": observations.mean.tolist(),
            "var": observations.var.tolist(),
            "count": float(observations.count),
            "return_mean": float(returns.mean),
            "return_var": float(returns.var),
            "return_count": float(returns.count),
        }
        path = folder / NORMALISATION
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what another surgeon of this kind wrote; past operations are not remembered."""
        content = json.loads((folder / NORMALISATION).read_text(encoding="utf-8"))
        with self._randomness.use():
            self.model = type(self.model).load(folder / ZIP, env=self._env, device=DEVICE)
            self._env.seed(prompt_seed(self._seed))  # loading has seeded the rows in its own way
        observations, returns = self._normalisations()
        observations.mean = np.array(content["mean"])
        observations.var = np.array(content["var"])
        observations.count = content["count"]
        returns.mean = np.array(content["return_mean"])
        returns.var = np.array(content["return_var"])
        returns.count = content["return_count"]
        self._silence()

    def get_state(self) -> dict[str, Any]:
        """Return the replay buffer, as far as it is filled, and where all dice stand."""
        buffer = getattr(self.model, "replay_buffer", None)
        return {
            "generators": self._randomness.get_state(),
            "actions": dict(self.model.action_space.np_random.bit_generator.state),
            "rows": get_dice(self._vector),
            "buffer": None if buffer is None else _filled(buffer),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._randomness.set_state(state["generators"])
        self.model.action_space.np_random.bit_generator.state = state["actions"]
        set_dice(self._vector, state["rows"])
        if state["rows"][0] is not None:  # the rows have been seeded
            self._env.unwrapped._reset_seeds()
        if state["buffer"] is not None:
            buffer = self.model.replay_buffer  # type: ignore[attr-defined]
            buffer.pos, buffer.full = state["buffer"]["pos"], state["buffer"]["full"]
            for name, rows in state["buffer"]["arrays"].items():
                getattr(buffer, name)[: len(rows)] = np.asarray(rows)

    def _normalisations(self) -> tuple[RunningMeanStd, RunningMeanStd]:
        """Return the running statistics of observations and of returns."""
        from stable_baselines3.common.running_mean_std import RunningMeanStd

        assert isinstance(self._env.obs_rms, RunningMeanStd)
        return self._env.obs_rms, self._env.ret_rms

    def _silence(self) -> None:
        """Let the algorithm keep its figures without printing them."""
        from stable_baselines3.common.logger import Logger

        self.model.set_logger(Logger(folder=None, output_formats=[]))


def _filled(buffer: ReplayBuffer) -> dict[str, Any]:
    """Return what a replay buffer holds."""
    n = buffer.buffer_size if buffer.full else buffer.pos
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    arrays = {name: getattr(buffer, name)[:n] for name in names}
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def _class_of(algorithm: Algorithm) -> Callable[..., BaseAlgorithm]:
    try:
        module = importlib.import_module(algorithm.module)
    except ImportError as error:
        raise ImportError(
            f"surgeon {algorithm.name} needs {algorithm.module}: pip install 'avatarl-env[contrib]'"
        ) from error
    made: Callable[..., BaseAlgorithm] = getattr(module, algorithm.name)
    return made


def _settings(algorithm: Algorithm, env: AttentionSurgeryVectorEnv) -> dict[str, Any]:
    """Return the table's options, with those that depend on the environment."""
    sizes = {
        "n_steps": env.config.n_incisions,
        "batch_size": env.num_envs * env.config.n_incisions,
        "n_eval_episodes": env.num_envs,
    }
    gamma = {"gamma": GAMMA} if "gamma" in signature(_class_of(algorithm)).parameters else {}
    options = copy.deepcopy(dict(algorithm.options))
    return {**gamma, **{name: sizes[name] for name in algorithm.rollout}, **options}


def _noise(spread: float, n_coefficients: int) -> ActionNoise:
    """Return normal noise for every coefficient."""
    from stable_baselines3.common.noise import NormalActionNoise

    return NormalActionNoise(np.zeros(n_coefficients), np.full(n_coefficients, float(spread)))
