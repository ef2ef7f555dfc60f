from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_curves
from tests.benchmarks.conftest import Run
from tests.training_runs import write_text


def test_the_table_by_hand() -> None:
    def result(run: str, seed: int, accuracy: float) -> dict[str, Any]:
        final = {"accuracy": accuracy, "loss": 2.0, "entropy": 1.5}
        return {"run": run, "seed": seed, "final": final}

    control = learning_curves.MAIN[0]
    results = [result(control, 1, 0.5), result(control, 2, 0.4)]
    results += [result("brier", 1, 0.45), result("brier", 2, 0.38), result("one seed", 1, 0.45)]
    made = learning_curves.table(results, [{"order": 2, "accuracy": 0.25, "loss": 2.5}])
    # Of the control's: 90 and 95 %; t(97.5 %, 1) = 12.7062, times 2.5 for the half width.
    first, second, third, last = made.splitlines()[2:]
    assert first.startswith(f"| {control} | 2 | 45.00 % ± ")
    assert "| 92.5 % ± 31.8" in second
    assert third.startswith("| one seed | 1 | 45.00 % | 90.0 % |")
    assert last == "| 2-gram counts | | 25.00 % | | 2.500 | |"


@pytest.mark.parametrize("name", [*learning_curves.RUNS, *learning_curves.SEED_RECIPES])
def test_every_run_has_settings(name: str) -> None:
    made = learning_curves.recipe(name, argparse.Namespace(batch_size=3, precision="float32"))
    assert made.batch_size == 3
    assert (made.estimator == "ce") == ("control" in name)


def test_it_trains_and_reports(tmp_path: Path, run: Run) -> None:
    words = ["--size", "tiny", "--updates", "4", "--every", "2", "--seeds", "1", "2"]
    words += ["--corpus", str(write_text(tmp_path)), "--batch-size", "2"]
    made = run(learning_curves, *words)
    assert made["png"]
    rows = made["results"]
    expected = [(name, seed) for seed in (1, 2) for name in learning_curves.MAIN]
    assert [(row["run"], row["seed"]) for row in rows] == expected
    for row in rows:
        points = [(point["update"], point["tokens"]) for point in row["curve"]]
        assert points == [(n, n * 2 * 32) for n in (0, 2, 4)]
        assert all(math.isfinite(value) for value in row["final"].values())
        assert row["curve"][0]["loss"] != row["curve"][-1]["loss"]
    starts = {(row["seed"], row["curve"][0]["loss"]) for row in rows}
    assert len(starts) == 2  # the same initial model for all runs of a seed
