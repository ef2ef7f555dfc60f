"""Can a surgeon learn at all, and how fast? The positive control, on a real language model.

Every operation starts from a hidden injury of the attention weights, so the best answer is known:
the opposite. The injury is a new one each time, which no constant action can undo, except for
surgeons that search for one constant operation: their injury stays the same. After each round of
training the deterministic surgeon operates on the same unseen injuries and validation prompts. It
is compared in pairs with random operations and with its own actions replayed from other operations.
The result is the share of the lost score that was regained.

    python benchmarks/bench_surgeons.py --jobs 2 --out benchmarks/results/bench_surgeons.json

Prints a table in Markdown; the last line of stdout is one JSON object with everything. With --out
the learning curves are drawn beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import make_parser, publish
from tqdm import tqdm

from agents.evaluation.statistics import interval
from agents.evaluation.surgeon_effect import final_operations
from agents.surgeons.baselines import ReplaySurgeon
from agents.surgeons.registry import SURGEONS, Surgeon, make_surgeon
from avatarl_env.patient import Patient
from avatarl_env.surgery import make_operator
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

TEST_SEED = 1_000_000  # far from all training seeds
SEARCHES = ("cma_es", "es")  # they search for one operation, so they get one injury
LEARNERS = tuple(name for name in SURGEONS if name not in ("random", "zero", "replay"))
TEST_PROMPTS = 8


class Task(NamedTuple):
    """One training of one surgeon."""

    surgeon: str
    seed: int
    options: argparse.Namespace


def run(task: Task) -> dict[str, Any]:
    """Train one surgeon; return its learning curve and the final tests of it and the controls."""
    options = task.options
    torch.set_num_threads(options.threads)
    patient = Patient.load(options.lm)
    rules: dict[str, Any] = {"injury": options.injury, "n_new": options.n_new}
    if task.surgeon in SEARCHES:
        n_coefficients = len(make_operator("head_gain", patient.targets).labels)
        rng = np.random.default_rng([task.seed, 1])
        rules["injury"] = rng.uniform(-options.injury, options.injury, n_coefficients).tolist()
    env = AttentionSurgeryVectorEnv(
        options.rows, patient, n_prompts=options.prompts, autoreset_mode="SameStep", **rules
    )
    test_env = AttentionSurgeryVectorEnv(
        options.tests,
        patient,
        n_prompts=TEST_PROMPTS,
        split="validation",
        autoreset_mode="NextStep",
        **rules,
    )
    surgeon = make_surgeon(task.surgeon, env, task.seed)
    curve, done, seconds = [], 0, 0.0
    while True:
        regained = examine(surgeon, test_env)
        curve.append({"operations": done, "share": share(regained)})
        if done >= options.operations:
            break
        start = time.perf_counter()
        done += len(surgeon.operate(1))
        seconds += time.perf_counter() - start
    arms = {"surgeon": surgeon, "random": make_surgeon("random", env, task.seed)}
    arms["replay"] = ReplaySurgeon(env, task.seed, source=surgeon, n_operations=1)
    return {
        "surgeon": task.surgeon,
        "seed": task.seed,
        "injury": "fixed" if task.surgeon in SEARCHES else "new each time",
        "curve": curve,
        "seconds": seconds,
        "tests": {name: examine(arm, test_env).tolist() for name, arm in arms.items()},
    }


def run_all(tasks: list[Task], n_jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the results of `run`, in order."""
    if n_jobs == 1:
        yield from map(run, tasks)
        return
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, tasks)


def examine(surgeon: Surgeon, env: AttentionSurgeryVectorEnv) -> np.ndarray:
    """Perform one operation per row; return the scores regained and lost, (n, 2)."""
    endings = final_operations(surgeon, env, TEST_SEED)
    return np.array([(ending.total, ending.lost_score) for ending in endings])


def share(rows: np.ndarray) -> float:
    """Return the share of the lost score that was regained, summed over operations."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the trainings of a surgeon.

    The unit of the paired intervals is a test (injury and prompts; for searches prompts), averaged
    over seeds: they hold for these trainings, and for a search's injuries. `shares` shows how the
    trainings differ.
    """
    tests = {arm: np.array([run["tests"][arm] for run in runs]) for arm in runs[0]["tests"]}
    regained = {arm: rows[:, :, 0].mean(axis=0) for arm, rows in tests.items()}
    shares = [share(rows) for rows in tests["surgeon"]]
    return {
        "surgeon": name,
        "injury": runs[0]["injury"],
        "operations": runs[0]["curve"][-1]["operations"],
        "share": float(np.mean(shares)),
        "shares": shares,
        "share_replay": float(np.mean([share(rows) for rows in tests["replay"]])),
        "share_random": float(np.mean([share(rows) for rows in tests["random"]])),
        "over_zero": interval(regained["surgeon"])._asdict(),
        "over_random": interval(regained["surgeon"] - regained["random"])._asdict(),
        "over_replay": interval(regained["surgeon"] - regained["replay"])._asdict(),
        "seconds": float(np.median([run["seconds"] for run in runs])),
    }


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Print the table, in Markdown."""
    head = ["surgeon", "injury", "operations", "share regained (each seed)"]
    head += ["nats/char over none", "over random"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        seeds = ", ".join(f"{value:.0%}" for value in sorted(row["shares"]))
        better = [
            f"{row[key]['mean']:+.2f} [{row[key]['low']:+.2f}, {row[key]['high']:+.2f}]"
            for key in ("over_zero", "over_random")
        ]
        print(
            f"| `{row['surgeon']}` | {row['injury']} | {row['operations']} "
            f"| {row['share']:.0%} ({seeds}) | {' | '.join(better)} |"
        )


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the learning curves of every surgeon, one line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["surgeon"] for run in runs))
    n_columns = min(4, len(names))
    n_lines = -(-len(names) // n_columns)
    figure = Figure(figsize=(2.6 * n_columns, 2.2 * n_lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    top = max(1.2, *(point["share"] for run in runs for point in run["curve"]))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        mine = [run["curve"] for run in runs if run["surgeon"] == name]
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
        for curve in mine:
            x, y = [p["operations"] for p in curve], [p["share"] for p in curve]
            axes.plot(x, y, color="C0", linewidth=1.3, alpha=0.8)
        axes.set_title(f"{name} (one injury)" if name in SEARCHES else name, fontsize=9)
        axes.set_ylim(-1, top)
        axes.tick_params(labelsize=8)
    figure.supxlabel("operations learned from", fontsize=9)
    figure.supylabel("share of the lost score regained", fontsize=9)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test, print."""
    parser = make_parser(__doc__)
    parser.add_argument("--surgeons", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--operations", type=int, default=640, help="to learn from, at least")
    parser.add_argument("--rows", type=int, default=64, help="operations side by side")
    parser.add_argument("--prompts", type=int, default=4, help="of an operation")
    parser.add_argument("--tests", type=int, default=32, help="operations to be tested on")
    parser.add_argument("--injury", type=float, default=0.5)
    parser.add_argument("--n-new", type=int, default=32, help="characters written per prompt")
    parser.add_argument("--lm", default="bundled")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    options = parser.parse_args(argv)
    tasks = [Task(name, seed, options) for name in options.surgeons for seed in options.seeds]
    runs = list(tqdm(run_all(tasks, options.jobs), total=len(tasks), disable=None))
    rows = [summarise(n, [run for run in runs if run["surgeon"] == n]) for n in options.surgeons]
    show(rows)
    publish({"surgeons": rows, "runs": runs}, options)
    if options.out:
        draw(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
