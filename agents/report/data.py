"""Read run folders: one record per run, and its metrics as series against compute."""

from __future__ import annotations

import os
import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from agents.tracking.schema import Row, read_rows
from avatarl_env.files import parse_json

CONTROLS = frozenset({"ce"})  # estimators that are supervised
MOST_POINTS = 1000  # of the lines of all runs; a plot of this size cannot show more


class Series(NamedTuple):
    """A metric against compute: three lists of equal length."""

    x: list[int]
    """Compute spent, in forward tokens; never falls."""
    y: list[float]
    phase: list[str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The files of one run.

    Attributes:
        name: name of the run on the page: that of its folder, unique on the page.
        config: contents of `config.json`.
        rows: rows of `metrics.jsonl`, in order.
        summary: contents of `summary.json`; empty if the run has not finished.
        references: contents of `references.json`; empty if there is none.
        n_damaged: number of lines of `metrics.jsonl` that are not valid rows and were skipped.
        index: position among the runs of the page, from 0; determines the run's colour.
        link: relative address of the run's own report; empty if there is none.
    """

    name: str
    config: dict[str, Any]
    rows: list[Row]
    summary: dict[str, Any]
    references: dict[str, Any] = field(default_factory=dict)
    n_damaged: int = 0
    index: int = 0
    link: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run has written its summary."""
        return bool(self.summary)

    @property
    def grpo(self) -> dict[str, Any]:
        """Settings of the language model's training; empty if unknown."""
        return self.config.get("grpo") or {}

    @property
    def is_control(self) -> bool:
        """Whether the model was trained by supervised learning, not RL."""
        return str(self.grpo.get("estimator")) in CONTROLS

    @property
    def tags(self) -> list[str]:
        """Warnings to show beside the run's name."""
        tags = ["supervised control"] if self.is_control else []
        return tags if self.finished else [*tags, "unfinished"]

    @property
    def seconds(self) -> float:
        """Duration of the run so far."""
        last = self.rows[-1].get("seconds") if self.rows else 0
        return float(self.fact("seconds") or last or 0)

    @property
    def measurements(self) -> list[Row]:
        """Measurements of the surgeon's effect, in order."""
        return (self.summary.get("surgeon_effect") or {}).get("measurements") or []

    @property
    def scores(self) -> Row:
        """Final scores on the whole held-out text, or the latest on a fixed slice of it."""
        if self.finished:
            return self.summary.get("validation") or {}
        latest = (self.of_kind("evaluation") or [{}])[-1]
        stem = "validation/"
        return {name.removeprefix(stem): x for name, x in latest.items() if name.startswith(stem)}

    def fact(self, name: str) -> Any:
        """Look up a name in summary, references and settings, in this order; None if unknown."""
        return ChainMap(self.summary, self.references, self.config).get(name)

    def of_kind(self, kind: str) -> list[Row]:
        """Return the rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def series(self, kind: str, metric: str) -> Series:
        """Return a metric against compute, without rows in which it is not a number."""
        rows = [row for row in self.of_kind(kind) if is_number(row.get(metric))]
        return Series(
            [row["forward_tokens"] for row in rows],
            [float(row[metric]) for row in rows],
            [row["phase"] for row in rows],
        )

    def metrics(self, kind: str) -> list[str]:
        """Return the names of a kind's numeric metrics, in order of appearance."""
        items = (item for row in self.of_kind(kind) for item in row.items())
        return list(dict.fromkeys(name for name, x in items if "/" in name and is_number(x)))

    @cached_property
    def phases(self) -> list[Row]:
        """Spans of the phases: `name`, `start` and `end` in forward tokens, without gaps."""
        spans: list[Row] = []
        for name, rows in groupby(self.rows, key=lambda row: row["phase"]):
            *_, last = rows
            start = spans[-1]["end"] if spans else 0
            spans.append({"name": name, "start": start, "end": last["forward_tokens"]})
        return spans


def load_run(folder: Path, **page: Any) -> Run:
    """Read a run folder; the run may still be in progress.

    Args:
        folder: a folder with at least `config.json` and `metrics.jsonl`.
        page: the fields `name` (default: that of the folder), `index` and `link` of `Run`.

    Raises:
        ValueError: if one of these files is missing, or a JSON file does not hold an object.
    """
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"run_folder must hold {' and '.join(missing)}, got {str(folder)!r}")
    rows, n_damaged = _read_rows(folder / "metrics.jsonl")
    return Run(
        config=_read_object(folder / "config.json"),
        rows=rows,
        summary=_read_object(folder / "summary.json"),
        references=_read_object(folder / "references.json"),
        n_damaged=n_damaged,
        **{"name": folder.resolve().name, **page},
    )


