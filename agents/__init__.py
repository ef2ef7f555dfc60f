"""Learners: GRPO for the language model, surgeons for the operations, the curriculum of both."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # not imported from typing, which would slow the start of every command
if TYPE_CHECKING:
    from typing import Any

    from agents.training.config import TrainConfig
    from agents.training.loop import train
    from agents.training.summary import RunSummary

__all__ = ["RunSummary", "TrainConfig", "train"]

_HOMES = {
    "RunSummary": "agents.training.summary",
    "TrainConfig": "agents.training.config",
    "train": "agents.training.loop",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
