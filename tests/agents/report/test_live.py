from __future__ import annotations

from pathlib import Path

import pytest

from agents.report.live import LiveReport
from tests.agents.fake_runs import MadeUpRun


class Clock:
    """Stands still unless it is set, or a report is written that takes its time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> MadeUpRun:
    run = MadeUpRun(tmp_path)
    run.evaluate("bootstrap")
    run.save()
    return run


def test_the_first_report_comes_at_once_and_the_next_when_it_is_time(run: MadeUpRun) -> None:
    clock = Clock()
    live = LiveReport(run.folder, every_seconds=10.0, clock=clock)
    page = run.folder / "report.html"
    assert live.refresh()
    first = page.read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="30">' in first
    assert "This page is of phase bootstrap, update 0," in first
    run.train("bootstrap", 20)
    run.save()
    clock.now += 9.9
    assert not live.refresh()
    assert page.read_text(encoding="utf-8") == first
    clock.now += 0.1
    assert live.refresh()
    assert "This page is of phase bootstrap, update 20," in page.read_text(encoding="utf-8")


def test_reports_take_no_more_than_their_share_of_the_time(
    run: MadeUpRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    written = []

    def write_slowly(folder: Path, *, reload_seconds: int) -> None:
        written.append(folder)
        clock.now += 2.0

    monkeypatch.setattr("agents.report.live.write_report", write_slowly)
    live = LiveReport(run.folder, every_seconds=1.0, share=0.02, clock=clock)
    assert live.refresh()
    clock.now = 199.9  # 2 s are 2 % of 100 s
    assert not live.refresh()
    clock.now = 200.0
    assert live.refresh()
    assert written == [run.folder] * 2


def test_a_disk_that_cannot_be_written_to_does_not_end_the_run(
    run: MadeUpRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    clock = Clock()
    live = LiveReport(run.folder, every_seconds=5.0, clock=clock)
    with monkeypatch.context() as patch:
        patch.setattr("avatarl_env.files.os.replace", fail)
        assert not live.refresh()
    clock.now += 1000.0
    assert live.refresh()


def test_a_finished_run_is_not_loaded_anew(run: MadeUpRun) -> None:
    run.train("bootstrap", 20)
    run.finish()
    assert LiveReport(run.folder).refresh()
    assert 'http-equiv="refresh"' not in (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"every_seconds": -1.0}, r"every_seconds must be at least 0, got -1\.0"),
        ({"every_seconds": float("nan")}, "every_seconds must be at least 0, got nan"),
        ({"share": 0.0}, r"share must be above 0 and at most 1, got 0\.0"),
        ({"share": 1.5}, r"share must be above 0 and at most 1, got 1\.5"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, numbers: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LiveReport(tmp_path, **numbers)  # type: ignore[arg-type]
