from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_curves
from tests.training_runs import write_text


def result(run: str, seed: int, accuracy: float) -> dict[str, Any]:
    final = {"accuracy": accuracy, "loss": 2.0, "entropy": 1.5}
    return {"run": run, "seed": seed, "final": final}


def test_the_table_by_hand() -> None:
    control = learning_curves.MAIN[0]
    results = [result(control, 1, 0.5), result(control, 2, 0.4)]
    results += [result("proper_maxrl", 1, 0.45), result("proper_maxrl", 2, 0.38)]
    made = learning_curves.table(results, [{"order": 2, "accuracy": 0.25, "loss": 2.5}])
    # Of the control's: 90 and 95 %; t(97.5 %, 1) = 12.7062, times 2.5 for the half width.
    _, _, first, second, last = made.splitlines()
    assert first.startswith(f"| {control} | 2 | 45.00 % ± ")
    assert "| 92.5 % ± 31.8 % |" in second or "| 92.5 % ± 31.8 |" in second
    assert last == "| 2-gram counts | | 25.00 % | | 2.500 | |"


def test_one_seed_has_no_interval() -> None:
    assert learning_curves._spread([1.25], 2) == "1.25"


@pytest.mark.parametrize("name", [*learning_curves.RUNS, *learning_curves.SEED_RECIPES])
def test_every_run_is_a_recipe(name: str) -> None:
    options = type("Options", (), {"batch_size": 3, "precision": "float32"})
    made = learning_curves.recipe(name, options)  # type: ignore[arg-type]
    assert made.batch_size == 3
    assert (made.estimator == "ce") == ("control" in name)


def test_it_trains_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--updates", "4", "--every", "2", "--seeds", "1", "2"]
    arguments += ["--corpus", str(write_text(tmp_path)), "--batch-size", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["learning_curves.py", *arguments])
    learning_curves.main()
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made == json.loads(out.read_text(encoding="utf-8"))
    assert [(r["run"], r["seed"]) for r in made["results"]] == [
        (name, seed) for seed in (1, 2) for name in learning_curves.MAIN
    ]
    for row in made["results"]:
        assert [(point["update"], point["tokens"]) for point in row["curve"]] == [
            (0, 0),
            (2, 2 * 2 * 32),
            (4, 4 * 2 * 32),
        ]
        assert all(math.isfinite(value) for value in row["final"].values())
        assert row["curve"][0]["loss"] != row["curve"][-1]["loss"]
    # One seed, one beginning.
    starts = {
        r["seed"]: {x["curve"][0]["loss"] for x in made["results"] if x["seed"] == r["seed"]}
        for r in made["results"]
    }
    assert all(len(losses) == 1 for losses in starts.values())
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_an_unknown_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["learning_curves.py", "--runs", "breir"])
    with pytest.raises(SystemExit):
        learning_curves.main()
    assert "got 'breir'" in capsys.readouterr().err
