"""Tests of agents/cli/train.py: what becomes of a command line, and whole runs from one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import requests

from agents.cli.main import avatarl, main
from agents.cli.train import read_config
from agents.grpo.learner import GRPOLearner
from agents.training.config import TrainConfig, preset
from agents.training.curriculum import CurriculumConfig
from agents.training.presets import PRESETS
from tests.agents.cli.commands import refused, shown
from tests.training_runs import flags, small_config, write_text

QUICK: dict[str, Any] = {
    "surgeon": "none",
    "curriculum": CurriculumConfig(bootstrap_updates=2, joint_rounds=0, surgery_rounds=0),
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, without a network, a cache or a data folder."""

    def unreachable(*_: object, **__: object) -> None:
        raise requests.ConnectionError("no route\nto host")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts to download
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AVATARL_DATA_DIR", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def read(*words: str) -> TrainConfig:
    return read_config(words, "train.py")


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the line of a refusal that leaves nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    line = refused(capsys, "train", *words)
    assert sorted(Path.cwd().rglob("*")) == before
    return line


def test_a_run_from_the_command_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(small_config(write_text(workplace), workplace / "out", **QUICK))) == 0
    out = capsys.readouterr().out
    assert "validation: accuracy " in out
    assert "No surgeon operated in this run" in out
    assert f"report: {workplace / 'out' / 'report.html'}\n" in out
    assert (workplace / "out" / "report.html").exists()
    summary = json.loads((workplace / "out" / "summary.json").read_text(encoding="utf-8"))
    assert " --preset smoke --corpus " in summary["command"]


# --- what the words mean -------------------------------------------------------------------------


def test_every_setting_has_a_flag() -> None:
    config = small_config(
        "text.txt",
        "out",
        seed=7,
        surgeon="random",
        operator="spectral_bands",
        threads=2,
        layers=(0, -1, "blocks.*"),
        score={"kl_ref": 1.0, "entropy": -0.5},
    )
    words = flags(config)
    assert {"--operator", "--curriculum.n-rows", "--score"} <= set(words)
    assert read(*words) == config


@pytest.mark.parametrize("words", [[], *(["--preset", name] for name in PRESETS)])
def test_a_preset_gives_the_defaults(words: list[str]) -> None:
    usual = preset(words[-1] if words else "laptop")
    assert read(*words) == usual
    config = read("--seed", "5", *words, "--grpo.group_size", "3")  # underscores are accepted
    assert (config.seed, config.grpo.group_size) == (5, 3)
    assert (config.preset, config.lm, config.curriculum) == (
        usual.preset,
        usual.lm,
        usual.curriculum,
    )


def test_help_shows_every_flag_with_the_defaults_of_the_preset(
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = shown(capsys, "train", "--preset", "full", "--help")
    usual = shown(capsys, "train", "--help")
    for flag in [word for word in flags(preset("laptop")) if word.startswith("--")]:
        assert flag in usual
    assert "--lm.width INT" in usual
    assert full != usual


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["learning_rate", "3e-4", "policy", "MlpPolicy"], [3e-4, "MlpPolicy"]),
        (["net", "[8, 8]", "use_sde", "true"], [[8, 8], True]),
        (["policy", "[" * 60_000], ["[" * 60_000]),  # too deep for JSON
    ],
)
def test_options_of_a_surgeon_are_json_or_text(words: list[str], options: list[Any]) -> None:
    assert [*read("--surgeon-options", *words).surgeon_options.values()] == options


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        # unknown names, with the closest
        (["--preset", "smok"], "preset must be one of", "got 'smok', did you mean 'smoke'?"),
        (["--operator", "spectral-bands"], "operator must", "did you mean 'spectral_bands'?"),
        (["--surgeon", "sacc"], "surgeon must", "got 'sacc', did you mean 'sac'?"),
        (["--grpo.estimator", "breir"], "grpo: estimator must", "did you mean 'brier'?"),
        (["--corpus", "playwrite"], "corpus must be one of", "did you mean 'playwright'?"),
        (["--track", "onlin"], "track must", "got 'onlin', did you mean 'online'?"),
        (["--curriculum.commit", "if-better"], "curriculum: commit must", "mean 'if_better'?"),
        (["--score", "klref"], "score must be one of", "got 'klref', did you mean 'kl_ref'?"),
        # combinations and sizes
        (["--grpo.estimator", "ce"], "grpo: exploration must be all_actions", "got 'sampled'"),
        (["--lm.n-heads", "7"], "lm: n_heads must divide width", "n_heads=7"),
        (["--operation.n-new", "400"], "prompt_length + n_new must fit", "got 32 + 400"),
        (["--seed", "-1"], "seed must be an integer of at least 0", "got -1"),
        (["--curriculum.commit", "rollout"], "commit must be probe or if_better", "'rollout'"),
        # flags that do not exist, values of the wrong kind, and missing ones
        (["--surgeom", "sac"], "Unrecognized options: --surgeom", "did you mean --surgeon?"),
        (["--lm.nheads=4"], "Unrecognized options: --lm.nheads=4", "mean --lm.n-heads?"),
        (["smoke"], "Unrecognized options:", "smoke"),
        (["--seed", "x"], "--seed: ", "'x'"),
        (["--grpo.weight-decay", "a"], "--grpo.weight-decay: ", "'a'"),
        (["--seed"], "Missing value for argument '--seed'", ""),
        (["--preset"], "Missing value for argument '--preset'", ""),
        (["--preset="], "preset must be one of", "got ''"),
        (["--surgeon-options"], "--surgeon-options: must be pairs of name and value", "got none"),
        (["--surgeon-options", "--seed", "1"], "--surgeon-options: must be pairs", "got none"),
        (["--score", "kl_ref", "1", "entropy"], "--score: must be pairs", "kl_ref 1 entropy"),
        (["--score", "kl_ref", "x"], "--score: ", "'x'"),
        (["--score", "kl_ref", "nan"], "score['kl_ref'] must be a finite number", "got nan"),
        # the corpus and the run to resume
        (["--corpus", "no/such.txt"], "corpus file 'no/such.txt' must exist", "no such file"),
        (["--corpus", "."], "corpus must be a text file, got the directory", ""),
        (["--corpus", "tinyshakespeare"], "corpus 'tinyshakespeare' cannot be downloaded", "DIR"),
        (["--resume", "."], "resume must be a run folder with a config.json", "got '.'"),
    ],
)
def test_bad_input_gets_one_line(
    words: list[str], start: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, *words)
    assert line.startswith(start)
    assert line.endswith(end)


