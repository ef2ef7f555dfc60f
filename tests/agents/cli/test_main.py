"""Tests of agents/cli/main.py: what the commands have in common."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.cli import COMMANDS
from agents.cli.main import avatarl, main
from agents.errors import BadInput, DivergedError, Stopped, printable
from agents.training.config import TrainConfig, preset
from agents.training.summary import RunSummary
from tests.agents.cli.commands import refused, shown

ROOT = Path(__file__).parents[3]
LONG = "x" * 300  # as the name of no file can be


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_them(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, *words)
    assert out.startswith("usage: avatarl COMMAND ...\n")
    for name, purpose in COMMANDS.items():
        assert f"  {name:<10}{purpose}\n" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, name, "--help").startswith(f"usage: avatarl {name} ")


def test_the_list_of_commands_imports_nothing_slow() -> None:
    code = (
        "import sys; from agents.cli import main; main.avatarl([]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.endswith(b"False\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampel"], "command must be one of .*, got 'sampel', did you mean 'sample'"),
        (["sample"], "Missing .* RUN"),
        (["export"], "Missing .* RUN .* OUT"),
        (["report"], "folders must name at least one run, got none"),
        (["sample", "bundled", "more"], "Unrecognized options: more"),
        (["evaluate", "bundled", "--jsn"], "Unrecognized options: --jsn, did you mean --json"),
        (["sample", "bundled", "--n", "x"], "--n: .*'x'"),
        (["evaluate", "bundled", "--seed", "-1"], "seed must not be negative, got -1"),
        (["sample", "no-model"], "^run must be 'bundled', .*, got 'no-model'"),
        (["evaluate", "no-model"], "^run must be 'bundled', .*, got 'no-model'"),
        (["export", "no-model", "out"], "^run must be 'bundled', .*, got 'no-model'"),
        # names that no file can have
        (["sample", LONG], "^run must be"),
        (["evaluate", LONG], "^run must be"),
        (["sample", "bundled", "--operation", LONG], LONG),
        (["sample", "bundled", "--prompt-file", LONG], "^prompt_file 'xxx"),
        (["export", LONG, "out"], "^run must be"),
        (["export", "bundled", LONG], "^out must be"),
        (["report", LONG], "xxx"),
        (["train", "--resume", LONG], "^resume must be"),
        (["train", "--corpus", LONG], "^corpus "),
        (["train", "--corpus", "playwright", "--preset", "smoke", "--out", LONG], "^out must be"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, *words))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, str]]:
    """Train nothing; collect what would have been trained, and by which command."""
    asked: list[tuple[TrainConfig, str]] = []

    def train(config: TrainConfig, *, command: str) -> RunSummary:
        asked.append((config, command))
        metrics = {"accuracy": 0.5, "loss": 1.25, "entropy": 1.0}
        summary = {"validation": metrics, "seconds": 3.0, "surgeon_effect": {"verdict": "None."}}
        return RunSummary(Path("here"), summary)

    monkeypatch.setattr("agents.cli.train.train", train)
    return asked


def test_train_is_train_py(
    trained: list[tuple[TrainConfig, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--preset", "smoke", "--seed", "3", "--corpus", "two words.txt"]
    assert main(words) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python3"])
    assert shown(capsys, "train", *words) == first.removesuffix("\n")
    assert "\nvalidation: accuracy 50.0%, loss 1.250 nats/char, entropy 1.00 nats; 3 s\n" in first
    assert first.endswith(f"\nNone.\nreport: {Path('here/report.html')}\n")
    (config, command), (again, other) = trained
    assert config == again
    assert (config.seed, config.lm) == (3, preset("smoke").lm)
    spelled = " train --preset smoke --seed 3 --corpus 'two words.txt'"
    assert command == f"avatarl{spelled}"
    assert other == f"python3 train.py{spelled.removeprefix(' train')}"


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (Stopped("stopped; resume with: ...", signal.SIGINT), 130, "stopped; .*"),
        (Stopped("stopped; resume with: ...", signal.SIGTERM), 143, "stopped; .*"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (DivergedError("loss is\nnan"), 1, "error: loss is nan"),
        (BadInput("no such\ntext"), 2, "error: no such text"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_run_that_ends_early_says_how_in_one_line(
    end: BaseException,
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*_: object, **__: object) -> None:
        warnings.warn("it is late", stacklevel=1)
        raise end

    monkeypatch.setattr("agents.cli.train.train", train)
    shown_before = warnings.showwarning
    for prog, run in (("train.py", main), ("avatarl train", lambda _: avatarl(["train"]))):
        assert run([]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"{prog}: warning: it is late\n{prog}: {line}\n", err)
    assert warnings.showwarning is shown_before


def test_of_torchruns_processes_only_the_first_prints(
    trained: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        for rank, expected in (("1", ""), ("0", "usage: avatarl")):
            monkeypatch.setenv("RANK", rank)
            assert avatarl([]) == 0
            assert avatarl(["sampel"]) == 2
            out, err = capsys.readouterr()
            assert (out[:14], err[:14]) == (expected, "avatarl: error" if expected else "")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_the_script_and_train_py_are_the_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"avatarl": "agents.cli.main:avatarl"}
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "smok"])
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert leave.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch("train.py: error: preset must be one of .*'smok'.*\n", err)


# --- where it prints to --------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_stdout_may_be_full_closed_or_read_no_longer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    full = "avatarl: error: stdout cannot be written: No space left on device\n"
    for place, code, line in (("/dev/full", 1, full), (writer, 141, "")):
        with open(place, "w", encoding="utf-8") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert avatarl([]) == code
        assert capsys.readouterr().err == line
    monkeypatch.setattr(sys, "stdout", None)
    assert avatarl([]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no pseudo-terminals")
def test_a_terminal_is_not_sent_what_it_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, end = os.openpty()
    name = os.fsdecode(b"caf\xe9\x1b]0;owned\x07")
    with open(end, "w", encoding="ascii", errors="backslashreplace") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert avatarl([name]) == 2
    line = os.read(terminal, 4096)
    os.close(terminal)
    assert line.startswith(b"avatarl: error: command must be one of ")
    assert b"owned" in line
    assert not {0x1B, 0x07, 0xE9} & set(line)


@pytest.mark.parametrize(
    ("is_terminal", "encoding", "expected"),
    [
        (True, "utf-8", "a\\x1b]0;b\\x07\r\n\\x9b1mc\\rd\tcaf\u00e9\\x7f"),
        (False, "utf-8", "a\x1b]0;b\x07\r\n\x9b1mc\rd\tcaf\u00e9\x7f"),
        (False, "ascii", "a\x1b]0;b\x07\r\n?1mc\rd\tcaf?\x7f"),
    ],
)
def test_control_characters_become_escapes_on_a_terminal_only(
    is_terminal: bool, encoding: str, expected: str
) -> None:
    stream: Any = SimpleNamespace(isatty=lambda: is_terminal, encoding=encoding)
    text = "a\x1b]0;b\x07\r\n\x9b1mc\rd\tcaf\u00e9\x7f"
    assert printable(text, stream) == expected
    assert printable(text, None) == text


# --- files that nobody should trust --------------------------------------------------------------
