"""Shared by the benchmark scripts: timing, the machine's limits, the command line and the record.

Import it before torch: threads that wait at the end of a parallel region should sleep, not spin,
where other programs use the same cores.
"""

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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from avatarl_env import GPT, GPTConfig

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layers": 1, "n_heads": 2, "width": 16, "context": 32},
    "0.8M": {"n_layers": 4, "n_heads": 4, "width": 128, "context": 128},
    "10.6M": {"n_layers": 6, "n_heads": 6, "width": 384, "context": 256},
}
"""Language models by their number of parameters: keywords of `GPTConfig`."""


class Timing(NamedTuple):
    """Seconds per call, over n calls."""

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
    """Time functions in turn, so that other load on the machine affects all of them alike.

    The order is shuffled in each round, since a function finds the caches as the previous one left
    them.

    Args:
        functions: by name.
        repeats: timed calls of each, at least 1.
        warm_up: calls of each before these.
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
    """Return the bytes per second of copying `n_bytes`, each byte counted once."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    repeats = max(5, min(200, 2**28 // n_bytes))
    return n_bytes / interleaved({"": lambda: goal.copy_(source)}, repeats=repeats)[""].median


def gemm_rate(size: int = 1024, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return the operations per second of a product of square matrices."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / interleaved({"": lambda: a @ b}, repeats=15)[""].median


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all scripts: `--threads`, `--device` and `--out`.

    Args:
        doc: the script's docstring; its first line is the description.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser


def untrained_model(
    size: str, vocab_size: int, seed: int, **changes: int
) -> tuple[GPT, np.random.Generator]:
    """Return a model with random weights, and a generator for its training.

    Args:
        size: a key of `SIZES`.
        vocab_size: V.
        seed: of both.
        **changes: other keywords of `GPTConfig`.
    """
    init, training = np.random.SeedSequence(seed).spawn(2)
    generator = torch.Generator().manual_seed(int(init.generate_state(1)[0] >> 1))
    config = GPTConfig(**{"vocab_size": vocab_size, **SIZES[size], **changes})
    return GPT(config, generator), np.random.default_rng(training)


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


def publish(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result as one line of JSON, with its settings and `environment`.

    Args:
        result: the measurements, serialisable as JSON.
        options: from `make_parser`; the JSON is also written to `out`, unless it is None.
    """
    settings = {**vars(options), "out": options.out and str(options.out)}
    record = {**environment(options.device), "settings": settings, **result}
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
