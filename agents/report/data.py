"""What a report is made from: the files of a run folder, read back into one record."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PhaseSpan:
    """A stretch of the run that belongs to one phase.

    Attributes:
        name: The phase's name.
        start: Compute spent when it began, in forward tokens.
        end: Compute spent at its last row, in forward tokens.
    """

    name: str
    start: int
    end: int


class Series(NamedTuple):
    """A metric against compute: three lists of one length.

    Attributes:
        x: Compute spent, in forward tokens; never falls.
        y: The metric's values.
        phase: Names of the phases.
    """

    x: list[int]
    y: list[float]
    phase: list[str]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The files of one run.

    Attributes:
        name: Name of the run's folder.
        config: The content of `config.json`.
        rows: The rows of `metrics.jsonl`, in the order of writing.
        summary: The content of `summary.json`; empty for a run that has not finished.
    """

    name: str
    config: dict[str, Any]
    rows: list[Row]
    summary: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run has written its summary."""
        return bool(self.summary)

    def fact(self, name: str) -> Any:
        """Look a fact up in the summary, else in the settings; None where neither has it."""
        return self.summary.get(name, self.config.get(name))

    def of_kind(self, kind: str) -> list[Row]:
        """Pick the rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def kept_commits(self) -> list[Row]:
        """Pick the rows of the operations that were kept."""
        return [row for row in self.of_kind("commit") if row.get("commit/kept")]

    def series(self, kind: str, metric: str) -> Series:
        """Give a metric against compute, leaving out the rows where it is no number."""
        rows = [row for row in self.of_kind(kind) if _is_number(row.get(metric))]
        return Series(
            [row["forward_tokens"] for row in rows],
            [float(row[metric]) for row in rows],
            [row["phase"] for row in rows],
        )

    def metrics(self, kind: str) -> list[str]:
        """List the metrics of a kind that have a number in some row, in the order of appearance."""
        names = {
            name: None
            for row in self.of_kind(kind)
            for name, value in row.items()
            if "/" in name and _is_number(value)
        }
        return list(names)

    def phases(self) -> list[PhaseSpan]:
        """Cut the run into phases; each begins where the one before it ended."""
        spans: list[PhaseSpan] = []
        for row in self.rows:
            name, now = row["phase"], row["forward_tokens"]
            if spans and spans[-1].name == name:
                spans[-1] = PhaseSpan(name=name, start=spans[-1].start, end=now)
            else:
                start = spans[-1].end if spans else 0
                spans.append(PhaseSpan(name=name, start=start, end=now))
        return spans


def load_run(folder: Path) -> RunRecord:
    """Read a run folder; the run may still be going on.

    Args:
        folder: A folder with at least `config.json` and `metrics.jsonl`.

    Raises:
        ValueError: If one of these is missing, or a file does not hold what it should. The last
            line of the metrics may be half written: then it is left out.
    """
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"run_folder must hold {' and '.join(missing)}, got {str(folder)!r}")
    summary = folder / "summary.json"
    return RunRecord(
        name=folder.resolve().name,
        config=_read_object(folder / "config.json"),
        rows=_read_rows(folder / "metrics.jsonl"),
        summary=_read_object(summary) if summary.is_file() else {},
    )


def running_mean(series: Series, window: int) -> Series:
    """Average each value with those before it in its phase.

    Args:
        series: The values.
        window: How many to average where there are as many, at least 1.

    Returns:
        The means, one for each place in `x`: the last of several values that share one.
    """
    means = Series([], [], [])
    begin = 0
    for end, (x, phase) in enumerate(zip(series.x, series.phase, strict=True), start=1):
        if means.phase and means.phase[-1] != phase:
            begin = end - 1
        recent = series.y[max(begin, end - window) : end]
        if means.x and (means.x[-1], means.phase[-1]) == (x, phase):
            means.y[-1] = sum(recent) / len(recent)
            continue
        means.x.append(x)
        means.y.append(sum(recent) / len(recent))
        means.phase.append(phase)
    return means


def flatlines(rows: Iterable[Row]) -> Counter[str]:
    """Count what patients died of, without the figures that each cause is told with."""
    causes = (row.get("surgeon/flatline") for row in rows)
    return Counter(re.split(r"\s+[-+]?\d", str(cause))[0] for cause in causes if cause)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"run_folder must hold valid JSON in {path.name}: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"run_folder must hold one object in {path.name}, got {content!r:.80}")
    return content


def _read_rows(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Bytes, because a row that is being written right now may end within a character. What follows
    # the last newline is such a row, or nothing.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"run_folder must hold one JSON object per line in {path.name}, "
                f"line {number} is none: {error}"
            ) from error
    return rows
