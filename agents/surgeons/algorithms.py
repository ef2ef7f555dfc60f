"""The algorithms of Stable-Baselines3 that are surgeons, and how each is set up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from agents.errors import import_extra
from avatarl_env.errors import check_choice
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.noise import ActionNoise

# An operation is a finite task of a few steps: nothing is discounted.
GAMMA = 1.0
# What the adapter decides.
FIXED = {"policy", "env", "seed", "device", "_init_setup_model", "tensorboard_log", "verbose"}
# Below this an algorithm stands still, never ends, or divides by a spread of nothing.
_LEAST = {
    "batch_size": 2,
    "buffer_size": 1,
    "delta_std": 0,
    "learning_rate": 0,
    "n_delta": 1,
    "n_epochs": 1,
    "n_eval_episodes": 1,
    "n_steps": 1,
    "n_top": 1,
}


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
    "gamma": GAMMA,
    "policy_kwargs": _NETS,
    "learning_rate": 1e-3,
    "batch_size": 256,
    # Old transitions tell of a language model that is no more.
    "buffer_size": 20_000,
    "learning_starts": 128,
    # After each step on every row.
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
    "gamma": GAMMA,
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


def class_of(algorithm: Algorithm) -> Callable[..., BaseAlgorithm]:
    """Import an algorithm.

    Raises:
        ImportError: if its library is not installed; says which extra has it.
    """
    module = import_extra(algorithm.module, "contrib", f"surgeon {algorithm.name}")
    made: Callable[..., BaseAlgorithm] = getattr(module, algorithm.name)
    return made


def settings_of(
    name: str, env: AttentionSurgeryVectorEnv, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of an algorithm: the table's, over them `options`.

    Args:
        name: a key of `ALGORITHMS`.
        env: decides those that depend on its rows and steps.
        options: by the algorithm's own names. `action_noise` may be a number, the spread of a
            normal distribution, and `train_freq` a list, as JSON has no tuples.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if the algorithm has no such option, or one is of the wrong kind or too small.
    """
    algorithm = ALGORITHMS[name]
    parameters = signature(class_of(algorithm), eval_str=True).parameters
    for option in options:
        check_choice(f"{name} option", option, set(parameters) - FIXED)
    sizes = {
        "n_steps": env.config.episode_length,
        "batch_size": env.num_envs * env.config.episode_length,
        "n_eval_episodes": env.num_envs,
    }
    # The libraries add to what they are given: copies, so that it stays as it is.
    usual = {**{size: sizes[size] for size in algorithm.rollout}, **algorithm.options}
    settings: dict[str, Any] = copy.deepcopy({**usual, **options})
    if isinstance(settings.get("train_freq"), list):
        settings["train_freq"] = tuple(settings["train_freq"])
    if isinstance(settings.get("action_noise"), int | float):
        settings["action_noise"] = _noise(settings["action_noise"], len(env.operator.labels))
    for option in options:
        _check_value(f"{name} option {option}", settings[option], parameters[option])
    if "n_steps" in algorithm.rollout and settings["n_steps"] * env.num_envs < 2:
        raise ValueError(
            f"{name} compares what it did with itself: rows times steps must be at least 2, "
            f"got {settings['n_steps'] * env.num_envs}"
        )
    return settings


def _check_value(what: str, value: Any, parameter: Parameter) -> None:
    """Refuse a plain value (number, text, None) that is not of a parameter's kind."""
    kinds = get_args(parameter.annotation) or (parameter.annotation,)
    fits = True
    if isinstance(value, bool | str | NoneType):
        fits = type(value) in kinds
    elif isinstance(value, int | float):
        fits = type(value) in kinds or float in kinds  # an integer will do
    if not fits:
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{what} must be {names}, got {value!r}")
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value}")
    least = _LEAST.get(parameter.name)
    if isinstance(value, int | float) and least is not None and value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}")


def _noise(spread: float, n_coefficients: int) -> ActionNoise:
    """Return normal noise for every coefficient."""
    from stable_baselines3.common.noise import NormalActionNoise

    if isinstance(spread, bool) or not 0 <= spread < math.inf:
        raise ValueError(f"action_noise must be a finite number from 0 on, got {spread!r}")
    return NormalActionNoise(np.zeros(n_coefficients), np.full(n_coefficients, float(spread)))
