from __future__ import annotations

import io
import json
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import requests

from agents.cli import main as cli
from agents.cli.main import avatarl, main
from agents.grpo.learner import GRPOConfig, GRPOLearner
from agents.training.config import TrainConfig, preset
from agents.training.curriculum import Curriculum, CurriculumConfig
from agents.training.summary import RunSummary
from avatarl_env.text import corpus as corpus_module
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
    monkeypatch.setattr(corpus_module, "_BACK_OFF_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AVATARL_DATA_DIR", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def test_a_run_from_the_command_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(write_text(workplace), workplace / "out", **QUICK)
    words = flags(config)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "validation: accuracy " in out
    assert "nats/char, entropy " in out
    assert "No surgeon operated in this run" in out
    assert f"report: {workplace / 'out' / 'report.html'}" in out
    assert (workplace / "out" / "report.html").exists()
    summary = (workplace / "out" / "summary.json").read_text(encoding="utf-8")
    assert '"command": "python train.py --preset smoke --corpus ' in summary


class Trained(Exception):
    """Raised instead of training."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Collect what would have been trained."""
    configs: list[TrainConfig] = []

    def train(config: TrainConfig, **_: object) -> RunSummary:
        configs.append(config)
        raise Trained

    monkeypatch.setattr("agents.training.loop.train", train)
    return configs


def ask(asked: list[TrainConfig], *words: str) -> TrainConfig:
    with pytest.raises(Trained):
        main(list(words))
    return asked[-1]


def test_every_setting_has_a_flag(asked: list[TrainConfig], workplace: Path) -> None:
    config = small_config(
        "text.txt", "out", seed=7, surgeon="random", operator="spectral_bands", threads=2
    )
    words = flags(config)
    assert {"--operator", "--curriculum.n-rows"} <= set(words)
    assert ask(asked, *words) == config


def test_without_arguments_it_is_the_laptop(asked: list[TrainConfig]) -> None:
    assert ask(asked) == preset("laptop") == TrainConfig()


@pytest.mark.parametrize("name", ["smoke", "laptop", "full"])
@pytest.mark.parametrize("spelling", [["--preset", "{}"], ["--preset={}"]])
def test_a_preset_decides_the_defaults_wherever_it_stands(
    asked: list[TrainConfig], name: str, spelling: list[str]
) -> None:
    words = [word.format(name) for word in spelling]
    assert ask(asked, *words) == preset(name)
    config = ask(asked, "--seed", "5", *words, "--grpo.group-size", "3")
    assert (config.seed, config.grpo.group_size) == (5, 3)
    assert (config.preset, config.lm, config.curriculum) == (
        name,
        preset(name).lm,
        preset(name).curriculum,
    )


def test_underscores_will_do(asked: list[TrainConfig]) -> None:
    assert ask(asked, "--grpo.batch_size", "3").grpo.batch_size == 3


def test_help_lists_the_fields_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for flag in ("--preset", "--corpus", "--surgeon", "--seed", "--out", "--lm.n-heads"):
        assert flag in out
    for flag in ("--grpo.estimator", "--operation.injury", "--curriculum.commit"):
        assert flag in out


def test_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "full", "--help"]) == 0
    full = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert full != capsys.readouterr().out


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a refusal; check that it is one, and that nothing was written."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train.py: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == before
    return err.removeprefix("train.py: error: ").rstrip("\n")


