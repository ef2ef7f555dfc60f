"""Tests of agents/tracking/wandb.py, with a fake of the library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.tracking.writer import Clock, MetricWriter, RunFolder

CLOCK = Clock(phase="joint", update=7, operation=3, forward_tokens=4096, seconds=1.5)
NUMBERS = {"update": 7, "operation": 3, "forward_tokens": 4096, "seconds": 1.5}


class FakeRun:
    def __init__(self) -> None:
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.settings = SimpleNamespace(sync_dir="runs/first/wandb/run-1")
        self.exit_codes: list[int] = []
        self.late: Exception | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        if self.late is not None:
            raise self.late


class FakeWandb:
    """What is used of the wandb module; `broken` has the modes in which `init` fails."""

    Settings = SimpleNamespace

    def __init__(self) -> None:
        self.run = FakeRun()
        self.broken: dict[str | None, Exception] = {}
        self.inits: list[dict[str, Any]] = []

    def init(self, **options: Any) -> FakeRun:
        self.inits.append(options)
        if error := self.broken.get(options["mode"]):
            raise error
        return self.run


@pytest.fixture(autouse=True)
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("MODE", "PROJECT", "DISABLE_WEAVE", "ERROR_REPORTING"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that it is restored after the test
        monkeypatch.delenv(f"WANDB_{name}")
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "first")


@pytest.mark.parametrize(
    ("track", "variable", "modes"),
    [
        ("off", None, []),
        ("off", "online", []),
        (None, None, []),
        (None, "", []),
        (None, "disabled", []),
        (None, "offline", [None]),  # any mode would override the variable
        ("offline", "online", ["offline"]),
    ],
)
def test_the_choice_decides_and_without_one_the_variable(
    folder: RunFolder,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    track: str | None,
    variable: str | None,
    modes: list[str | None],
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    with MetricWriter(folder, config={}, track=track) as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
        writer.write_summary({"seconds": 1.0})
    assert [options["mode"] for options in wandb.inits] == modes


def test_an_unknown_choice_is_refused_before_anything_is_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"track must be .*'offlin', did you mean 'offline'"):
        MetricWriter(folder, config={}, track="offlin")
    monkeypatch.setenv("WANDB_MODE", "quux")
    with pytest.raises(ValueError, match=r"WANDB_MODE must be .*'quux'"):
        MetricWriter(folder, config={})
    assert not folder.config.exists()


def test_the_run_stays_in_the_folder_and_records_nothing_but_the_run(
    folder: RunFolder, wandb: FakeWandb
) -> None:
    MetricWriter(folder, config={"seed": 3}, track="offline").close()
    (options,) = wandb.inits
    settings = vars(options.pop("settings"))
    assert options == {
        "dir": str(folder.path),
        "name": "first",
        "project": "avatarl-env",
        "config": {"seed": 3},
        "mode": "offline",
        "reinit": "create_new",
    }
    assert settings == {
        "silent": True,
        "console": "off",
        "disable_git": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "init_timeout": 20,
        "finish_timeout": 30,
        "finish_timeout_raises": True,
    }
    assert os.environ["WANDB_DISABLE_WEAVE"] == "true"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_numbers_are_logged_against_the_compute(folder: RunFolder, wandb: FakeWandb) -> None:
    row = {
        "commit/kept": True,
        "commit/kl_ref_gain": {"mean": 0.5, "low": float("nan")},
        "commit/coefficients": [0.1, 0.2],
        "surgeon/flatline": None,
    }
    with MetricWriter(folder, config={}, track="offline") as writer:
        writer.write("commit", CLOCK, row)
        writer.write_summary({"preset": "smoke", "validation": {"loss": 1.5}, "phases": []})
    assert wandb.run.logged == [{**NUMBERS, "commit/kept": True, "commit/kl_ref_gain/mean": 0.5}]
    assert wandb.run.defined == [("forward_tokens", None), ("*", "forward_tokens")]
    assert wandb.run.summary == {"validation/loss": 1.5}
    assert wandb.run.exit_codes == [0]


@pytest.mark.parametrize("error", [OSError("read-only\nmore"), KeyError("of theirs")])
@pytest.mark.parametrize("offline_too", [False, True])
def test_a_start_that_fails_goes_offline_and_then_on_without(
    error: Exception,
    offline_too: bool,
    folder: RunFolder,
    wandb: FakeWandb,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb.broken = {"online": error, **({"offline": LookupError()} if offline_too else {})}
    with MetricWriter(folder, config={}, track="online") as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
    assert [options["mode"] for options in wandb.inits] == ["online", "offline"]
    assert caplog.messages[0].endswith(f"({str(error).splitlines()[0]}): trying offline")
    without = [
        line.endswith("(LookupError): the run continues without it") for line in caplog.messages
    ]
    assert without == ([False, True] if offline_too else [False])
    assert len(wandb.run.logged) == (0 if offline_too else 1)
    assert len(list(folder.rows())) == 1


def test_an_upload_that_does_not_end_is_given_up_and_a_failure_reported(
    folder: RunFolder, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.run.late = TimeoutError("Timed out finishing run.")
    writer = MetricWriter(folder, config={}, track="online")
    with pytest.raises(RuntimeError, match="boom"), writer:
        raise RuntimeError("boom")
    writer.close()
    assert wandb.run.exit_codes == [1]
    (message,) = caplog.messages
    assert message.startswith("Weights & Biases did not finish (")
    assert "wandb sync runs/first/wandb/run-1" in message
