"""The record of a run: one folder of plain files, and Weights & Biases beside it when asked for.

`config.json` holds the settings, `metrics.jsonl` one JSON object per line, `samples.txt` text to
read, `summary.json` the outcome. All of it is strict JSON: a number that is not finite is written
as null. A run never depends on Weights & Biases: whatever goes wrong there costs one warning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from agents import wandb_sink

KINDS = ("grpo", "evaluation", "operation", "surgeon", "commit", "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Where a run stands when a row is written.

    Attributes:
        phase: Name of the phase of the curriculum.
        update: GRPO updates done so far.
        operation: Operations done so far.
        forward_tokens: Compute spent so far, in tokens of one forward pass.
        seconds: Time since the start of the run.
    """

    phase: str
    update: int
    operation: int
    forward_tokens: int
    seconds: float


class RunFolder:
    """The folder of one run, made on construction; a folder that holds anything is refused.

    Args:
        path: The folder to make. It may exist if it is empty.

    Attributes:
        path: The folder.
        config: `config.json`, the settings of the run.
        metrics: `metrics.jsonl`, the rows of the run.
        samples: `samples.txt`, the samples in a form to read.
        summary: `summary.json`, the outcome; absent until the run has finished.

    Raises:
        ValueError: If `path` is a file, is not empty, or cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.txt"
        self.summary = self.path / "summary.json"
        refuse_used(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics.touch(exist_ok=False)
        except OSError as error:
            raise ValueError(
                f"out must be a folder that can be written to, got {str(path)!r}: {error.strerror}"
            ) from error


def refuse_used(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError if ``path`` is a file or a folder that holds anything."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be an empty or new folder, got the file {str(path)!r}")
        names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be read, got {str(path)!r}: {error.strerror}"
        ) from error
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"out must be an empty or new folder, got {str(path)!r} which holds {shown}"
        )


class MetricWriter:
    """Everything that a run writes down while it goes on; a context manager.

    Args:
        folder: The run's folder.
        config: The resolved settings: a dataclass or a mapping, nested at will.
        track: `off`, `offline` or `online` for Weights & Biases. None means that nobody chose:
            then the variable WANDB_MODE decides, and without it the answer is `off`.

    Raises:
        ValueError: If `track` or WANDB_MODE is not one of its choices.
    """

    def __init__(self, folder: RunFolder, *, config: object, track: str | None = None) -> None:
        tracked = wandb_sink.is_wanted(track)
        self.folder = folder
        settings = to_json(config, "config")
        _write_atomic(folder.config, _dump(settings, indent=2))
        self._wandb = wandb_sink.start(folder.path, settings, track) if tracked else None
        self._metrics = folder.metrics.open("a", encoding="utf-8")
        self._samples = folder.samples.open("a", encoding="utf-8")

    def write(self, kind: str, clock: Clock, metrics: Mapping[str, object]) -> None:
        """Append one row to `metrics.jsonl` and pass its numbers on to Weights & Biases.

        A row of kind `sample` has `prompt`, `text` and `operated_text` (a string or None), and is
        also appended to `samples.txt`.

        Args:
            kind: One of `KINDS`.
            clock: Where the run stands.
            metrics: Names and values: numbers, scalars or arrays of numpy or torch, strings, None,
                and sequences or mappings of these.

        Raises:
            ValueError: If the kind is unknown or a metric has the name of a field of the clock.
            TypeError: If a value has no form in JSON.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        head = {"kind": kind, **dataclasses.asdict(clock)}
        if taken := sorted(head.keys() & metrics.keys()):
            raise ValueError(f"metrics must not be named like a field of the clock, got {taken}")
        row = {**head, **{name: to_json(value, name) for name, value in metrics.items()}}
        line = _dump(row) + "\n"
        sample = _sample_text(row) if kind == "sample" else ""
        # A run may be killed at any time: a row that was written is on the disk, whole.
        self._metrics.write(line)
        self._metrics.flush()
        self._samples.write(sample)
        self._samples.flush()
        if self._wandb is not None:
            self._wandb.log(row)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json` in one piece: a reader finds all of it or nothing.

        Raises:
            TypeError: If a value has no form in JSON.
        """
        content = to_json(summary, "summary")
        _write_atomic(self.folder.summary, _dump(content, indent=2))
        if self._wandb is not None:
            self._wandb.summarise(content)

    def close(self, *, failed: bool = False) -> None:
        """Close the files and let Weights & Biases finish; a second call does nothing."""
        self._metrics.close()
        self._samples.close()
        sink, self._wandb = self._wandb, None
        if sink is not None:
            sink.finish(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


def to_json(value: object, name: str) -> Any:
    """Turn a value into what strict JSON can hold.

    Args:
        value: None, numbers, strings, paths, scalars and arrays of numpy or torch, dataclasses, and
            lists, tuples and mappings with string keys of these.
        name: What to call the value in an error.

    Returns:
        None, bool, int, float, str, list or dict; a float that is not finite becomes None.

    Raises:
        TypeError: If some part of the value is of another type.
    """
    value = _unwrap(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{name} must have strings as keys, got {odd[0]!r}")
        return {key: to_json(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{name} must be a value that JSON can hold, got {type(value).__name__}")


def _unwrap(value: object) -> object:
    """Strip the outermost type that JSON does not know."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike | torch.device | torch.dtype):
        return str(value)
    return value


def _dump(value: object, indent: int | None = None) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)


def _write_atomic(path: Path, text: str) -> None:
    """Replace a file in one step, so that nobody ever reads half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def _sample_text(row: Mapping[str, Any]) -> str:
    """Lay out a row of kind `sample` for a human reader."""
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
