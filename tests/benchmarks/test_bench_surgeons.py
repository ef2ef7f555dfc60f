from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons.registry import make_surgeon
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from benchmarks import bench_surgeons
from benchmarks.bench_surgeons import Task
from tests.patients import store_tiny_patient, tiny_env, tiny_patient
from tests.training_runs import ScriptedSurgeon

SIZES: dict[str, Any] = {"injury": 0.5, "episode_length": 2, "n_prompts": 4, "n_new": 8}


def options(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    settings = {
        "lm": store_tiny_patient(tmp_path / "model"),
        "rows": 2,
        "prompts": 2,
        "tests": 3,
        "operations": 4,
        "injury": 0.5,
        "n_new": 8,
    }
    return argparse.Namespace(**{**settings, **changes})


def test_the_share_is_that_of_all_operations_together() -> None:
    rows = np.array([[0.5, 1.0], [1.0, 2.0], [0.0, 1.0]])
    assert bench_surgeons.share(rows) == 1.5 / 4


def test_operations_are_examined_each_on_an_injury_of_its_own() -> None:
    patient = tiny_patient()
    env = AttentionSurgeryVectorEnv(3, patient, autoreset_mode="NextStep", prompt_length=8, **SIZES)
    practice = AttentionSurgeryVectorEnv(
        3, patient, autoreset_mode="SameStep", prompt_length=8, **SIZES
    )
    rows = bench_surgeons.examine(ScriptedSurgeon(practice, 0.2), env)
    # What the single environment says of the second one.
    single = tiny_env(patient, **SIZES)
    single.reset(seed=bench_surgeons.TEST_SEED + 1)
    for _ in range(2):
        *_, info = single.step(np.full(4, 0.2, np.float32))
    assert rows[1].tolist() == pytest.approx([info["improvement"], info["lost_score"]], abs=1e-4)
    assert len(set(rows[:, 1].tolist())) == 3


def test_a_training_is_examined_before_it_and_after_each_round(tmp_path: Path) -> None:
    result = bench_surgeons.run(Task("es", 0, options(tmp_path)))
    assert [point["operations"] for point in result["curve"]] == [0, 8]
    assert result["curve"][0]["share"] == 0.0  # it begins at doing nothing
    assert result["injury"] == "fixed"
    lost = {arm: [row[1] for row in rows] for arm, rows in result["tests"].items()}
    assert lost["surgeon"] == lost["random"] == lost["replay"]  # in pairs


def test_a_searching_surgeon_has_one_injury_and_others_a_new_one_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injuries: dict[str, list[np.ndarray]] = {}

    def watch(surgeon: Any, env: AttentionSurgeryVectorEnv) -> np.ndarray:
        env.reset(seed=0)
        found = [episode.injury for episode in env._episodes if episode is not None]
        injuries.setdefault(name, []).extend(found)
        return np.ones((3, 2))

    def make(name: str, env: AttentionSurgeryVectorEnv, seed: int) -> Any:
        watch(None, env)  # where it learns
        return make_surgeon(name, env, seed)

    monkeypatch.setattr(bench_surgeons, "examine", watch)
    monkeypatch.setattr(bench_surgeons, "make_surgeon", make)
    for name in ("es", "a2c"):
        bench_surgeons.run(Task(name, 0, options(tmp_path)))
    assert len(np.unique(injuries["es"], axis=0)) == 1
    assert np.abs(injuries["es"]).max() <= 0.5
    assert len(np.unique(injuries["a2c"], axis=0)) >= 3


def test_a_summary_is_of_the_surgeon_against_the_others_in_pairs() -> None:
    def run(seed: int, surgeon: list[float]) -> dict[str, Any]:
        tests = {"surgeon": surgeon, "random": [-1.0, -2.0, -1.0], "replay": [0.5, 0.0, 0.5]}
        pairs = {arm: [[value, 1.0] for value in values] for arm, values in tests.items()}
        curve = [{"operations": 4, "share": 0.0}]
        return {"seed": seed, "injury": "fixed", "curve": curve, "seconds": 1.0, "tests": pairs}

    row = bench_surgeons.summarise("es", [run(0, [1.0, 0.5, 0.9]), run(1, [0.6, 0.5, 0.7])])
    assert row["shares"] == pytest.approx([0.8, 0.6])
    assert row["share"] == pytest.approx(0.7)
    assert row["over_zero"]["mean"] == pytest.approx(0.7)  # means over seeds: 0.8, 0.5, 0.8
    assert row["over_random"]["mean"] == pytest.approx((1.8 + 2.5 + 1.8) / 3)
    assert row["over_replay"]["mean"] == pytest.approx((0.3 + 0.5 + 0.3) / 3)
    assert row["over_replay"]["n"] == 3


def test_it_trains_draws_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = store_tiny_patient(tmp_path / "model")
    out = tmp_path / "result.json"
    arguments = ["--lm", lm, "--surgeons", "es", "a2c", "--seeds", "0", "1"]
    arguments += ["--operations", "2", "--rows", "2", "--prompts", "2", "--tests", "3"]
    arguments += ["--n-new", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_surgeons.py", *arguments])
    bench_surgeons.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| `") for line in lines) == 2
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result.keys() >= {"command", "commit", "surgeons", "runs", "settings"}
    assert [row["surgeon"] for row in result["surgeons"]] == ["es", "a2c"]
    assert all(len(row["shares"]) == 2 for row in result["surgeons"])
    assert result["surgeons"][0]["over_random"]["n"] == 3