REFUSALS = [
    # unknown names, with the closest
    (["--preset", "smok"], "preset must be one of", "got 'smok', did you mean 'smoke'?"),
    (
        ["--operator", "spectral-bands"],
        "operator must be one of",
        "got 'spectral-bands', did you mean 'spectral_bands'?",
    ),
    (["--surgeon", "sacc"], "surgeon must be one of", "got 'sacc', did you mean 'sac'?"),
    (["--surgeon-options"], "surgeon_options must be names and values in turn", "got none"),
    (["--surgeon-options", "--seed", "1"], "surgeon_options must be names and values", "got none"),
    (
        ["--grpo.estimator", "breir"],
        "grpo: estimator must be one of",
        "got 'breir', did you mean 'brier'?",
    ),
    (["--corpus", "playwrite"], "corpus must be one of", "(did you mean 'playwright'?)"),
    (["--track", "onlin"], "track must be one of", "got 'onlin', did you mean 'online'?"),
    (
        ["--curriculum.commit", "if-better"],
        "curriculum: commit must be one of",
        "got 'if-better', did you mean 'if_better'?",
    ),
    (["--operation.split", "test"], "operation: split must be one of", "got 'test'"),
    # combinations and sizes that cannot be
    (
        ["--grpo.estimator", "ce"],
        "grpo: exploration must be all_actions for ce",
        "got 'sampled'",
    ),
    (["--grpo.group-size", "0"], "grpo: group_size must be at least 1 for proper_maxrl", "got 0"),
    (
        ["--grpo.estimator", "brier", "--grpo.group-size", "2"],
        "grpo: group_size must be at least 3 for brier",
        "got 2",
    ),
    (["--grpo.horizon", "4"], "grpo: horizon must be 1 for proper_maxrl", "got 4"),
    (["--grpo.sync-every", "4"], "grpo: sync_every must be 1 for proper_maxrl", "got 4"),
    (
        ["--grpo.regularizer.partial-credit", "-1"],
        "grpo.regularizer: partial_credit must be finite and not negative",
        "got -1.0",
    ),
    (
        ["--curriculum.commit", "rollout"],
        "commit must be probe or if_better for proper_maxrl",
        "got 'rollout'",
    ),
    (
        ["--lm.n-heads", "3", "--lm.width", "128"],
        "lm: n_heads must divide width",
        "got width=128 and n_heads=3",
    ),
    (
        ["--lm.context", "64", "--operation.prompt-length", "30", "--operation.n-new", "40"],
        "prompt_length + n_new must fit the model's context of 64",
        "got 30 + 40",
    ),
    (["--curriculum.n-rows", "0"], "curriculum: n_rows must be an integer of at least 1", "got 0"),
    (["--seed", "-1"], "seed must be an integer of at least 0", "got -1"),
    (["--grpo.learning-rate", "nan"], "grpo: learning_rate must be positive", "got nan"),
    (
        ["--operation.episode-length", "1", "--operation.step-size", "0.5"],
        "operation: episode_length * step_size must be at least 1",
        "got 1 * 0.5",
    ),
    # flags that do not exist, values of the wrong kind, and missing ones
    (
        ["--surgeom", "sac"],
        "arguments must be those that --help lists",
        "got '--surgeom', did you mean '--surgeon'?",
    ),
    (
        ["--lm.nheads=4"],
        "arguments must be those that --help lists",
        "got '--lm.nheads=4', did you mean '--lm.n-heads'?",
    ),
    (["smoke"], "arguments must be those that --help lists", "got 'smoke'"),
    (["--seed", "x"], "--seed: must be a whole number", "got 'x'"),
    (["--lm.width", "64.5"], "--lm.width: must be a whole number", "got '64.5'"),
    (["--grpo.weight-decay", "a"], "--grpo.weight-decay: must be a number", "got 'a'"),
    (["--seed"], "Missing value for argument '--seed'", "Expected 1 values."),
    (
        ["--preset"],
        "preset must be one of ['full', 'laptop', 'seed_exhaustive', 'seed_sampled', 'smoke']",
        "got ''",
    ),
    (["--preset", "--seed", "3"], "preset must be one of", "got '--seed'"),
    (["--seed", "3", "--preset="], "preset must be one of", "got ''"),
    # the corpus
    (["--corpus", "no/such.txt"], "corpus file 'no/such.txt' must exist", "got no such file"),
    (
        ["--corpus", "tinyshakespeare"],
        "corpus 'tinyshakespeare' cannot be downloaded from https://",
        "set AVATARL_DATA_DIR=DIR",
    ),
    (["--corpus", "shakespeare"], "corpus 'shakespeare' cannot be downloaded", "DIR"),
]


