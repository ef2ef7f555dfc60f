"""Isolate libraries that use the global random generators.

Stable-Baselines3 seeds the global generators of Python, numpy and torch when an algorithm is built,
and draws from them afterwards. Inside `PrivateRandomness.use` they have the surgeon's own states;
outside, their previous states.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class GlobalStates(NamedTuple):
    """States of the global generators."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: Sequence[torch.Tensor] = ()
    """One for each device: surgeons draw on the CPU, but seeding torch changes these too."""


class PrivateRandomness:
    """One consumer's own copy of the global generators."""

    def __init__(self, seed: int) -> None:
        """Start from a seed, without changing the global generators."""
        self._states = GlobalStates(
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )

    def get_state(self) -> dict[str, Any]:
        """Return the states but for CUDA's, which surgeons do not use."""
        _, keys, *rest = self._states.numpy
        return {
            "python": self._states.python,
            "numpy": {"keys": keys, "rest": rest},
            "torch": self._states.torch,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; tuples may have become lists."""
        version, numbers, gauss = state["python"]
        keys = np.asarray(state["numpy"]["keys"], dtype=np.uint32)
        self._states = GlobalStates(
            (version, tuple(numbers), gauss),
            ("MT19937", keys, *state["numpy"]["rest"]),
            state["torch"],
        )
        with self.use():  # a damaged state fails now rather than in training
            pass

    @contextmanager
    def use(self) -> Iterator[None]:
        """Set the private states for the body, and restore the global ones afterwards."""
        outside = _read()
        try:
            _write(self._states)
            try:
                yield
            finally:
                self._states = _read()
        finally:
            _write(outside)


def _read() -> GlobalStates:
    return GlobalStates(
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else (),  # type: ignore[no-untyped-call]
    )


def _write(states: GlobalStates) -> None:
    random.setstate(states.python)
    np.random.set_state(states.numpy)  # noqa: NPY002
    torch.set_rng_state(states.torch)
    if states.cuda:
        torch.cuda.set_rng_state_all(states.cuda)
