"""Tests of agents/cli/evaluate.py, and of the commands export and report on a whole run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents.cli.main import avatarl
from agents.training.config import TrainConfig
from agents.training.loop import RunSummary, train
from avatarl_env.lm.hub import HubLM
from avatarl_env.lm.storage import load_model
from tests.patients import tiny_text
from tests.training_runs import QUICK_SAC, small_config, write_text


def learn(folder: Path, name: str, **changes: Any) -> RunSummary:
    config: TrainConfig = small_config(write_text(folder), folder / name, **changes)
    return train(config, quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """Train once, with a surgeon that learns."""
    options = {name: value for name, value in QUICK_SAC.items() if name != "policy_kwargs"}
    return learn(tmp_path_factory.mktemp("runs"), "run", surgeon="sac", surgeon_options=options)


def figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the JSON, which is all that stands on stdout."""
    assert avatarl(["evaluate", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    record: dict[str, Any] = json.loads(out)
    return record


def refused(capsys: pytest.CaptureFixture[str], command: str, *words: str) -> str:
    assert avatarl([command, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix(f"avatarl {command}: error: ").rstrip("\n")


def test_figures_are_those_of_the_run(run: RunSummary, capsys: pytest.CaptureFixture[str]) -> None:
    record = figures(capsys, str(run.folder))
    assert record == {
        "model": str(run.folder),
        "corpus": run.summary["corpus"],
        "corpus_sha256": run.summary["corpus_sha256"],
        "characters": 399,  # the last tenth of 4000, but its first
        "unknown_characters": 0,
        "validation": run.summary["validation"],
    }


def test_people_can_read_them(run: RunSummary, capsys: pytest.CaptureFixture[str]) -> None:
    assert avatarl(["evaluate", str(run.folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    metrics = run.summary["validation"]
    assert f" on 399 characters of {run.summary['corpus']} (validation)\n" in out
    assert f"\nloss           {metrics['loss']:.4f} nats/char\n" in out
    assert f"\naccuracy       {metrics['accuracy']:.4f}\n" in out
    assert "unknown" not in out


def test_another_text_may_be_named(
    run: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny_text(5000, seed=1)[:4990] + "ÄÖ" * 5, encoding="utf-8")
    record = figures(capsys, str(run.folder), "--corpus", str(other))
    assert record["characters"] == 499
    assert record["unknown_characters"] == 10
    assert record["validation"] != run.summary["validation"]
    assert avatarl(["evaluate", str(run.folder), "--corpus", str(other)]) == 0
    assert capsys.readouterr().out.endswith("\n10 characters are unknown to the model\n")


def test_a_saved_surgeon_operates_by_its_runs_rules(
    run: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default rules would not even fit the model's context of 32."""
    words = [str(run.folder), "--surgeon", str(run.folder)]
    effect = figures(capsys, *words)["surgeon_effect"]
    assert effect["surgeon"] == "sac"
    assert effect["verdict"].startswith("The surgeon ")
    assert "After training, sac's operations " in effect["verdict"]
    measured = effect["measurement"]
    assert (measured["n_operations"], measured["n_prompts"]) == (8, 256)
    for name in ("kl_ref_gain", "heldout_loss_fall"):
        assert {measured[name]["zero"][bound] for bound in ("mean", "low", "high")} == {0.0}
        interval = measured[name]["surgeon"]
        assert interval["low"] < interval["mean"] < interval["high"]
    # the same dice give the same figures, others give others
    final = str(run.folder / "checkpoints" / "final")
    again = figures(capsys, str(run.folder), "--surgeon", final)["surgeon_effect"]
    assert again["measurement"] == measured
    other = figures(capsys, *words, "--seed", "1")["surgeon_effect"]
    assert other["measurement"] != measured
    assert avatarl(["evaluate", *words]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{effect['verdict']}\n")


def test_a_surgeon_without_its_run_goes_by_the_rules_of_the_models(
    run: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.folder / "checkpoints" / "final", tmp_path / "alone")
    alone = str(tmp_path / "alone")
    moved = figures(capsys, str(run.folder), "--surgeon", alone)["surgeon_effect"]
    home = figures(capsys, str(run.folder), "--surgeon", str(run.folder))["surgeon_effect"]
    assert moved["measurement"] == home["measurement"]
    line = refused(capsys, "evaluate", alone, "--surgeon", alone)
    assert line.startswith("surgeon must be in the folder of its run, whose config.json says how")


def test_what_does_not_fit_together_is_refused(
    run: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "evaluate", str(run.folder), "--surgeon", str(tmp_path))
    assert line.startswith("surgeon must be a folder with a saved surgeon's surgeon.json, got ")
    line = refused(capsys, "evaluate", str(run.folder), "--device", "abacus")
    assert line.startswith("device must be one that torch has, got 'abacus'")
    line = refused(capsys, "evaluate", str(run.folder), "--corpus", "no/such.txt")
    assert line.startswith("corpus file 'no/such.txt' must exist")


def test_a_surgeon_that_does_not_fit_is_refused_before_anything_is_measured(
    run: RunSummary,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agents.evaluation.language_model.evaluate_text", None)  # cannot be called
    words = ["evaluate", str(run.folder), "--surgeon"]
    line = refused(capsys, "evaluate", "bundled", *words[2:], str(run.folder))
    assert re.match(r"surgeon must .*'action': 8.* got .*'action': 4", line)
    harms: dict[str, tuple[Callable[[Path], object], str]] = {
        "cut": (lambda f: (f / "checkpoints/final/surgeon.zip").write_bytes(b"PK"), "not a zip"),
        "operator": (lambda f: edit(f, operator="temprature"), "operator must be one of "),
        "rules": (lambda f: edit(f, operation=[]), "whose config.json says how it operates"),
        "rows": (lambda f: edit(f, curriculum={}), "whose config.json says how it operates"),
    }
    for name, (harm, message) in harms.items():
        folder = tmp_path / name
        shutil.copytree(run.folder, folder)
        harm(folder)
        assert message in refused(capsys, *words, str(folder))


def edit(folder: Path, **changes: object) -> None:
    """Change a run's configuration."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, **changes}), encoding="utf-8")


def test_a_run_is_exported(
    run: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert avatarl(["export", str(run.folder), out]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert shown == (
        f"exported to {out}: AutoModelForCausalLM.from_pretrained({out!r}), "
        f"AutoTokenizer.from_pretrained({out!r})\n"
    )
    assert isinstance(load_model(out).model, HubLM)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "It learned text.txt." in card
    capsys.readouterr()
    line = refused(capsys, "export", str(run.folder), out)
    assert line.startswith(f"out must be an empty or new folder, got {out!r} which holds ")


def test_a_model_of_transformers_is_neither_exported_nor_evaluated(
    run: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert avatarl(["export", str(run.folder), out]) == 0
    capsys.readouterr()
    assert avatarl(["export", out, str(tmp_path / "again")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"run must be a model of ours, {out!r} is one of transformers")
    assert not (tmp_path / "again").exists()
    line = refused(capsys, "evaluate", out)
    assert line == (
        "run must be a model of this package, whose tokens are characters, "
        f"got one of transformers in {out!r}"
    )


def test_a_report_is_written_again(run: RunSummary, capsys: pytest.CaptureFixture[str]) -> None:
    page = run.folder / "report.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert avatarl(["report", str(run.folder)]) == 0
    assert capsys.readouterr().out == f"{page.resolve()}\n"
    assert page.read_text(encoding="utf-8") == before


def test_several_runs_go_on_one_page(
    run: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.folder, other)
    page = tmp_path / "all.html"
    assert avatarl(["report", str(run.folder), str(other), "--out", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert page.stat().st_size > 1000


def test_a_folder_that_is_no_runs_gets_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "report", str(tmp_path))
    assert str(tmp_path) in line
    assert not list(tmp_path.iterdir())
