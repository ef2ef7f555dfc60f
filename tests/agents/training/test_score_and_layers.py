"""What the surgeon is paid for and where it operates, from the command line to the end of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.cli import main as cli
from agents.cli.train import read_config
from agents.training.build import LearningSetup, Setup
from agents.training.config import ModelConfig, TrainConfig, from_settings
from agents.training.following import Start, _Follower
from agents.training.loop import RunSummary, train
from tests.agents.training.broken_runs import QUICK, assert_same_run, rows
from tests.agents.training.test_resume import BrokenOff, break_off
from tests.training_runs import flags, small_config, write_text

CHOSEN: dict[str, Any] = {
    "score": {"kl_ref": 1.0, "heldout_loss": 20.0},
    "layers": (1,),
    "lm": ModelConfig(context=32, n_layers=2, n_heads=2, width=16),
    "surgeon_options": QUICK,
    "checkpoint_seconds": 0.0,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """Train once, with a score and layers of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(small_config(text, folder, **CHOSEN), quiet=True)


def read(*words: str) -> TrainConfig:
    return read_config(words, "train.py")


@pytest.mark.parametrize(
    ("words", "score", "layers"),
    [
        ([], {"kl_ref": 1.0}, None),
        (["--score", "heldout_loss"], {"heldout_loss": 1.0}, None),
        (
            ["--score", "kl_ref", "1", "heldout_loss", "20", "--layers", "0", "-1", "blocks.*"],
            {"kl_ref": 1.0, "heldout_loss": 20.0},
            (0, -1, "blocks.*"),
        ),
        (["--layers", "2", "--score", "entropy", "-0.5"], {"entropy": -0.5}, (2,)),
        (["--preset", "smoke", "--score", "distinct", "2"], {"distinct": 2.0}, None),
    ],
)
def test_they_are_read_as_words(
    words: list[str], score: dict[str, float], layers: tuple[int | str, ...] | None
) -> None:
    config = read(*words)
    assert (config.score, config.layers) == (score, layers)
    assert read(*flags(config)) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "klref"], "score must be one of [.*], got 'klref', did you mean 'kl_ref'?"),
        (["--score", "kl_ref", "nan"], "score['kl_ref'] must be a finite number, got nan"),
        (["--score"], "--score: must .*, got none"),
        (["--score", "kl_ref", "1", "kl_ref", "2"], "--score: must .*, got kl_ref 1 kl_ref 2"),
        (["--layers"], "layers must be None, or numbers, names or globs .*, got ()"),
        (["--layers", "3"], "layers must match attention layers of the model, got 3 (0: .*)"),
        (["--layers", "*.mlp"], "layers must match attention layers .*, got '*.mlp' (0: .*)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    glob: Callable[[str, str], bool],
) -> None:
    out = tmp_path / "run"
    assert cli.main(["--corpus", str(text), "--out", str(out), *words]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert glob(errors, f"train.py: error: {message}\n")
    assert not out.exists()


@pytest.fixture
def glob() -> Callable[[str, str], bool]:
    """Compare with words in which `.*` stands for anything, and all else for itself."""

    def matches(found: str, pattern: str) -> bool:
        start = 0
        for part in pattern.split(".*"):
            place = found.find(part, start)
            if place < 0:
                return False
            start = place + len(part)
        return start == len(found)

    return matches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": ["kl_ref"]}, r"score must be numbers, .*, got \['kl_ref'\]"),
        ({"score": {"kl_ref": "1"}}, r"score must be numbers, .*, got \{'kl_ref': '1'\}"),
        ({"score": {"kl_ref": True}}, r"score must be numbers, .*, got \{'kl_ref': True\}"),
        ({"score": {}}, "score must weigh at least one term, got none"),
        ({"layers": [1.5]}, r"layers must be None, or numbers, .*, got \[1.5\]"),
        ({"layers": [True]}, r"layers must be None, or numbers, .*, got \[True\]"),
        ({"layers": 1}, "layers must be None, or numbers, .*, got 1"),
        ({"layers": "blocks.*"}, "layers must be None, or numbers, .*, got 'blocks.*'"),
    ],
)
def test_other_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**changes)