def distinct(folders: Sequence[Path]) -> dict[str, Path]:
    """Return run folders by name, without duplicates; names are paths below the common folder.

    Raises:
        ValueError: if there are none.
    """
    kept: dict[Path, Path] = {}
    for folder in folders:
        kept.setdefault(folder.resolve(), folder)
    if not kept:
        raise ValueError("run_folders must name at least one folder, got none")
    common = os.path.commonpath([path.parent for path in kept])
    return {path.relative_to(common).as_posix(): folder for path, folder in kept.items()}


def same_text(runs: Sequence[Run]) -> bool:
    """Whether all runs use the same text, so that their scores can be compared."""
    return len({run.fact("corpus_sha256") for run in runs}) == 1


def references(runs: Sequence[Run]) -> list[Row]:
    """Return the n-gram references of all runs; none if the runs use different texts."""
    found = [run.fact("references") for run in runs] if same_text(runs) else []
    return next((rows for rows in found if rows), [])


def running_mean(series: Series) -> list[Series]:
    """Average each value with those before it in its phase.

    The window is a tenth of the values, at least 3 and at most 50, and at least one round of
    operations, which have the same `x`.

    Returns:
        One series for each span of a phase, with one value for each distinct `x`.
    """
    window = max(3, min(50, len(series.y) // 10), *Counter(series.x).values())
    lines = []
    for phase, points in groupby(zip(*series, strict=True), key=lambda point: point[2]):
        x, y, _ = zip(*points, strict=True)
        means = {}
        for end, place in enumerate(x, start=1):
            recent = y[max(0, end - window) : end]
            means[place] = sum(recent) / len(recent)
        lines.append(Series([*means], [*means.values()], [phase] * len(means)))
    return lines


def plotted(series: Series, most: int) -> Row:
    """Return `x` and `y` of at most `most` points, including the last, with six digits."""
    stride = -(-len(series.x) // most) or 1
    kept = slice((len(series.x) - 1) % stride, None, stride)
    return {"x": series.x[kept], "y": [float(f"{value:.6g}") for value in series.y[kept]]}


def flatlines(rows: Iterable[Row]) -> Counter[str]:
    """Count flatlines by cause, without the numbers in each message."""
    causes = (row.get("surgeon/flatline") for row in rows)
    return Counter(re.split(r"\s+[-+]?\d", str(cause))[0] for cause in causes if cause)


def mean(values: Sequence[float | None], digits: int | None = None) -> float | None:
    """Return the mean of the values that are not None, optionally rounded; None if all are."""
    known = [value for value in values if value is not None]
    average = sum(known) / len(known) if known else None
    return average if average is None or digits is None else round(average, digits)


def is_number(value: object) -> bool:
    """Whether a value of a row can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"run_folder must hold valid JSON in {path.name}: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"run_folder must hold one object in {path.name}, got {content!r:.80}")
    return content


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """Return the rows and the number of damaged lines."""
    rows: list[Row] = []
    n_damaged = 0
    for _, row in read_rows(path):
        if row is None:
            n_damaged += 1
            continue
        # Compute falls if a run was resumed from an older state: drop the rows that it repeats.
        while rows and rows[-1]["forward_tokens"] > row["forward_tokens"]:
            rows.pop()
        rows.append(row)
    return rows, n_damaged
