"""Surgeons by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from agents.surgeons.base import OperationRecord, OperationRecorder, Surgeon
from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from agents.surgeons.sb3 import ALGORITHMS, SB3Surgeon
from avatarl_env.choices import check_choice
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

__all__ = [
    "NONE",
    "SURGEONS",
    "OperationRecord",
    "OperationRecorder",
    "Surgeon",
    "check_surgeon",
    "make_surgeon",
]

NONE = "none"
"""The name that means: no surgeon, no operations."""

SURGEONS: dict[str, Callable[[AttentionSurgeryVectorEnv, int], Surgeon]] = {
    "random": RandomSurgeon,
    "zero": ZeroSurgeon,
    **{name: functools.partial(SB3Surgeon, name) for name in ALGORITHMS},
}
"""Surgeons by name, of a vector environment and a seed; ``SURGEONS["mine"] = ...`` adds one."""


def check_surgeon(name: str) -> None:
    """Raise a ValueError unless there is such a surgeon."""
    check_choice("surgeon", name, [*SURGEONS, NONE])


def make_surgeon(name: str, env: AttentionSurgeryVectorEnv, seed: int) -> Surgeon:
    """Build the surgeon called ``name``.

    Raises:
        ValueError: if there is none of that name; names the closest.
    """
    check_surgeon(name)
    if name == NONE:
        raise ValueError(f"surgeon {NONE!r} operates on nothing: there is nothing to make")
    return SURGEONS[name](env, seed)
