from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons import make_surgeon
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from benchmarks import positive_control
from tests.patients import store_tiny_patient, tiny_env, tiny_patient
from tests.training_runs import ScriptedSurgeon, small_env


def test_the_share_and_its_interval() -> None:
    rows = np.array([[0.5, 1.0], [1.0, 2.0], [0.25, 0.5]])
    assert positive_control.share(rows) == 0.5
    assert positive_control.share_interval(rows) == pytest.approx((0.5, 0.5))
    low, high = positive_control.share_interval(np.array([[0.0, 1.0], [1.0, 1.0]] * 20))
    assert low < 0.5 < high


def test_the_share_of_too_few_operations_has_no_interval() -> None:
    rows = np.array([[0.5, 1.0], [0.5, -0.9]])
    assert np.isnan(positive_control.share_interval(rows)).all()


def test_operations_are_examined_each_on_an_injury_of_its_own() -> None:
    patient = tiny_patient()
    sizes: dict[str, Any] = {"injury": 0.5, "n_incisions": 2, "n_prompts": 4, "n_new": 8}
    env = AttentionSurgeryVectorEnv(3, patient, autoreset_mode="NextStep", prompt_length=8, **sizes)
    practice = AttentionSurgeryVectorEnv(3, patient, prompt_length=8, **sizes)
    rows = positive_control.examine(ScriptedSurgeon(practice, 0.2), env)
    # What the single environment says of the second one.
    single = tiny_env(patient, **sizes)
    single.reset(seed=positive_control.TEST_SEED + 1)
    for _ in range(2):
        *_, info = single.step(np.full(4, 0.2, np.float32))
    assert rows[1].tolist() == pytest.approx([info["improvement"], info["lost_score"]], abs=1e-4)
    assert len(set(rows[:, 1].tolist())) == 3


@pytest.mark.parametrize(
    ("n_operations", "n_rows", "expected"),
    [(3, 2, [4]), (60, 8, [32, 64]), (5, 8, [8]), (70, 32, [32, 64, 96])],
)
def test_the_curve_has_a_point_every_so_many_operations(
    n_operations: int, n_rows: int, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    env = small_env(n_rows=n_rows, n_incisions=1, step_size=1.0, n_prompts=2, injury=0.5)
    surgeon = make_surgeon("zero", env, 0)
    curve = positive_control.train(surgeon, n_operations, n_rows)
    assert [point["operations"] for point in curve] == expected
    assert [point["share"] for point in curve] == [0.0] * len(expected)
    assert capsys.readouterr().out.count("operations: share regained ") == len(expected)


def test_it_trains_tests_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = store_tiny_patient(tmp_path / "model")
    out = tmp_path / "result.json"
    arguments = ["--lm", lm, "--surgeon", "zero", "--operations", "3", "--tests", "2"]
    arguments += ["--rows", "2", "--n-new", "8", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["positive_control.py", *arguments])
    positive_control.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert result.keys() >= {"command", "commit", "curve", "lost_score", "seconds", "threads"}
    assert result["settings"]["rows"] == 2
    assert [point["operations"] for point in result["curve"]] == [4]  # whole rounds
    assert result["test"].keys() == {"trained", "random", "zero"}
    assert result["test"]["trained"]["share"] == 0.0
    assert result["test"]["random"]["gain_over_this"]["n"] == 2