@pytest.mark.parametrize(("words", "start", "end"), REFUSALS)
def test_bad_input_gets_one_line_and_code_2(
    words: list[str], start: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(words, capsys)
    assert line.startswith(start)
    assert line.endswith(end)


class Terminal(io.StringIO):
    """A stdout of some encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("words", [["--seed", "x"], ["--seed"], ["--surgeon", "sacc"]])
def test_the_line_does_not_depend_on_what_the_terminal_can_show(
    words: list[str],
    encoding: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = complaint(words, capsys)
    monkeypatch.setattr(sys, "stdout", Terminal(encoding))
    assert complaint(words, capsys) == expected
    assert not set(expected) & set("│─╭╰")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "must be a text, got an empty file"),
        (b"\x00\x01" * 4000, "must be UTF-8 text, got a binary file (NUL at byte 0)"),
        (b"a" * 3000 + b"\xff\xfe" * 3000, r"must be UTF-8 text, got b'\xff' at byte 3000"),
        (b"too short", "must have at least 2000 characters, got 9"),
    ],
    ids=["empty", "binary", "not-utf-8", "short"],
)
def test_a_text_that_is_none_is_refused(
    workplace: Path, content: bytes, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workplace / "text.txt"
    path.write_bytes(content)
    line = complaint(["--corpus", str(path), "--out", "out"], capsys)
    assert str(path) in line
    assert line.endswith(rule)


def test_a_folder_is_no_text(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(["--corpus", str(workplace)], capsys)
    assert line == f"corpus must be a text file, got the directory {workplace}"


def test_a_context_longer_than_a_split_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(workplace)  # its smallest split has 200 characters
    words = ["--corpus", str(path), "--lm.context", "300", "--out", "out"]
    assert complaint(words, capsys) == (
        f"context must be less than 200, the length of the 'surgeon' split of corpus '{path}', "
        "got 300"
    )


def test_a_folder_that_holds_something_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workplace / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    words = flags(small_config(write_text(workplace), out, **QUICK))
    assert complaint(words, capsys) == (
        f"out must be an empty or new folder, got '{out}' which holds notes.txt"
    )


def test_a_file_is_no_run_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_text(workplace)
    line = complaint(flags(small_config(path, path, **QUICK)), capsys)
    assert line == f"out must be an empty or new folder, got the file '{path}'"


def test_a_device_that_is_not_there_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(workplace)
    line = complaint(["--corpus", str(path), "--device", "abacus"], capsys)
    assert line.startswith("device must be one that torch has, got 'abacus': ")


def test_an_unknown_mode_of_wandb_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    words = ["--corpus", str(write_text(workplace)), "--out", "out"]
    line = complaint(words, capsys)
    assert line.startswith("WANDB_MODE must be one of ")
    assert "'ofline', did you mean 'offline'" in line


def test_a_message_of_several_lines_becomes_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> TrainConfig:
        raise ValueError("first\nsecond")

    monkeypatch.setattr("agents.training.config.preset", refuse)
    assert complaint([], capsys) == "first second"


def test_ctrl_c_ends_the_run_without_a_traceback(
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
    # What had been written by then stays.
    assert (out / "config.json").exists()
    kinds = [
        json.loads(line)["kind"]
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert kinds == ["evaluation", "sample", "sample", "grpo"]
    assert "has not finished" in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "summary.json").exists()


def test_a_fault_of_ours_keeps_its_traceback(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr(Curriculum, "steps", fail)
    with pytest.raises(ValueError, match=r"^boom$"):
        main(flags(small_config(write_text(workplace), workplace / "out", **QUICK)))


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_too(
    workplace: Path,
    asked: list[TrainConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(config: TrainConfig, **_: object) -> RunSummary:
        warnings.warn("corpus 'auto' uses the embedded play", stacklevel=1)
        raise Trained

    monkeypatch.setattr("agents.training.loop.train", train)
    shown = warnings.showwarning
    with pytest.raises(Trained):
        main([])
    assert capsys.readouterr().err == "train.py: warning: corpus 'auto' uses the embedded play\n"
    assert warnings.showwarning is shown  # nobody else's warnings are ours


def test_the_script_passes_the_exit_code_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(cli.__file__).parents[2] / "train.py"
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset"])
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(script), run_name="__main__")
    assert leave.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: error: preset must be one of")


def test_a_control_can_be_asked_for(asked: list[TrainConfig]) -> None:
    config = ask(asked, "--grpo.estimator", "ce", "--grpo.exploration", "all_actions")
    expected = preset("laptop").grpo
    assert config.grpo == GRPOConfig(
        **{**vars(expected), "estimator": "ce", "exploration": "all_actions"}
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--lm.width", "1000000000"],
        ["--grpo.batch-size", str(10**12)],
        ["--curriculum.n-rows", str(2**50)],
        ["--operation.n-prompts", str(10**12)],
        ["--curriculum.paired-prompts", str(10**12)],
        ["--surgeon-options", "buffer_size", str(10**12)],
    ],
)
def test_what_does_not_fit_the_memory_is_refused_before_it_is_built(
    words: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = str(write_text(workplace))
    line = complaint(["--preset", "smoke", "--corpus", corpus, "--out", "run", *words], capsys)
    assert " must fit the memory, " in line
    assert not (workplace / "run").exists()


def test_options_that_are_nested_too_deep_are_text(asked: list[TrainConfig]) -> None:
    deep = "[" * 60_000
    config = ask(asked, "--surgeon-options", "policy", deep)
    assert config.surgeon_options == {"policy": deep}


def test_names_that_are_not_text_are_names(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(workplace)
    corpus, out = (os.fsdecode(name) for name in (b"caf\xe9.txt", b"run\xff"))
    text.rename(corpus)
    config = small_config(corpus, out, **QUICK)
    assert main(flags(config)) == 0
    assert capsys.readouterr().err.count("Traceback") == 0
    settings = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    assert settings["corpus"] == os.path.abspath(corpus)
    assert (Path(out) / "report.html").exists()
    assert avatarl(["report", out, "--out", "page.html"]) == 0
    assert avatarl(["sample", out, "--length", "5"]) == 0
    before = sorted(os.listdir(b"."))
    assert avatarl(["export", out, os.fsdecode(b"model\xe9")]) == 2
    assert "whose name is UTF-8" in capsys.readouterr().err
    assert sorted(os.listdir(b".")) == before
