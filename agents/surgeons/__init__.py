"""Surgeons by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import gymnasium

from agents.surgeons.base import FloatArray, OperationRecord, OperationRecorder, Surgeon
from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from agents.surgeons.sb3 import ALGORITHMS, SB3Surgeon
from avatarl_env.choices import check_choice

__all__ = [
    "NONE",
    "SURGEONS",
    "OperationRecord",
    "OperationRecorder",
    "Surgeon",
    "check_surgeon",
    "make_surgeon",
]

Env = gymnasium.Env[FloatArray, FloatArray]

NONE = "none"
"""The name that means: no surgeon, no operations."""

SURGEONS: dict[str, Callable[[Env, int], Surgeon]] = {
    "random": RandomSurgeon,
    "zero": ZeroSurgeon,
    **{name: functools.partial(SB3Surgeon, name) for name in ALGORITHMS},
}
"""Surgeons by name, made from an environment and a seed; ``SURGEONS["mine"] = ...`` adds one."""


def check_surgeon(name: str) -> None:
    """Raise a ValueError unless there is such a surgeon."""
    check_choice("surgeon", name, [*SURGEONS, NONE])


def make_surgeon(name: str, env: Env, seed: int) -> Surgeon:
    """Build the surgeon called ``name``.

    Raises:
        ValueError: if there is none of that name; names the closest.
    """
    check_surgeon(name)
    if name == NONE:
        raise ValueError(f"surgeon {NONE!r} operates on nothing: there is nothing to make")
    return SURGEONS[name](env, seed)
