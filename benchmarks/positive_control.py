"""Can a surgeon learn at all? The positive control, on a real language model.

Every operation starts from a hidden injury of the attention weights, different each time, so the
best answer is known (its opposite) and no constant action can give it. After training, the
deterministic surgeon, a random one and none operate on the same fresh injuries of the validation
split, and are compared in pairs. Reported is the share of the lost score that was regained.

    python benchmarks/positive_control.py --operations 400 --rows 32

Prints the learning curve and a table; the last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from measure import publish

from agents.effect import final_operations
from agents.surgeons import Surgeon, make_surgeon
from avatarl_env.scoring import interval
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

TEST_SEED = 1_000_000  # far from every training seed
TRAINED = "trained"
ROUND = 25  # operations between two lines of the learning curve, at least


def examine(surgeon: Surgeon, env: AttentionSurgeryVectorEnv) -> np.ndarray:
    """Return (n, 2): the score regained and the score lost, by one operation on each of n rows."""
    endings = final_operations(surgeon, env, TEST_SEED)
    return np.array([(ending.total, ending.lost_score) for ending in endings])


def share(rows: np.ndarray) -> float:
    """Return the share of the lost score that was regained, over all operations."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def train(surgeon: Surgeon, n_operations: int, n_rows: int) -> list[dict[str, float]]:
    """Let the surgeon learn from so many operations, at least; return its learning curve."""
    curve: list[dict[str, float]] = []
    done = 0
    while done < n_operations:
        records = surgeon.operate(-(-min(ROUND, n_operations - done) // n_rows))
        done += len(records)
        regained = share(np.array([[record.total, record.lost_score] for record in records]))
        curve.append({"operations": done, "share": regained})
        print(f"{done:5d} operations: share regained {regained:+.3f}", flush=True)
    return curve


def share_interval(rows: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the share, or NaNs if too few were tested."""
    rng = np.random.default_rng(seed)
    if rows[:, 1].sum() <= 0:
        return float("nan"), float("nan")
    draws = rows[rng.integers(0, len(rows), (10_000, len(rows)))].sum(axis=1)
    if draws[:, 1].min() <= 0:  # so few operations that an injury may seem to do good
        return float("nan"), float("nan")
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    return float(low), float(high)


def compare(results: dict[str, np.ndarray]) -> dict[str, Any]:
    """Print and return each arm's share and gain, and by how much the trained one is better."""
    table = {}
    for arm, rows in results.items():
        gain = interval(rows[:, 0])
        better = interval(results[TRAINED][:, 0] - rows[:, 0])
        low, high = share_interval(rows)
        row = {"share": share(rows), "share_low": low, "share_high": high}
        table[arm] = {**row, "gain": gain._asdict(), "gain_over_this": better._asdict()}
        line = f"{arm:>8}: share of the lost score regained {share(rows):+.3f} "
        line += f"[{low:+.3f}, {high:+.3f}], gain {gain.mean:+.4f} "
        line += f"[{gain.low:+.4f}, {gain.high:+.4f}] nats/char"
        if arm != TRAINED:
            line += f"; the trained one gains more by {better.mean:+.4f} "
            line += f"[{better.low:+.4f}, {better.high:+.4f}]"
        print(line)
    return table


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--surgeon", default="sac")
    parser.add_argument("--operations", type=int, default=400, help="operations to learn from")
    parser.add_argument("--rows", type=int, default=32, help="operations side by side")
    parser.add_argument("--tests", type=int, default=48, help="operations to be tested on")
    parser.add_argument("--injury", type=float, default=0.5)
    parser.add_argument("--n-new", type=int, default=32, help="characters written per prompt")
    parser.add_argument("--lm", default="bundled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    """Train, test, print."""
    options = parse()
    torch.set_num_threads(options.threads)
    rules = {"injury": options.injury, "n_new": options.n_new}
    env = AttentionSurgeryVectorEnv(options.rows, options.lm, **rules)
    test_env = AttentionSurgeryVectorEnv(
        options.tests, env.patient, split="validation", autoreset_mode="NextStep", **rules
    )
    surgeon = make_surgeon(options.surgeon, env, options.seed)
    start = time.perf_counter()
    curve = train(surgeon, options.operations, options.rows)
    seconds = time.perf_counter() - start

    arms = {name: make_surgeon(name, env, options.seed) for name in ("random", "zero")}
    arms = {TRAINED: surgeon, **arms}
    results = {name: examine(arm, test_env) for name, arm in arms.items()}
    lost = float(results["zero"][:, 1].mean())
    print(f"\n{options.tests} unseen injuries, {lost:.4f} nats/char lost on average")
    result = {
        "lost_score": lost,
        "curve": curve,
        "test": compare(results),
        "seconds": seconds,
    }
    publish(result, options)


if __name__ == "__main__":
    main()
