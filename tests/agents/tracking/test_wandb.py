from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.tracking.writer import Clock, MetricWriter, RunFolder

CLOCK = Clock(phase="joint", update=7, operation=3, forward_tokens=4096, seconds=1.5)
CLOCK_NUMBERS = {"update": 7, "operation": 3, "forward_tokens": 4096, "seconds": 1.5}


class WandbError(Exception):
    """Stands for wandb.Error, from which all errors of wandb derive."""


class FakeRun:
    def __init__(self) -> None:
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.settings = SimpleNamespace(sync_dir="runs/first/wandb/run-1")
        self.exit_codes: list[int] = []
        self.error: Exception | None = None
        self.late: Exception | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, data: dict[str, Any], **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.logged.append((data, options))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        if self.late is not None:
            raise self.late


class FakeWandb:
    """What is used of the wandb module; `broken` lists the modes in which `init` fails."""

    Error = WandbError
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
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for variable in ("WANDB_DISABLE_WEAVE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(variable, "")  # so that it is as it was, after the test
        monkeypatch.delenv(variable)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "first")


@pytest.mark.parametrize(
    ("track", "variable"),
    [("off", None), ("off", "online"), (None, None), (None, ""), (None, "disabled")],
)
def test_without_a_choice_wandb_is_not_started(
    folder: RunFolder,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    track: str | None,
    variable: str | None,
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    with MetricWriter(folder, config={}, track=track) as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
        writer.write_summary({"seconds": 1.0})
    assert wandb.inits == []


def test_the_variable_decides_where_nobody_chose(
    folder: RunFolder, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    MetricWriter(folder, config={}).close()
    # A mode passed to init would win over the variable.
    assert [options["mode"] for options in wandb.inits] == [None]


def test_a_choice_wins_over_the_variable(
    folder: RunFolder, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    MetricWriter(folder, config={}, track="offline").close()
    assert [options["mode"] for options in wandb.inits] == ["offline"]


def test_an_unknown_choice_is_refused_before_anything_is_written(folder: RunFolder) -> None:
    with pytest.raises(
        ValueError, match=r"track must be one of .*'offlin', did you mean 'offline'"
    ):
        MetricWriter(folder, config={}, track="offlin")
    assert not folder.config.exists()


def test_an_unknown_variable_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "quux")
    with pytest.raises(ValueError, match=r"WANDB_MODE must be one of .*, got 'quux'$"):
        MetricWriter(folder, config={})


def test_the_run_stays_in_the_folder_and_records_nothing_but_the_run(
    folder: RunFolder, wandb: FakeWandb
) -> None:
    MetricWriter(folder, config={"seed": 3}, track="offline").close()
    (options,) = wandb.inits
    assert options["dir"] == str(folder.path)
    assert options["name"] == "first"
    assert options["project"] == "avatarl-env"
    assert options["config"] == {"seed": 3}
    assert options["reinit"] == "create_new"
    assert vars(options["settings"]) == {
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


def test_the_project_can_be_named_by_the_variable(
    folder: RunFolder, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    MetricWriter(folder, config={}, track="offline").close()
    assert wandb.inits[0]["project"] == "mine"


def test_wandb_is_not_to_mistake_our_package_for_another(folder: RunFolder) -> None:
    MetricWriter(folder, config={}, track="offline").close()
    assert os.environ["WANDB_DISABLE_WEAVE"] == "true"


def test_wandb_reports_none_of_its_errors_unless_somebody_wants_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    MetricWriter(folder, config={}, track="offline").close()
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    with MetricWriter(folder, config={}, track="offline"):
        assert os.environ["WANDB_ERROR_REPORTING"] == "true"


def test_numbers_are_logged_without_a_global_step(folder: RunFolder, wandb: FakeWandb) -> None:
    row = {
        "commit/kept": True,
        "commit/kl_ref_gain": {"mean": 0.5, "low": float("nan")},
        "commit/coefficients": [0.1, 0.2],
        "surgeon/flatline": None,
    }
    with MetricWriter(folder, config={}, track="offline") as writer:
        writer.write("commit", CLOCK, row)
    assert wandb.run.logged == [
        ({**CLOCK_NUMBERS, "commit/kept": True, "commit/kl_ref_gain/mean": 0.5}, {})
    ]


def test_every_group_of_metrics_has_the_compute_as_its_axis(
    folder: RunFolder, wandb: FakeWandb
) -> None:
    MetricWriter(folder, config={}, track="offline").close()
    assert wandb.run.defined[0] == ("forward_tokens", None)
    groups = {name: axis for name, axis in wandb.run.defined[1:]}
    assert list(groups) == [
        "grpo/*",
        "time/*",
        "validation/*",
        "surgeon/*",
        "score/*",
        "baseline/*",
        "commit/*",
        "behavior/*",
    ]
    assert set(groups.values()) == {"forward_tokens"}


def test_the_summary_is_passed_on(folder: RunFolder, wandb: FakeWandb) -> None:
    with MetricWriter(folder, config={}, track="offline") as writer:
        writer.write_summary({"preset": "smoke", "validation": {"loss": 1.5}, "phases": []})
    assert wandb.run.summary == {"validation/loss": 1.5}


def test_an_exception_in_the_run_is_reported_as_a_failure(
    folder: RunFolder, wandb: FakeWandb
) -> None:
    writer = MetricWriter(folder, config={}, track="offline")
    with pytest.raises(RuntimeError, match="boom"), writer:
        raise RuntimeError("boom")
    writer.close()
    assert wandb.run.exit_codes == [1]


@pytest.mark.parametrize(
    "error", [WandbError("no API key\nsecond line"), OSError("read-only"), KeyError("of theirs")]
)
def test_a_start_that_fails_goes_on_offline_with_one_warning(
    folder: RunFolder, wandb: FakeWandb, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    wandb.broken["online"] = error
    with MetricWriter(folder, config={}, track="online") as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
    assert [options["mode"] for options in wandb.inits] == ["online", "offline"]
    assert len(wandb.run.logged) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.endswith(f"({str(error).splitlines()[0]}): trying offline")


def test_a_run_goes_on_where_offline_fails_too(
    folder: RunFolder, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.broken = {"online": WandbError("no network"), "offline": WandbError()}
    with MetricWriter(folder, config={}, track="online") as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
    assert wandb.run.logged == []
    assert wandb.run.exit_codes == []
    assert caplog.messages[1].endswith("(WandbError): the run goes on without it")
    assert len(folder.metrics.read_text().splitlines()) == 1


def test_a_failure_on_the_way_is_reported_once_and_ends_tracking_only(
    folder: RunFolder, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.run.error = WandbError("run is finished")
    with MetricWriter(folder, config={}, track="offline") as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
        writer.write("grpo", CLOCK, {"grpo/loss": 2.0})
    assert len(caplog.messages) == 1
    assert len(folder.metrics.read_text().splitlines()) == 2


def test_an_upload_that_does_not_end_is_given_up_and_how_to_go_on_is_said(
    folder: RunFolder, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.run.late = TimeoutError("Timed out finishing run.")
    with MetricWriter(folder, config={}, track="online") as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
    assert caplog.messages == [
        "Weights & Biases did not finish (no end of the upload in 30 s, later: wandb sync "
        "runs/first/wandb/run-1): the run goes on without it"
    ]


def test_a_run_that_goes_on_tells_all_rows_that_stand_once(
    folder: RunFolder, wandb: FakeWandb
) -> None:
    with MetricWriter(folder, config={}, track="offline") as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
        place = writer.positions()
        writer.write("grpo", CLOCK, {"grpo/loss": 2.0})
    before, wandb.run = wandb.run, FakeRun()
    again = RunFolder.reopen(folder.path)
    with MetricWriter(again, config={}, track="offline", resume_from=place) as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 3.0})
    assert [data["grpo/loss"] for data, _ in before.logged] == [1.0, 2.0]
    assert [data["grpo/loss"] for data, _ in wandb.run.logged] == [1.0, 3.0]
