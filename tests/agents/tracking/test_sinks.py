from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from agents.tracking.sinks import Guarded


class Sink:
    """Notes what it is asked to do, and breaks where it is told to."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.asked: list[str] = []

    def log(self, row: Mapping[str, Any]) -> None:
        self._do("log")

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._do("summarise")

    def finish(self, *, failed: bool) -> None:
        self._do(f"finish {failed}")

    def _do(self, what: str) -> None:
        self.asked.append(what)
        if self.broken and what.startswith(self.broken):
            raise LookupError(f"no {what}\nand more")


def use(guarded: Guarded) -> None:
    guarded.log({})
    guarded.log({})
    guarded.summarise({})
    guarded.finish(failed=False)
    guarded.finish(failed=True)


def test_what_works_is_asked_everything_and_finished_once(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    use(Guarded("Elsewhere", lambda: sink))
    assert sink.asked == ["log", "log", "summarise", "finish False"]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("broken", "asked", "warning"),
    [
        ("log", ["log"], "Elsewhere failed (no log)"),
        ("summarise", ["log", "log", "summarise"], "Elsewhere failed (no summarise)"),
        (
            "finish",
            ["log", "log", "summarise", "finish False"],
            "Elsewhere did not finish (no finish False)",
        ),
    ],
)
def test_the_first_fault_costs_one_warning_and_ends_it(
    broken: str, asked: list[str], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Sink(broken)
    use(Guarded("Elsewhere", lambda: sink))
    assert sink.asked == asked
    assert caplog.messages == [f"{warning}: the run goes on without it"]


def test_what_does_not_start_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Sink:
        raise RuntimeError

    use(Guarded("Elsewhere", make))
    assert caplog.messages == ["Elsewhere did not start (RuntimeError): the run goes on without it"]


def test_an_interruption_is_no_fault() -> None:
    def make() -> Sink:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded("Elsewhere", make)
