"""Tests of agents/cli/evaluate.py, and of the commands export and report on a whole run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents.training.summary import RunSummary
from avatarl_env.lm.hub import HubLM
from avatarl_env.lm.storage import load_model
from tests.agents.cli.commands import refused, shown
from tests.patients import tiny_text


@pytest.fixture
def folder(whole: RunSummary, tmp_path: Path) -> Path:
    """Copy a whole run, with a surgeon that learned, to do anything with."""
    return Path(shutil.copytree(whole.folder, tmp_path / "run"))


def figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the JSON, which is all that is printed."""
    line = shown(capsys, "evaluate", *words, "--json")
    assert "\n" not in line
    record: dict[str, Any] = json.loads(line)
    return record


def test_figures_are_those_of_the_run(
    whole: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    assert figures(capsys, str(whole.folder)) == {
        "model": str(whole.folder),
        "corpus": whole.summary["corpus"],
        "corpus_sha256": whole.summary["corpus_sha256"],
        "characters": 399,  # the last tenth of 4000, but its first
        "unknown_characters": 0,
        "validation": whole.summary["validation"],
    }


def test_another_text_may_be_named_and_people_can_read_the_figures(
    whole: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny_text(5000, seed=1)[:4990] + "ÄÖ" * 5, encoding="utf-8")
    words = [str(whole.folder), "--corpus", str(other)]
    record = figures(capsys, *words)
    assert (record["characters"], record["unknown_characters"]) == (499, 10)
    assert record["validation"] != whole.summary["validation"]
    out = shown(capsys, "evaluate", *words)
    assert f" on 499 characters of {other} (validation)\n" in out
    assert f"\nloss           {record['validation']['loss']:.4f} nats/char\n" in out
    assert f"\naccuracy       {record['validation']['accuracy']:.4f}\n" in out
    assert out.endswith("\n10 characters are unknown to the model")


def test_a_saved_surgeon_operates_by_the_rules_of_its_run(
    whole: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default rules would not even fit the model's context of 32."""
    words = [str(whole.folder), "--surgeon", str(whole.folder)]
    effect = figures(capsys, *words)["surgeon_effect"]
    assert effect["surgeon"] == "sac"
    assert effect["verdict"].startswith("The surgeon ")
    measured = effect["measurement"]
    for name in ("kl_ref_gain", "heldout_loss_fall"):
        assert {measured[name]["zero"][bound] for bound in ("mean", "low", "high")} == {0.0}
        interval = measured[name]["surgeon"]
        assert interval["low"] < interval["mean"] < interval["high"]
    # The same seed gives the same figures, another one gives others.
    final = str(whole.folder / "checkpoints" / "final")
    again = figures(capsys, str(whole.folder), "--surgeon", final)["surgeon_effect"]
    assert again["measurement"] == measured
    other = figures(capsys, *words, "--seed", "1")["surgeon_effect"]
    assert other["measurement"] != measured
    assert shown(capsys, "evaluate", *words).endswith(f"\n\n{effect['verdict']}")


def test_a_surgeon_without_its_run_operates_by_the_rules_of_the_model(
    whole: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(whole.folder / "checkpoints" / "final", tmp_path / "alone")
    moved = figures(capsys, str(whole.folder), "--surgeon", str(alone))["surgeon_effect"]
    home = figures(capsys, str(whole.folder), "--surgeon", str(whole.folder))["surgeon_effect"]
    assert moved["measurement"] == home["measurement"]
    line = refused(capsys, "evaluate", str(alone), "--surgeon", str(alone))
    assert line.startswith("surgeon must be in the folder of its run")


def edit(folder: Path, **changes: object) -> None:
    """Change a run's configuration."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: shutil.rmtree(f / "checkpoints"), "surgeon must be a folder with a saved"),
        (lambda f: (f / "checkpoints/final/surgeon.zip").write_bytes(b"PK"), "not a zip"),
        (lambda f: edit(f, operator="temprature"), "operator must be one of "),
        (lambda f: edit(f, operation=[]), "whose config.json has its rules"),
        (lambda f: edit(f, curriculum={}), "whose config.json has its rules"),
    ],
    ids=["none", "cut", "operator", "rules", "rows"],
)
def test_a_surgeon_that_does_not_fit_is_refused_before_anything_is_measured(
    harm: Callable[[Path], object],
    message: str,
    whole: RunSummary,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agents.cli.evaluate.evaluate_text", None)  # cannot be called
    harm(folder)
    words = [str(whole.folder), "--surgeon", str(folder)]
    assert message in refused(capsys, "evaluate", *words)


def test_a_run_is_exported_and_what_was_exported_is_not(
    whole: RunSummary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(whole.folder), str(tmp_path / "out")
    assert shown(capsys, "export", run, out) == (
        f"exported to {out}: AutoModelForCausalLM.from_pretrained({out!r}), "
        f"AutoTokenizer.from_pretrained({out!r})"
    )
    assert isinstance(load_model(out).model, HubLM)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "It was trained on text.txt." in card
    capsys.readouterr()
    line = refused(capsys, "export", run, out)
    assert line.startswith(f"out must be an empty or new folder, got {out!r} which holds ")
    line = refused(capsys, "evaluate", out)
    assert line == f"run must be a model of this package, {out!r} is one of transformers"
    assert cli_line(capsys, "export", out, str(tmp_path / "again")).endswith(line)
    assert not (tmp_path / "again").exists()


def cli_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the last line of a refusal, after what transformers prints."""
    from agents.cli.main import avatarl

    assert avatarl(words) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_reports_are_written_again_and_runs_compared(
    whole: RunSummary, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, all_runs = folder / "report.html", tmp_path / "all.html"
    page.unlink()
    assert shown(capsys, "report", str(folder)) == str(page.resolve())
    assert page.exists()
    lines = shown(capsys, "report", str(whole.folder), str(folder), "--out", str(all_runs))
    assert lines.splitlines()[-1] == str(all_runs)
    assert all_runs.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(capsys, "report", str(empty))
    assert not list(empty.iterdir())
