from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from benchmarks import bench_surgeons
from tests.benchmarks.conftest import Run
from tests.patients import store_tiny_patient, tiny_env, tiny_patient
from tests.training_runs import ScriptedSurgeon

SIZES: dict[str, Any] = {"injury": 0.5, "episode_length": 2, "n_prompts": 4, "n_new": 8}


def test_every_test_operation_has_an_injury_of_its_own() -> None:
    patient = tiny_patient()
    env, practice = (
        AttentionSurgeryVectorEnv(3, patient, autoreset_mode=mode, prompt_length=8, **SIZES)
        for mode in ("NextStep", "SameStep")
    )
    rows = bench_surgeons.examine(ScriptedSurgeon(practice, 0.2), env)
    # The single environment with the second one's seed.
    single = tiny_env(patient, **SIZES)
    single.reset(seed=bench_surgeons.TEST_SEED + 1)
    for _ in range(2):
        *_, info = single.step(np.full(4, 0.2, np.float32))
    assert rows[1].tolist() == pytest.approx([info["improvement"], info["lost_score"]], abs=1e-4)
    assert len(set(rows[:, 1].tolist())) == 3


def test_a_summary_compares_the_surgeon_with_the_controls_in_pairs() -> None:
    def run(seed: int, surgeon: list[float]) -> dict[str, Any]:
        tests = {"surgeon": surgeon, "random": [-1.0, -2.0, -1.0], "replay": [0.5, 0.0, 0.5]}
        pairs = {arm: [[value, 1.0] for value in values] for arm, values in tests.items()}
        curve = [{"operations": 4, "share": 0.0}]
        return {"seed": seed, "injury": "fixed", "curve": curve, "seconds": 1.0, "tests": pairs}

    row = bench_surgeons.summarise("es", [run(0, [1.0, 0.5, 0.9]), run(1, [0.6, 0.5, 0.7])])
    assert row["shares"] == pytest.approx([0.8, 0.6])
    assert row["over_zero"]["mean"] == pytest.approx(0.7)  # means over seeds: 0.8, 0.5, 0.8
    assert row["over_random"]["mean"] == pytest.approx((1.8 + 2.5 + 1.8) / 3)
    assert row["over_replay"]["mean"] == pytest.approx((0.3 + 0.5 + 0.3) / 3)
    assert row["over_replay"]["n"] == 3


@pytest.mark.slow
def test_it_trains_draws_and_reports(tmp_path: Path, run: Run) -> None:
    words = ["--lm", store_tiny_patient(tmp_path / "model"), "--surgeons", "es", "a2c"]
    words += ["--seeds", "0", "1", "--operations", "2", "--rows", "2", "--prompts", "2"]
    result = run(bench_surgeons, *words, "--tests", "3", "--n-new", "8")
    assert result["png"]
    injuries = {row["surgeon"]: row["injury"] for row in result["surgeons"]}
    assert injuries == {"es": "fixed", "a2c": "new each time"}
    assert all(len(row["shares"]) == 2 for row in result["surgeons"])
    for training in result["runs"]:
        assert [point["operations"] > 0 for point in training["curve"]] == [False, True]
        lost = [[row[1] for row in rows] for rows in training["tests"].values()]
        assert lost[0] == lost[1] == lost[2]  # the same tests for surgeon and controls