@pytest.mark.parametrize("words", [["--seed", "x"], ["--seed"], ["--surgeom", "sacc"]])
def test_the_line_does_not_depend_on_what_the_terminal_can_show(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = complaint(capsys, *words)
    assert not set(expected) & set("│─╭╰")
    with Path(os.devnull).open("w", encoding="ascii") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        assert complaint(capsys, *words) == expected


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--lm.context", "300"], "context must be less than 200, .*'surgeon' split.* got 300"),
        (
            ["--operator", "spectral_bands", "--lm.width", "2", "--lm.n-heads", "1"],
            "n_bands must be .*got 4",
        ),
        (["--layers", "3"], "layers must match attention layers of the model, got 3"),
        (["--layers", "*.mlp"], r"layers must match attention layers .*\*\.mlp"),
        (["--device", "abacus"], "device must be one that torch has, got 'abacus'"),
        (["--device", "meta"], "device must be one that torch has, got 'meta'"),
        (["--surgeon-options", "learning_rte", "1"], "sac option .*learning_rte"),
        (["--lm.width", "1000000000"], "must fit the memory"),
        (["--grpo.batch-size", str(10**12)], "must fit the memory"),
        (["--curriculum.n-rows", str(2**50)], "must fit the memory"),
        (["--operation.n-prompts", str(10**12)], "must fit the memory"),
        (["--curriculum.paired-prompts", str(10**12)], "must fit the memory"),
        (["--surgeon-options", "buffer_size", str(10**12)], "must fit the memory"),
        (["--out", "used"], "out must be an empty or new folder, got 'used' which holds notes"),
        (["--out", "text.txt"], "out must be an empty or new folder, got the file 'text.txt'"),
    ],
)
def test_what_does_not_fit_the_text_or_the_machine_leaves_no_run(
    words: list[str], rule: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(workplace)  # its smallest split has 200 characters
    (workplace / "used").mkdir()
    (workplace / "used" / "notes").touch()
    basis = ["--preset", "smoke", "--corpus", "text.txt", "--out", "run"]
    assert re.search(rule, complaint(capsys, *basis, *words))


# --- runs that end early, and odd names ----------------------------------------------------------


def test_ctrl_c_ends_the_run_in_one_line_and_keeps_what_was_written(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = GRPOLearner.update, []

    def interrupted(self: GRPOLearner, *operated: Any) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(self, *operated)

    monkeypatch.setattr(GRPOLearner, "update", interrupted)
    out = workplace / "out"
    assert main(flags(small_config(write_text(workplace), out, **QUICK))) == 130
    err = capsys.readouterr().err
    assert err.endswith("train.py: interrupted\n")
    assert "Traceback" not in err
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["evaluation", "sample", "sample", "grpo"]
    assert "has not finished" in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "summary.json").exists()


def test_names_that_are_not_text_are_names(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(workplace)
    corpus, out = (os.fsdecode(name) for name in (b"caf\xe9.txt", b"run\xff"))
    text.rename(corpus)
    assert main(flags(small_config(corpus, out, **QUICK))) == 0
    assert capsys.readouterr().err.count("Traceback") == 0
    settings = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    assert settings["corpus"] == os.path.abspath(corpus)
    assert avatarl(["report", out, "--out", "page.html"]) == 0
    assert avatarl(["sample", out, "--length", "5"]) == 0
    capsys.readouterr()
    before = sorted(os.listdir(b"."))
    assert "whose name is UTF-8" in refused(capsys, "export", out, os.fsdecode(b"model\xe9"))
    assert sorted(os.listdir(b".")) == before
