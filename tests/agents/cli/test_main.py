"""Tests of what the commands of `avatarl` have in common."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from agents.cli import COMMANDS
from agents.cli import main as cli
from agents.cli.main import avatarl
from agents.errors import BadInput, DivergedError, Stopped
from agents.training.config import TrainConfig, preset
from agents.training.summary import RunSummary
from tests.agents.fake_runs import make_run
from tests.patients import store_tiny_patient

ROOT = Path(cli.__file__).parents[2]


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line of a refusal, checked."""
    assert avatarl(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.rstrip("\n")


def fresh(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_them(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert avatarl(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: avatarl COMMAND ...\n")
    for name, purpose in COMMANDS.items():
        assert f"  {name:<10}{purpose}\n" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert avatarl([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: avatarl {name} ")
    assert importlib.import_module(f"agents.cli.{name}").__doc__.startswith("`avatarl ")


def test_help_loads_nothing_that_takes_long() -> None:
    heavy = "{'torch', 'transformers', 'stable_baselines3', 'wandb', 'plotly', 'scipy'}"
    done = fresh(
        "import sys",
        "from agents.cli.main import avatarl",
        "assert avatarl([]) == avatarl(['sample', '--help']) == avatarl(['export', '--help']) == 0",
        f"print({heavy} & set(sys.modules))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


def test_an_unknown_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "sampel")
    assert line.startswith("avatarl: error: command must be one of ")
    assert line.endswith("got 'sampel', did you mean 'sample'?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample"], "arguments must begin with RUN, see --help"),
        (["export"], "arguments must begin with RUN OUT, see --help"),
        (["report"], "folders must name at least one run, got none"),
        (["sample", "bundled", "more"], "arguments must be those that --help lists, got 'more'"),
        (
            ["evaluate", "bundled", "--jsn"],
            "arguments must be those that --help lists, got '--jsn', did you mean '--json'?",
        ),
        (["sample", "bundled", "--n", "x"], "--n: must be a whole number, got 'x'"),
        (["evaluate", "bundled", "--seed", "-1"], "seed must not be negative, got -1"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(capsys, *words) == f"avatarl {words[0]}: error: {message}"


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_a_model_that_is_not_there_is_refused_by_the_name_that_the_command_has_for_it(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [command, str(tmp_path), *(["out"] if command == "export" else [])]
    line = complaint(capsys, *words)
    assert line.startswith(f"avatarl {command}: error: run must be 'bundled', ")
    assert line.endswith(f"got {str(tmp_path)!r}")


def test_train_is_train_py(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[TrainConfig, str]] = []

    def train(config: TrainConfig, *, command: str) -> RunSummary:
        asked.append((config, command))
        metrics = {"accuracy": 0.5, "loss": 1.25, "entropy": 1.0}
        summary = {"validation": metrics, "seconds": 3.0, "surgeon_effect": {"verdict": "None."}}
        return RunSummary(Path("here"), summary)

    monkeypatch.setattr("agents.training.loop.train", train)
    words = ["--preset", "smoke", "--seed", "3", "--corpus", "two words.txt"]
    assert avatarl(["train", *words]) == 0
    first = capsys.readouterr().out
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first
    assert "\nvalidation: accuracy 50.0%, loss 1.250 nats/char, entropy 1.00 nats; 3 s\n" in first
    assert asked[0][0] == asked[1][0]
    assert (asked[0][0].seed, asked[0][0].lm) == (3, preset("smoke").lm)
    assert asked[0][1] == "avatarl train --preset smoke --seed 3 --corpus 'two words.txt'"
    assert asked[1][1] == "python train.py --preset smoke --seed 3 --corpus 'two words.txt'"
    assert complaint(capsys, "train", "--seed", "x") == (
        "avatarl train: error: --seed: must be a whole number, got 'x'"
    )


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (Stopped(signal.SIGINT, Path("here")), 130, "stopped; go on with: .*--resume here"),
        (Stopped(signal.SIGTERM, Path("here")), 143, "stopped; go on with: .*--resume here"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (DivergedError("loss is\nnan"), 1, "error: loss is nan"),
        (BadInput("no such\ntext"), 2, "error: no such text"),
    ],
)
def test_a_run_that_ends_early_says_how_in_one_line(
    end: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*_: object, **__: object) -> None:
        raise end

    monkeypatch.setattr("agents.training.loop.train", train)
    for prog, run in (("train.py", cli.main), ("avatarl train", lambda _: avatarl(["train"]))):
        assert run([]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"{prog}: {line}\n", err)


@pytest.mark.filterwarnings("default")
def test_interruption_and_warnings_are_one_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str) -> None:
        warnings.warn("it is late", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("avatarl_env.lm.storage.load_model", interrupted)
    assert avatarl(["sample", "bundled"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "avatarl sample: warning: it is late\navatarl sample: interrupted\n"


def test_a_reader_who_has_read_enough_is_no_error() -> None:
    """What is printed here is more than a pipe holds, and nobody reads it."""
    done = fresh(
        "import os, subprocess, sys",
        "script = ('import sys; import agents.cli as commands; '",
        "    'from agents.cli import main as cli; '",
        '    \'commands.COMMANDS["x" * 10**6] = "long"; sys.exit(cli.avatarl([]))\')',
        "writer = subprocess.Popen([sys.executable, '-c', script], stdout=-1, stderr=-1)",
        "writer.stdout.close()",
        "print(writer.stderr.read(), writer.wait())",
    )
    assert done.stdout == "b'' 141\n", done.stderr


def test_what_the_terminal_cannot_show_is_a_question_mark() -> None:
    done = fresh(
        "import sys",
        "import agents.cli as commands",
        "from agents.cli import main as cli",
        "sys.stdout.reconfigure(encoding='ascii')",
        "commands.COMMANDS['write'] = 'a caf\\u00e9'",
        "cli.avatarl([])",
    )
    assert "  write     a caf?\n" in done.stdout, done.stderr


def test_the_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"avatarl": "agents.cli.main:avatarl"}


# --- files and texts that nobody should trust ----------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["config.json", "summary.json", "references.json"])
def test_json_that_is_nested_too_deep_is_no_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run").folder
    (folder / name).write_text(DEEP, encoding="utf-8")
    assert f"valid JSON in {name}: it must be nested" in complaint(capsys, "report", str(folder))


@pytest.mark.parametrize("name", ["model.json", "config.json", "operation.json"])
def test_json_that_is_nested_too_deep_is_no_model_and_no_operation(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_tiny_patient(tmp_path)
    (tmp_path / name).write_text(DEEP, encoding="utf-8")
    words = ["--operation", str(tmp_path / name)] if name == "operation.json" else []
    words += ["--coefficients", "1"] if name == "config.json" else []
    assert "nested at most 100 deep" in complaint(capsys, "sample", str(tmp_path), *words)


def test_metrics_that_are_nested_too_deep_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run").folder
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(DEEP + "\n")
    assert avatarl(["report", str(folder)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "x" * 300],
        ["evaluate", "x" * 300],
        ["evaluate", "bundled", "--surgeon", "x" * 300],
        ["sample", "bundled", "--operation", "x" * 300],
        ["sample", "bundled", "--prompt-file", "x" * 300],
        ["export", "x" * 300, "out"],
        ["export", "bundled", "x" * 300],
        ["report", "x" * 300],
        ["train", "--resume", "x" * 300],
        ["train", "--corpus", "x" * 300],
        ["train", "--corpus", "playwright", "--preset", "smoke", "--out", "x" * 300],
    ],
)
def test_names_that_no_file_can_have_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AVATARL_DATA_DIR", raising=False)
    complaint(capsys, *words)


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no pseudo-terminals")
def test_a_terminal_is_not_sent_what_it_would_obey() -> None:
    """A file or a pipe gets every character as it is."""
    text = "a\x1b]0;owned\x07b\r\n\x9b1mc\rd\tcaf\u00e9\x7f"
    lines = (
        "import sys, warnings",
        "from agents.cli import main as cli",
        f"cli._show({text!r})",
        f"cli._show_warning('prog', {text!r})",
        f"cli._complain('prog', {text!r})",
    )
    terminal, end = os.openpty()
    words = [sys.executable, "-X", "utf8", "-c", "\n".join(lines)]
    subprocess.run(words, cwd=ROOT, stdout=end, stderr=end, check=True)
    os.close(end)
    shown = os.read(terminal, 4096).decode()
    os.close(terminal)
    escaped = "a\\x1b]0;owned\\x07b\r\n\\x9b1mc\\rd\tcaf\u00e9\\x7f"
    assert shown.replace("\r\r\n", "\r\n").count(escaped) == 3
    assert not {"\x1b", "\x07", "\x9b", "\x7f"} & set(shown)
    piped = subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    assert piped.stdout.decode() == text + "\n"
    assert piped.stderr.decode().count(text) == 2


def test_a_surrogate_is_no_reason_to_fail_where_ascii_is_all_there_is() -> None:
    code = (
        "import os, sys; from agents.cli.main import avatarl;"
        "sys.exit(avatarl(['sample', os.fsdecode(b'caf\\xe9')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"avatarl sample: error: run must be 'bundled', ")
    assert done.stderr.count(b"\n") == 1
