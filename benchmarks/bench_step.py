"""What does a step of the vector environment cost beside the language model?

32 operations of 4 prompts each on a model of 0.8 million parameters with random weights. Timed are
whole steps, and within them the time that the model computes: sampling, with the operators' edits
and the readings of the observation. What is left is the environment: scoring, observations, infos,
Gymnasium's bookkeeping. Then the rest is profiled, function by function.

    python benchmarks/bench_step.py --threads 2 --out benchmarks/results/bench_step.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from measure import publish

from avatarl_env import GPT, AttentionSurgeryVectorEnv, CharTokenizer, GPTConfig, load_corpus

SIZES = {
    "tiny": {"n_layers": 1, "n_heads": 2, "width": 16},
    "0.8M": {"n_layers": 4, "n_heads": 4, "width": 128},
    "10.6M": {"n_layers": 6, "n_heads": 6, "width": 384},
}
MODEL = "avatarl_env.patient.generate"  # what an evaluation calls to let the model write
N_SHOWN = 12


class Stopwatch:
    """Wraps a function and adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Start at zero."""
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function."""
        start = time.perf_counter()
        try:
            return self._function(*arguments, **keywords)
        finally:
            self.seconds += time.perf_counter() - start


def make_env(options: argparse.Namespace) -> AttentionSurgeryVectorEnv:
    """Put a model with random weights on so many tables, and make a first step."""
    corpus = load_corpus(options.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, context=128, **SIZES[options.size])
    env = AttentionSurgeryVectorEnv.from_model(
        GPT(config),
        tokenizer,
        corpus,
        options.rows,
        n_prompts=options.prompts,
        autoreset_mode="SameStep",
    )
    env.reset(seed=0)
    env.step(_actions(env))
    return env


def measure(env: AttentionSurgeryVectorEnv, n_steps: int) -> dict[str, Any]:
    """Time steps; return the seconds of each, and the model's part of them."""
    from avatarl_env.patient import generate

    steps, model = [], []
    for _ in range(n_steps):
        watch = Stopwatch(generate)
        with mock.patch(MODEL, watch):
            start = time.perf_counter()
            env.step(_actions(env))
            steps.append(time.perf_counter() - start)
        model.append(watch.seconds)
    outside = np.array(steps) - model
    shares = outside / steps
    return {
        "step_seconds": steps,
        "outside_model_seconds": outside.tolist(),
        "step_median": float(np.median(steps)),
        "outside_model_median": float(np.median(outside)),
        "share_outside_model": float(np.median(shares)),
        "share_quartiles": np.quantile(shares, (0.25, 0.75)).tolist(),
    }


def profile(env: AttentionSurgeryVectorEnv, n_steps: int) -> list[dict[str, Any]]:
    """Return the functions that most time is spent in, the model's left out.

    Profiling makes every call dearer, so these are no seconds to be quoted, but a ranking.
    """
    profiler = cProfile.Profile()

    def uninvolved(*arguments: Any, **keywords: Any) -> Any:
        profiler.disable()
        try:
            return generate(*arguments, **keywords)
        finally:
            profiler.enable()

    from avatarl_env.patient import generate

    with mock.patch(MODEL, uninvolved):
        profiler.enable()
        for _ in range(n_steps):
            env.step(_actions(env))
        profiler.disable()
    rows = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        place = f"{Path(file).name}:{line} {name}" if line else name
        row = {"function": place, "calls": calls / n_steps, "own": own / n_steps}
        rows.append({**row, "total": total / n_steps})
    return sorted(rows, key=lambda row: -row["own"])[:N_SHOWN]


def _actions(env: AttentionSurgeryVectorEnv) -> np.ndarray:
    return np.full(env.action_space.shape or (), 0.05, np.float32)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.8M")
    parser.add_argument("--rows", type=int, default=32, help="operations side by side")
    parser.add_argument("--prompts", type=int, default=4, help="of an operation")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--corpus", default="playwright")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    """Time, profile, print."""
    options = parse()
    torch.set_num_threads(options.threads)
    env = make_env(options)
    result = measure(env, options.steps)
    low, high = result["share_quartiles"]
    print(
        f"{options.rows} rows of {options.prompts} prompts, {options.size} parameters, "
        f"{options.threads} threads: a step takes {result['step_median'] * 1e3:.0f} ms, of which "
        f"{result['outside_model_median'] * 1e3:.1f} ms are not the model's: "
        f"{result['share_outside_model']:.1%} [{low:.1%}, {high:.1%}]"
    )
    result["profile"] = profile(env, max(1, options.steps // 4))
    print(f"{'own ms':>8} {'total ms':>9} {'calls':>8}  function, per step, under the profiler")
    for row in result["profile"]:
        print(
            f"{row['own'] * 1e3:8.2f} {row['total'] * 1e3:9.2f} {row['calls']:8.1f}  "
            f"{row['function']}"
        )
    publish(result, options)


if __name__ == "__main__":
    main()