def test_they_come_back_from_a_runs_settings() -> None:
    config = TrainConfig(score={"heldout_loss": 2}, layers=[0, "blocks.2.*"])  # type: ignore[arg-type]
    assert config.score == {"heldout_loss": 2.0}
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_settings(settings) == config
    del settings["score"], settings["layers"]  # a run of before
    assert from_settings(settings) == TrainConfig()


def test_they_act_wherever_a_run_operates(text: Path) -> None:
    config = small_config(text, **CHOSEN)
    setup = Setup(config)
    for env in (setup.env, setup.eval_env):
        assert env.task.score.weights == CHOSEN["score"]
        (target,) = env.operator.targets
        assert target.name == "blocks.1.attn"
    learning = LearningSetup(config)
    state = learning.learner.get_state()
    weights = dict(learning.learner.model.named_parameters())
    follower = _Follower(config, learning, Start(Path(), 0, 0, weights, state, None))
    (target,) = follower._operator.targets  # type: ignore[attr-defined]
    assert target.name == "blocks.1.attn"


def test_a_run_pays_and_stores_what_was_chosen(run: RunSummary) -> None:
    settings = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    for record in (settings, json.loads((run.folder / "summary.json").read_text("utf-8"))):
        assert record["score"] == CHOSEN["score"]
        assert record["layers"] == [1]
    paid = 0
    for row in rows(run.folder):
        if row["kind"] == "operation" and row["surgeon/flatline"] is None:
            gain = row["score/kl_ref"] - row["baseline/kl_ref"]
            gain += 20 * (row["baseline/heldout_loss"] - row["score/heldout_loss"])
            assert row["surgeon/return"] == pytest.approx(gain, abs=1e-5)
            paid += 1
    assert paid
    for effect in run.summary["surgeon_effect"]["measurements"]:
        assert effect["score"] == "kl_ref + 20 heldout_loss"
        assert effect["score_gain"]["zero"]["mean"] == 0.0
    assert "its own score (kl_ref + 20 heldout_loss)" in run.verdict


def test_a_resumed_run_has_them_too(
    run: RunSummary, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_off(patch, 8)
        with pytest.raises(BrokenOff):
            train(small_config(text, folder, **CHOSEN), quiet=True)
    with pytest.raises(ValueError, match=r"^score must be the run's own .*, got \{'entropy': 1.0"):
        train(TrainConfig(resume=str(folder), score={"entropy": 1.0}), quiet=True)
    train(TrainConfig(resume=str(folder), layers=(1,)), quiet=True)
    assert_same_run(folder, run.folder)


def test_evaluate_and_sample_go_by_them(
    run: RunSummary, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(run.folder)
    assert cli.avatarl(["evaluate", folder, "--surgeon", folder, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["surgeon_effect"]["measurement"]["score"] == "kl_ref + 20 heldout_loss"
    assert record["validation"]["calibration_error"] >= 0

    def sampled(*words: str) -> str:
        assert cli.avatarl(["sample", folder, "--length", "800", *words]) == 0
        return capsys.readouterr().out

    coefficients = [1.0, -1.0, 1.0, -1.0]
    chosen = sampled("--coefficients", *map(str, coefficients))
    texts = []
    for layers in ([0], [1], [0, 1]):
        path = tmp_path / "operation.json"
        path.write_text(json.dumps({"coefficients": coefficients, "layers": layers}))
        texts.append(sampled("--operation", str(path)))
    assert len(set(texts)) == 3  # so that there was a choice
    assert chosen == texts[1]


def test_a_weight_that_is_not_one_changes_what_is_paid(text: Path) -> None:
    env = Setup(small_config(text, **{**CHOSEN, "score": {"heldout_loss": 3.0}})).env
    env.reset(seed=0)
    *_, infos = env.step(torch.full(env.action_space.shape, 0.5).numpy())
    terms, before = infos["score_terms"], infos["baseline_terms"]
    fall = before["heldout_loss"] - terms["heldout_loss"]
    assert infos["improvement"] == pytest.approx(3.0 * fall, abs=1e-6)
