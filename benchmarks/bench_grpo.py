"""How much does an update of the language model cost, and how far is it from the machine's limit?

For models of 0.8 and 10.6 million parameters, updates of several kinds are timed in turn on batches
of the same number of tokens: the supervised control, the default estimator over all actions, and
with K sampled characters per position. Each is compared with the control, and with the rate at
which the same threads multiply matrices. Memory is measured in fresh processes, as the peak of an
update above the memory in use before it.

    python benchmarks/bench_grpo.py --threads 2 --out benchmarks/results/bench_grpo.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import SIZES, gemm_rate, interleaved, make_parser, publish, untrained_model

from agents.grpo.config import PRECISIONS, GRPOConfig
from agents.grpo.learner import GRPOLearner
from agents.grpo.rollouts import TRAINING_COST

VOCAB_SIZE = 66
ALL = {"exploration": "all_actions"}
CONTROL = "ce"
KINDS: dict[str, dict[str, Any]] = {
    CONTROL: {"estimator": "ce", **ALL},
    "all actions": ALL,
    "sampled K = 16": {"group_size": 16},
    "sampled K = 64": {"group_size": 64},
    "brier, sampled K = 16": {"estimator": "brier"},
}
MEMORY_UPDATES = 3


def make_learner(size: str, kind: str, options: argparse.Namespace) -> GRPOLearner:
    """Build a learner on random text."""
    batch_size = max(1, options.tokens[options.sizes.index(size)] // SIZES[size]["context"])
    model, rng = untrained_model(size, VOCAB_SIZE, seed=0)
    config = GRPOConfig(
        batch_size=batch_size,
        optimizer=options.optimizer,
        precision=options.precision,
        **KINDS[kind],
    )
    text = np.random.default_rng(0).integers(0, VOCAB_SIZE, 100_000)
    return GRPOLearner(model.to(options.device), text, config, n_updates=1000, rng=rng)


def useful_flops(learner: GRPOLearner) -> int:
    """Return the operations of an update's forward and backward, without the optimizer's.

    A position attends to half a context on average, and a backward costs two forwards.
    """
    forward = learner.model.flops_per_token(learner.model.context // 2)
    return TRAINING_COST * forward * learner.tokens_per_update


def time_updates(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one update of every kind, in turn."""
    kinds = dict.fromkeys([CONTROL, *options.kinds])
    learners = {kind: make_learner(size, kind, options) for kind in kinds}
    steps = {kind: learner.update for kind, learner in learners.items()}
    timings = interleaved(steps, repeats=options.repeats, warm_up=2)
    rate = gemm_rate(device=options.device, dtype=PRECISIONS[options.precision])
    control = timings[CONTROL].median
    rows = {}
    for kind, timing in timings.items():
        flops = useful_flops(learners[kind])
        rows[kind] = {
            **timing._asdict(),
            "over_control": timing.median / control,
            "tokens_per_second": learners[kind].tokens_per_update / timing.median,
            "share_of_gemm_rate": flops / timing.median / rate,
        }
    tokens = learners[CONTROL].tokens_per_update
    return {"tokens_per_update": tokens, "gemm_flops_per_second": rate, "kinds": rows}


def peak_memory(size: str, kind: str, options: argparse.Namespace) -> int:
    """Return the peak memory of updates in bytes, measured in a process of its own."""
    script = [sys.executable, __file__, "--child", size, kind, "--threads", str(options.threads)]
    tokens = ["--tokens", *map(str, options.tokens), "--sizes", *options.sizes]
    chosen = ["--optimizer", options.optimizer, "--precision", options.precision]
    chosen += ["--device", options.device]
    made = subprocess.run([*script, *tokens, *chosen], capture_output=True, check=True, text=True)
    return int(json.loads(made.stdout.splitlines()[-1])["bytes"])


def measure_child(size: str, kind: str, options: argparse.Namespace) -> None:
    """Print by how many bytes a few updates raise the peak of this process's memory."""
    learner = make_learner(size, kind, options)
    peak, present = PEAKS["cuda" if options.device.startswith("cuda") else "cpu"]
    before = present()
    for _ in range(MEMORY_UPDATES):
        learner.update()
    print(json.dumps({"bytes": peak() - before}))


def resident(field: str) -> int:
    """Return a field of this process's status in bytes: VmRSS now, VmHWM at its peak.

    Not `ru_maxrss`, which starts at the peak of the parent process.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"field must be in /proc/self/status, got {field!r}")


PEAKS = {
    "cpu": (lambda: resident("VmHWM"), lambda: resident("VmRSS")),
    "cuda": (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, publish."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.8M", "10.6M"], choices=list(SIZES))
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[1024, 4096], help="of an update, for each size"
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--child", nargs=2, metavar=("SIZE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if len(options.tokens) != len(options.sizes):
        parser.error(f"tokens must be one for each of {len(options.sizes)} sizes")
    torch.set_num_threads(options.threads)
    if options.child:
        measure_child(*options.child, options)
        return
    result = {}
    for size in options.sizes:
        result[size] = time_updates(size, options)
        base = 0
        print(f"\n{size}, {result[size]['tokens_per_update']} tokens, {options.optimizer}")
        for kind, row in result[size]["kinds"].items():
            row["peak_bytes"] = peak_memory(size, kind, options)
            base = base or row["peak_bytes"]
            row["memory_over_control"] = row["peak_bytes"] / base
            print(
                f"  {kind:<24} {1e3 * row['median']:8.1f} ms"
                f" [{1e3 * row['low']:.1f}, {1e3 * row['high']:.1f}]"
                f" {row['over_control']:6.2f} x control"
                f" {row['share_of_gemm_rate']:6.0%} of products"
                f" {row['peak_bytes'] / 2**20:7.0f} MiB {row['memory_over_control']:5.2f} x"
            )
    publish({"results": result}, options)


if __name__ == "__main__":
    main()
