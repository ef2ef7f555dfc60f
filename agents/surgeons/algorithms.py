"""Stable-Baselines3 algorithms as surgeons: the table and its settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agents.errors import import_extra
from agents.surgeons.base import check_options
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

# An operation is a finite task of a few steps, so nothing is discounted.
GAMMA = 1.0
# Arguments that the adapter sets.
FIXED = {"policy", "env", "seed", "device", "_init_setup_model", "tensorboard_log", "verbose"}


class Algorithm(NamedTuple):
    """An algorithm's class, and its settings for short finite operations."""

    module: str
    name: str
    options: Mapping[str, Any]
    """Differences from the library's defaults."""
    policy: str = "MlpPolicy"
    rollout: tuple[str, ...] = ()
    """Options whose default is the size of one operation on every row."""


# Small: an evaluation of the language model costs as much as a hundred gradient steps of these.
_NETS: dict[str, Any] = {"net_arch": [128, 128]}
_OFF_POLICY = {
    "gamma": GAMMA,
    "policy_kwargs": _NETS,
    "learning_rate": 1e-3,
    "batch_size": 256,
    # Small, since the language model changes and old transitions no longer hold.
    "buffer_size": 20_000,
    "learning_starts": 128,
    # After each step on every row.
    "train_freq": (1, "step"),
    "gradient_steps": 16,
}
# SB3's initial coefficient of 1 would dominate rewards, which have a standard deviation of 1.
_ENTROPY = {"ent_coef": "auto_0.1"}
# A deterministic policy explores by noise: the standard deviation of a normal distribution.
_NOISE = {"action_noise": 0.5, "gradient_steps": 64, "learning_starts": 512}
# Initial standard deviation exp(-1); with SB3's 1, many actions would be clipped to -1 or 1.
_GAUSSIAN = {**_NETS, "log_std_init": -1.0}
_ON_POLICY = {
    "gamma": GAMMA,
    "policy_kwargs": _GAUSSIAN,
    "learning_rate": 1e-3,
    # In short operations, returns are no noisier than a critic's estimates.
    "gae_lambda": 1.0,
}
_WHOLE = ("n_steps", "batch_size")

ALGORITHMS: dict[str, Algorithm] = {
    "sac": Algorithm("stable_baselines3", "SAC", {**_OFF_POLICY, **_ENTROPY}),
    # The critics must learn first: an actor that follows untrained critics saturates its tanh.
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
        # One pair of policies per update, each evaluated on every row: rows are many, rounds few.
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
"""Algorithms by name; each row is a surgeon."""


def class_of(algorithm: Algorithm) -> Callable[..., BaseAlgorithm]:
    """Import an algorithm's class.

    Raises:
        ImportError: if its library is not installed; names the extra.
    """
    module = import_extra(algorithm.module, "contrib", f"surgeon {algorithm.name}")
    found: Callable[..., BaseAlgorithm] = getattr(module, algorithm.name)
    return found


def settings_of(
    name: str, env: AttentionSurgeryVectorEnv, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of an algorithm: the table's, overridden by `options`.

    Args:
        name: a key of `ALGORITHMS`.
        env: determines the settings that depend on its rows and steps.
        options: by the algorithm's own names. `action_noise` may be a number, the standard
            deviation of a normal distribution, and `train_freq` a list, as JSON has no tuples.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if an option is unknown, of the wrong type or too small.
    """
    algorithm = ALGORITHMS[name]
    found = signature(class_of(algorithm), eval_str=True).parameters
    parameters = {key: p for key, p in found.items() if key not in FIXED}
    if "action_noise" in parameters:
        noise = parameters["action_noise"]
        parameters["action_noise"] = noise.replace(annotation=noise.annotation | float)
    check_options(name, options, parameters)
    n_steps = env.config.episode_length
    sizes = {
        "n_steps": n_steps,
        "batch_size": env.num_envs * n_steps,
        "n_eval_episodes": env.num_envs,
    }
    defaults = {**{size: sizes[size] for size in algorithm.rollout}, **algorithm.options}
    # A copy, since the libraries modify their arguments.
    settings: dict[str, Any] = copy.deepcopy({**defaults, **options})
    if isinstance(settings.get("train_freq"), list):
        settings["train_freq"] = tuple(settings["train_freq"])
    if isinstance(settings.get("action_noise"), int | float):
        from stable_baselines3.common.noise import NormalActionNoise

        n = len(env.operator.labels)
        spread = float(settings["action_noise"])
        settings["action_noise"] = NormalActionNoise(np.zeros(n), np.full(n, spread))
    if "n_steps" in algorithm.rollout and settings["n_steps"] * env.num_envs < 2:
        raise ValueError(
            f"{name} normalises over a rollout: rows times steps must be at least 2, "
            f"got {settings['n_steps'] * env.num_envs}"
        )
    return settings
