"""What the benchmark scripts have in common: a fair stopwatch, the machine's ceilings, a record."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layers": 1, "n_heads": 2, "width": 16, "context": 32},
    "0.8M": {"n_layers": 4, "n_heads": 4, "width": 128, "context": 128},
    "10.6M": {"n_layers": 6, "n_heads": 6, "width": 384, "context": 256},
}
"""Language models to measure with, by their number of parameters."""


class Timing(NamedTuple):
    """Seconds of one call, over several."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    fastest: float
    slowest: float
    n: int


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time functions in turn, so that what disturbs the machine disturbs them all.

    The order is shuffled each time: a function finds the caches as the one before left them.

    Args:
        functions: by name.
        repeats: calls of each that count, at least 1.
        warm_up: calls of each that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, rng = list(functions.items()), random.Random(0)
    for repeat in range(warm_up + repeats):
        rng.shuffle(order)
        for name, function in order:
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(times) for name, times in seconds.items()}


def memcpy_bandwidth(n_bytes: int, device: str = "cpu") -> float:
    """Return bytes per second of copying `n_bytes` into another place, counted once."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    repeats = max(5, min(200, 2**28 // n_bytes))
    return n_bytes / interleaved({"": lambda: goal.copy_(source)}, repeats=repeats)[""].median


def gemm_rate(size: int = 1024, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return operations per second of a square matrix product."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / interleaved({"": lambda: a @ b}, repeats=15)[""].median


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what the figures depend on: command, versions, machine, threads, commit."""
    process = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": process.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def publish(result: dict[str, Any], options: argparse.Namespace, device: str = "cpu") -> None:
    """Print the result as one line of JSON, with its settings and `environment`.

    Args:
        result: what was measured, JSON-able.
        options: the command line; its `out` is None or where to write the JSON too.
        device: that it was measured on.
    """
    settings = {**vars(options), "out": options.out and str(options.out)}
    record = {**environment(device), "settings": settings, **result}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


def _timing(seconds: list[float]) -> Timing:
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return Timing(median, low, high, min(seconds), max(seconds), len(seconds))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
