"""What a report is made from: the files of a run folder, read back into one record."""

from __future__ import annotations

import re
from collections import ChainMap, Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from avatarl_env.files import parse_json

CONTROLS = frozenset({"ce"})  # estimators that are shown the right characters

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
        references: The content of `references.json`; empty where there is none.
        torn: How many lines of `metrics.jsonl` are no rows, and were left out.
    """

    name: str
    config: dict[str, Any]
    rows: list[Row]
    summary: dict[str, Any]
    references: dict[str, Any] = field(default_factory=dict)
    torn: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run has written its summary."""
        return bool(self.summary)

    @property
    def estimator(self) -> str:
        """Name of the estimator that the language model learned by; empty if unknown."""
        return str((self.config.get("grpo") or {}).get("estimator") or "")

    @property
    def is_control(self) -> bool:
        """Whether the model was shown the right characters: a supervised control, not RL."""
        return self.estimator in CONTROLS

    @property
    def seconds(self) -> float:
        """How long the run took, or has taken so far."""
        return float(
            self.fact("seconds") or (self.rows[-1].get("seconds") if self.rows else 0) or 0
        )

    def fact(self, name: str) -> Any:
        """Look a fact up in the summary, references and settings; None where none has it."""
        return ChainMap(self.summary, self.references, self.config).get(name)

    def scores(self) -> Row:
        """Give the final scores on held-out text, else the latest of a fixed slice, else none."""
        if self.finished:
            return dict(self.summary.get("validation") or {})
        latest = (self.of_kind("evaluation") or [{}])[-1]
        return {
            name.removeprefix("validation/"): value
            for name, value in latest.items()
            if name.startswith("validation/")
        }

    def of_kind(self, kind: str) -> list[Row]:
        """Pick the rows of one kind."""
        return self._kinds.get(kind, [])

    @cached_property
    def _kinds(self) -> dict[str, list[Row]]:
        kinds: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            kinds[row["kind"]].append(row)
        return dict(kinds)

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
        return list(self._phases)

    @cached_property
    def _phases(self) -> list[PhaseSpan]:
        spans: list[PhaseSpan] = []
        for name, rows in groupby(self.rows, key=lambda row: row["phase"]):
            *_, last = rows
            start = spans[-1].end if spans else 0
            spans.append(PhaseSpan(name=name, start=start, end=last["forward_tokens"]))
        return spans


def load_run(folder: Path) -> RunRecord:
    """Read a run folder; the run may still be going on.

    Args:
        folder: A folder with at least `config.json` and `metrics.jsonl`.

    Raises:
        ValueError: If one of these is missing, or a file does not hold what it should. Lines of
            the metrics that are no rows are left out and counted, but for the last one, which may
            be half written while the run goes on.
    """
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"run_folder must hold {' and '.join(missing)}, got {str(folder)!r}")
    summary, references = folder / "summary.json", folder / "references.json"
    rows, torn = _read_rows(folder / "metrics.jsonl")
    return RunRecord(
        name=folder.resolve().name,
        config=_read_object(folder / "config.json"),
        rows=rows,
        summary=_read_object(summary) if summary.is_file() else {},
        references=_read_object(references) if references.is_file() else {},
        torn=torn,
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
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"run_folder must hold valid JSON in {path.name}: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"run_folder must hold one object in {path.name}, got {content!r:.80}")
    return content


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """Return the rows, and the number of lines that are none."""
    rows: list[Row] = []
    torn = 0
    # Bytes, because a row that is being written right now may end within a character. What follows
    # the last newline is such a row, or nothing.
    for line in path.read_bytes().split(b"\n")[:-1]:
        row = _read_row(line)
        if row is None:
            torn += 1
            continue
        # Compute never falls, but where a run went on from an older state: that part came anew.
        while rows and rows[-1]["forward_tokens"] > row["forward_tokens"]:
            rows.pop()
        rows.append(row)
    return rows, torn


def _read_row(line: bytes) -> Row | None:
    """Read one line; None if a run that was killed left only a piece of it."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if type(row) is not dict or not all(type(row.get(name)) is str for name in ("kind", "phase")):
        return None
    return row if _is_number(row.get("forward_tokens")) else None
