"""Tests of agents/training/logger.py: the rows, samples and progress of a run."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from agents.distributed import ALONE
from agents.surgeons.registry import EpisodeRecord
from agents.tracking.run_folder import RunFolder
from agents.tracking.writer import MetricWriter
from agents.training.best_model import BestModel
from agents.training.build import build
from agents.training.curriculum import Phase
from agents.training.logger import WRITE_EVERY, RunLogger
from agents.training.loop import train
from agents.training.summary import RunSummary
from avatarl_env.lm.storage import load_model
from avatarl_env.text.corpus import load_corpus
from tests.training_runs import rows_of, small_config, small_curriculum

JOINT = Phase("joint", 2, updates=3, operations=2, commits=True)
RECORD = EpisodeRecord(
    0.125, 2, 0.5, np.array([0.1, -0.2, 0.3, 1.0]), None, {"kl_ref": -2.0}, {"kl_ref": -3.0}, 0.75
)


def test_every_row_says_where_the_run_stood(whole: RunSummary) -> None:
    rows = rows_of(whole)
    kinds = {row["kind"] for row in rows}
    assert kinds == {"grpo", "evaluation", "operation", "surgeon", "commit", "sample"}
    for clock in ("update", "operation", "forward_tokens", "seconds"):
        values = [row[clock] for row in rows]
        assert values == sorted(values)
    assert rows[-1]["update"] == 10
    assert rows[-1]["operation"] == len(rows_of(whole, "operation"))
    assert rows[-1]["forward_tokens"] == whole.summary["forward_tokens"]


def test_updates_are_rows_of_finite_numbers(whole: RunSummary) -> None:
    rows = rows_of(whole, "grpo")
    assert [row["update"] for row in rows] == [1, WRITE_EVERY, 2 * WRITE_EVERY]
    assert [row["phase"] for row in rows] == ["bootstrap", "bootstrap", "joint"]
    for row in rows:
        numbers = {name: x for name, x in row.items() if name.startswith("grpo/")}
        assert numbers.keys() >= {"grpo/loss", "grpo/reward", "grpo/accuracy", "grpo/skipped"}
        assert np.isfinite(list(numbers.values())).all()
        assert numbers["grpo/grad_norm"] > 0
        assert row["time/tokens_per_second"] > 0
    # A batch is 4 windows of 32, forward and backward: three times a forward.
    assert [row["forward_tokens"] for row in rows[:2]] == [n * 3 * 4 * 32 for n in (1, 5)]


def test_operations_are_rows_with_their_terms(whole: RunSummary) -> None:
    rows = rows_of(whole, "operation")
    # Two rounds in each of two phases, each of two operations on each of three rows; more where
    # a flatline ends an operation after the first of its two steps.
    assert len(rows) >= 24
    assert 24 * 2 - 12 <= sum(row["surgeon/length"] for row in rows) <= 24 * 2
    assert [row["operation"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert len(row["surgeon/coefficients"]) == 4
        assert row["surgeon/lost_score"] == 0
        if row["surgeon/flatline"] is None:  # paid for its own work only, also between updates
            gain = row["score/kl_ref"] - row["baseline/kl_ref"]
            assert row["surgeon/return"] == pytest.approx(gain, abs=1e-9)
    learned = rows_of(whole, "surgeon")
    assert [row["phase"] for row in learned] == ["surgery", "surgery", "joint", "joint"]
    for row in learned[1:]:
        assert np.isfinite([row["surgeon/actor_loss"], row["surgeon/critic_loss"]]).all()


def test_the_model_is_evaluated_at_intervals_and_at_the_end_of_phases(whole: RunSummary) -> None:
    rows = rows_of(whole, "evaluation")
    assert [row["update"] for row in rows] == [0, 4, 6, 8, 10]
    final = {name.removeprefix("validation/"): value for name, value in rows[-1].items()}
    assert final.items() >= whole.summary["validation"].items()  # a text so short is read whole
    best = min(rows, key=lambda row: row["validation/loss"])
    assert whole.summary["best"] == {"update": best["update"], "loss": best["validation/loss"]}
    about = load_model(str(whole.folder / "checkpoints" / "best")).about
    assert (about["update"], about["loss"]) == (best["update"], best["validation/loss"])


def test_a_phase_is_summed_up_by_its_first_and_last_numbers(whole: RunSummary) -> None:
    bootstrap, surgery, joint = whole.summary["phases"]
    for phase in (bootstrap, surgery, joint):
        assert phase["seconds"] > 0
        assert phase["first"].keys() == phase["last"].keys()
    first, last = (row["grpo/loss"] for row in rows_of(whole, "grpo")[:2])
    assert (bootstrap["first"]["grpo/loss"], bootstrap["last"]["grpo/loss"]) == (first, last)
    returns = [row["surgeon/return"] for row in rows_of(whole, "operation")]
    assert surgery["first"]["surgeon/return"] == returns[0]
    assert joint["last"]["surgeon/return"] == returns[-1]
    assert "grpo/loss" not in surgery["first"]
    assert "validation/loss" not in surgery["last"]  # the model is as it was


def test_commits_are_rows_and_are_summed_up(whole: RunSummary) -> None:
    rows, summary = rows_of(whole, "commit"), whole.summary["commits"]
    assert (summary["policy"], summary["tried"]) == ("if_better", 2)
    assert summary["kept"] == sum(row["commit/kept"] for row in rows)
    assert summary["expected_false_at_most"] == pytest.approx(0.1)  # one in twenty of two
    for row, operation in zip(rows, summary["operations"], strict=True):
        assert (operation["phase"], operation["update"]) == ("joint", row["update"])
        for name in ("kept", "kl_ref_gain", "heldout_loss_fall", "coefficients"):
            assert operation[name] == row[f"commit/{name}"]
        assert row["commit/kl_ref_gain"]["n"] == 4


def test_samples_share_prompts_and_noise(whole: RunSummary) -> None:
    rows = rows_of(whole, "sample")
    assert [row["phase"] for row in rows] == [
        phase for phase in ("bootstrap", "bootstrap", "surgery", "joint") for _ in range(2)
    ]
    assert [row["prompt"] for row in rows] == [rows[0]["prompt"], rows[1]["prompt"]] * 4
    assert {len(row["text"]) for row in rows} == {24}
    texts = [row["text"] for row in rows]
    start, bootstrap, surgery, joint = (texts[i : i + 2] for i in (0, 2, 4, 6))
    # The same model writes the same again; the operated one something else.
    assert start != bootstrap == surgery != joint
    assert [row["operated_text"] for row in rows[:4]] == [None] * 4
    assert [row["operated_text"] for row in rows[4:]] != surgery + joint
    assert all(len(row["operated_text"]) == 24 for row in rows[4:])
    text = (whole.folder / "samples.txt").read_text(encoding="utf-8")
    assert all(row["text"] in text for row in rows)


def test_progress_shows_the_latest_numbers(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curriculum = small_curriculum(bootstrap_updates=1, surgery_rounds=0, joint_rounds=1)
    config = small_config(text, tmp_path / "run", surgeon="random", curriculum=curriculum)
    run = train(config)
    out, err = capsys.readouterr()
    assert str(text) in out
    assert "surgeon random" in out
    assert "surgeon's effect after joint" in out
    last = err.rsplit("\r", 1)[-1]
    assert "joint: 100%" in last
    assert "8/8" in last  # two updates, and two operations on each of three rows
    commits = run.summary["commits"]
    assert f"commits={commits['kept']}/{commits['tried']}" in last
    accuracy = rows_of(run, "evaluation")[-1]["validation/accuracy"]
    assert f"accuracy={accuracy:.3f}" in last
    mean = np.mean([row["surgeon/return"] for row in rows_of(run, "operation")])
    assert f"operation={mean:+.4f}" in last
    assert "loss=" in last
    assert "reward=" in last


def test_speed_is_that_of_updates_alone(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    parts = build(small_config(text, surgeon="random"), load_corpus(str(text)), ALONE)
    folder = RunFolder(tmp_path / "run")
    best = BestModel(folder.path / "best", parts.patient.model, parts.tokenizer, {})
    with MetricWriter(folder, config={}, track="off") as writer:
        log = RunLogger(writer, parts, best, quiet=True)
        log.begin(JOINT)
        for _ in range(5):
            now[0] += 2.0
            log.update(parts.curriculum.update())
            now[0] += 50.0
            log.operations([RECORD])
            log.operations([])  # a round may have no finished operation
            now[0] += 10.0
            log.behavior(RECORD._replace(total=0.5))
        assert log.end()["seconds"] == log.seconds == 310.0
    rates = [row["time/tokens_per_second"] for row in folder.rows() if row["kind"] == "grpo"]
    assert rates == [64.0, 64.0]  # 4 windows of 32 tokens in two seconds
