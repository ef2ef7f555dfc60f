"""The rows of `metrics.jsonl`: kinds, numbers, samples as text, and the reader.

`docs/metrics.md` lists every number with its unit and formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from avatarl_env.files import parse_json

Row = dict[str, Any]
"""A row of `metrics.jsonl`."""

AXES = {
    "grpo": "update",
    "evaluation": "update",
    "operation": "operation",
    "surgeon": "operation",
    "commit": "operation",
    "behavior": "operation",
    "sample": "update",
}
"""Kinds of rows, each with the field of the clock that is its step in trackers."""


def numbers(row: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row, those in a nested mapping as `outer/inner`.

    Text, lists and nulls are left out.
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{name}", value


def sample_text(row: Mapping[str, Any]) -> str:
    """Return a row of kind `sample` in readable form."""
    lines = [
        f"=== {row['phase']}, update {row['update']}, operation {row['operation']}",
        "--- prompt",
        row["prompt"],
        "--- text",
        row["text"],
    ]
    if row["operated_text"] is not None:
        lines += ["--- text of the operated model", row["operated_text"]]
    return "\n".join(lines) + "\n\n"


def read_rows(metrics: Path, n_bytes: int | None = None) -> Iterator[tuple[bytes, Row | None]]:
    """Yield each line of a `metrics.jsonl` with its row, or with None if it is not a valid row.

    A last line without a line break is left out, since it may not be complete yet.

    Args:
        metrics: the file.
        n_bytes: number of bytes to read; None for all.
    """
    if n_bytes == 0:
        return
    n_read = 0
    # Bytes: only a line break ends a line here, and a torn line may end within a character.
    with metrics.open("rb") as lines:
        for line in lines:
            n_read += len(line)
            if not line.endswith(b"\n") or (n_bytes is not None and n_read > n_bytes):
                return
            yield line, _as_row(line)


def _as_row(line: bytes) -> Row | None:
    """Parse a row as `MetricWriter.write` makes it."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    texts, numbers = ("kind", "phase"), ("forward_tokens", "seconds")
    is_row = all(type(row.get(name)) is str for name in texts) and all(
        type(row.get(name)) in (int, float) for name in numbers
    )
    return row if is_row else None
