"""How this program was started: alone, or by torchrun as one of several processes."""

from __future__ import annotations

import os


def place() -> tuple[int, int]:
    """Return which process of the run this is, from 0, and how many there are."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def started_by(program: str) -> tuple[str, ...]:
    """Return the command that a Python program was started with, without its arguments."""
    _, count = place()
    if count == 1:
        return ("python", program)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    nodes = () if local == count else ("--nnodes", str(count // local))
    return ("torchrun", *nodes, "--nproc-per-node", str(local), program)


def own_device(name: str) -> str:
    """Return the device that this process is to take where ``name`` is asked for.

    Processes on one machine cannot share a GPU: each takes the one of its number.

    Raises:
        ValueError: if several processes are asked to take one and the same.
    """
    _, count = place()
    if count == 1 or name == "cpu":
        return name
    if ":" in name:
        raise ValueError(
            f"device must have no number where each process takes its own, got {name!r}"
        )
    return f"{name}:{os.environ.get('LOCAL_RANK', '0')}"
