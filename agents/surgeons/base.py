"""The base class of all surgeons, and the check of their options.

Shapes: N rows, A coefficients, O numbers in an observation.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from agents.surgeons.episodes import (
    Act,
    BoolArray,
    EpisodeRecord,
    FloatArray,
    play,
    require_same_step,
)
from avatarl_env.errors import check_choice
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

LEAST: dict[str, float] = {
    "action_noise": 0,
    "batch_size": 2,
    "buffer_size": 1,
    "delta_std": 0,
    "learning_rate": 0,
    "n_delta": 1,
    "n_epochs": 1,
    "n_eval_episodes": 1,
    "n_operations": 1,
    "n_steps": 1,
    "n_top": 1,
    "sigma": 1e-6,
}
"""Smallest values of options; below them an algorithm would not end or would divide by zero."""


class Surgeon(ABC):
    """An agent that operates on all rows of a vector environment at once.

    A subclass must define `act`. A learning one also overrides `operate` and, if it has anything to
    store, `save`, `load`, `get_state` and `set_state`. Keyword-only arguments of the constructor
    are its options.
    """

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int) -> None:
        """Set environment and seed.

        Args:
            env: the environment; `operate` switches it to autoreset mode SAME_STEP.
            seed: of the surgeon's own random numbers and of the environment's prompts.
        """
        self.env = env
        self.episode_length = env.config.episode_length
        self.n_coefficients = len(env.operator.labels)
        self.next_seed: int | None = prompt_seed(seed)
        """Seed of the next reset; None continues the rows' generators."""

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Perform whole operations on every row, starting with a reset, and learn from them.

        After a flatline, a row starts another operation at once, and an operation that is not
        finished at the end leaves no record. A row may thus have more or fewer records than
        `n_operations`. The base class does not learn.

        Args:
            n_operations: operations on each row; a learner may perform more.

        Returns:
            Records of the operations, in the order in which they ended.
        """
        return self._practise(self.act, n_operations)

    def _practise(self, act: Act, n_operations: int) -> list[EpisodeRecord]:
        require_same_step(self.env, "to play several operations")
        seed, self.next_seed = self.next_seed, None
        return play(self.env, act, seed, n_operations * self.episode_length)

    @abstractmethod
    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        """Return deterministic actions (N, A) in [-1, 1] for observations (N, O).

        Called for every step, since a surgeon may have a memory. `begins` (N,) marks rows at the
        start of an operation.
        """

    def stats(self) -> Mapping[str, float]:
        """Return training metrics since the last call, by name (`surgeon/...`)."""
        return {}

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write the learned parameters into an existing folder."""

    def load(self, folder: Path) -> None:  # noqa: B027
        """Read the files written by a surgeon of the same name, seed and options."""

    def get_state(self) -> dict[str, Any]:
        """Return the state between two calls of `operate` that is not in the files of `save`.

        Nested dicts and lists of numbers, strings, arrays and tensors.
        """
        return {"seed": self.next_seed, "rng_state": self.env.get_rng_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state, after `load`; tuples may have become lists."""
        self.next_seed = state["seed"]
        self.env.set_rng_state(state["rng_state"])


def check_interface(surgeon: object, name: str) -> None:
    """Raise a ValueError unless a new surgeon has the methods of `Surgeon` and a storable state.

    Without this check it would fail in the middle of a run.
    """
    if not isinstance(surgeon, Surgeon):
        kind = f"{Surgeon.__module__}.{Surgeon.__name__}"
        raise ValueError(f"surgeon {name!r} must be a subclass of {kind}, got {surgeon!r:.100}")  # noqa: TRY004
    for method in ("operate", "act", "stats", "save", "load", "get_state", "set_state"):
        arguments = [*inspect.signature(getattr(Surgeon, method)).parameters][1:]
        try:
            inspect.signature(getattr(surgeon, method)).bind(*arguments)
        except TypeError as error:
            call = f"{method}({', '.join(arguments)})"
            raise ValueError(f"surgeon {name!r} must take the call {call}: {error}") from error
    state = surgeon.get_state()
    if not isinstance(state, dict) or not _is_plain(state):
        raise ValueError(
            f"surgeon {name!r} must return a dict of plain data and arrays from get_state, "
            f"got {state!r:.100}"
        )


def check_options(
    name: str, options: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> None:
    """Check options against the keyword parameters that will receive them.

    Args:
        name: of the surgeon, for the message.
        options: by name.
        parameters: by name; numbers, strings, bools and None must match their annotations.

    Raises:
        ValueError: if an option is unknown, missing, of the wrong type, not finite or below
            `LEAST`.
    """
    for option, value in options.items():
        check_choice(f"{name} option", option, parameters)
        _check_value(f"{name} option {option}", value, parameters[option])
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"surgeon {name!r} must be given the option {option!r}, got none")


def options_of(maker: Callable[..., object]) -> dict[str, Parameter]:
    """Return the keyword-only parameters of a surgeon's class or factory."""
    try:
        signature = inspect.signature(maker, eval_str=True)
    except NameError:  # an annotation is imported for type checkers only
        signature = inspect.signature(maker)
    return {n: p for n, p in signature.parameters.items() if p.kind == p.KEYWORD_ONLY}


def prompt_seed(seed: int) -> int:
    """Return the seed of row 0's prompts for a surgeon's seed; that of row i is larger by i.

    A hash, so that surgeons with neighbouring seeds share no prompts, and prompts are independent
    of actions drawn with the surgeon's own seed.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turn errors that a surgeon's stored files cause in the body into a ValueError."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"surgeon must be stored as one of the same kind and size, undamaged, "
            f"got {str(folder)!r}: {reason}"
        ) from error


def _check_value(what: str, value: Any, parameter: Parameter) -> None:
    annotation = parameter.annotation
    if not (value is None or isinstance(value, bool | int | float | str)):
        return  # a dict or an object, which the algorithm checks
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    kinds = get_args(annotation) or (annotation,)
    is_untyped = isinstance(annotation, str) or annotation in (Parameter.empty, Any)
    if not (is_untyped or type(value) in kinds or (is_number and float in kinds)):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{what} must be {names}, got {value!r}")
    if is_number and not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{what} must be finite, got {value}")
    least = LEAST.get(parameter.name, -math.inf)
    if is_number and value < least:  # type: ignore[operator]
        raise ValueError(f"{what} must be at least {least:g}, got {value}")


def _is_plain(value: object) -> bool:
    """Whether a checkpoint can hold a value."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | np.ndarray | np.generic | Tensor)
