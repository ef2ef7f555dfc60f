"""The rows of `metrics.jsonl`: their kinds, their numbers, and samples as text.

`docs/metrics.md` lists every number with its unit and formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

AXES = {
    "grpo": "update",
    "evaluation": "update",
    "operation": "operation",
    "surgeon": "operation",
    "commit": "operation",
    "behavior": "operation",
    "sample": "update",
}
"""Kinds of rows, each with the field of the clock that counts its steps."""


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
