"""When a run is no longer worth going on with."""

from __future__ import annotations


class DivergedError(RuntimeError):
    """The model, or the surgeon, cannot be trained on: what it computes is not finite."""
