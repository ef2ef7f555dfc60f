"""How much does a step of the vector environment cost on top of the language model?

32 operations of 4 prompts each, on a model of 0.8 million parameters with random weights. Whole
steps are timed, and within them the model: sampling, with the operators' edits and the readings of
the observation. The difference is the environment: scoring, observations, infos and Gymnasium's
bookkeeping. It is then profiled by function.

    python benchmarks/bench_step.py --threads 2 --out benchmarks/results/bench_step.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import SIZES, make_parser, publish, untrained_model

from avatarl_env import AttentionSurgeryVectorEnv, CharTokenizer, load_corpus

CONTEXT = 128  # of every size
MODEL = "avatarl_env.patient.generate"  # called by evaluations to sample from the model
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
    """Return an environment on an untrained model, after a first step."""
    corpus = load_corpus(options.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text)
    model, _ = untrained_model(options.size, tokenizer.vocab_size, seed=0, context=CONTEXT)
    env = AttentionSurgeryVectorEnv.from_model(
        model,
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
    """Time steps; return the seconds of each, and those outside the model."""
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
    """Return the functions outside the model that take most time.

    Profiling slows every call down, so this is a ranking rather than a measurement.
    """
    profiler = cProfile.Profile()

    def unprofiled(*arguments: Any, **keywords: Any) -> Any:
        profiler.disable()
        try:
            return generate(*arguments, **keywords)
        finally:
            profiler.enable()

    from avatarl_env.patient import generate

    with mock.patch(MODEL, unprofiled):
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


def main(argv: Sequence[str] | None = None) -> None:
    """Time, profile, print."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.8M")
    parser.add_argument("--rows", type=int, default=32, help="operations side by side")
    parser.add_argument("--prompts", type=int, default=4, help="of an operation")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--corpus", default="playwright")
    options = parser.parse_args(argv)
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
