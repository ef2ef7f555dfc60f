"""The record of a run: one folder of plain files.

`config.json` has the settings, `references.json` the scores of n-gram models, `metrics.jsonl` one
JSON object per line, `samples.txt` readable samples, `summary.json` the results. JSON is strict: a
non-finite number is written as null. Weights & Biases and TensorBoard receive each row after it has
been written.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from agents.tracking import wandb as wandb_sink
from agents.tracking.run_folder import RunFolder
from agents.tracking.schema import AXES, sample_text
from agents.tracking.sinks import Sinks
from agents.tracking.tensorboard import TensorBoardSink
from avatarl_env.errors import check_choice
from avatarl_env.files import dump_json, write_atomically

__all__ = ["Clock", "MetricWriter", "RunFolder", "check_tracking", "to_json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Progress of a run when a row is written.

    Attributes:
        phase: name of the phase of the curriculum.
        update: GRPO updates so far.
        operation: operations so far.
        forward_tokens: compute so far, in tokens of one forward pass.
        seconds: time since the start of the run.
    """

    phase: str
    update: int
    operation: int
    forward_tokens: int
    seconds: float


def check_tracking(track: str | None, tensorboard: bool) -> None:
    """Check the choice of trackers, before a run is started.

    Raises:
        ImportError: if TensorBoard is asked for but not installed; names the extra.
        ValueError: if `track` or WANDB_MODE is not one of its choices.
    """
    wandb_sink.is_wanted(track)
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard must be installed to be written to: pip install 'avatarl-env[tensorboard]'"
        )


class MetricWriter:
    """Writes the files of a run; a context manager.

    Args:
        folder: of the run.
        config: the resolved settings, a dataclass or a mapping, possibly nested.
        track: `off`, `offline` or `online` for Weights & Biases; None for the value of the
            variable WANDB_MODE (default `off`).
        tensorboard: whether to write event files for TensorBoard.
        resume_from: for a resumed run in a reopened folder: the bytes of `metrics.jsonl` and
            `samples.txt` to keep, from `positions`. The trackers receive the kept rows again, as a
            new run, because they may have received later ones.

    Raises:
        ImportError: if TensorBoard is asked for but not installed; names the extra.
        ValueError: if `track` or WANDB_MODE is not one of its choices, or no line ends at
            `resume_from`. Nothing has been changed then.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        config: object,
        track: str | None = None,
        tensorboard: bool = False,
        resume_from: tuple[int, int] | None = None,
    ) -> None:
        check_tracking(track, tensorboard)
        self.folder = folder
        settings = to_json(config, "config")
        if resume_from is not None:
            folder.cut_back(*resume_from)
        # First: this file makes the folder a run.
        _write_json(folder.config, settings)
        self._metrics = folder.metrics.open("a", encoding="utf-8", newline="\n")
        self._samples = folder.samples.open("a", encoding="utf-8", newline="\n")
        kept = list(folder.rows())
        self._sinks = Sinks()
        if wandb_sink.is_wanted(track):
            start = functools.partial(wandb_sink.start, folder.path, settings, track)
            self._sinks.start("Weights & Biases", start)
        if tensorboard:
            seconds = kept[-1]["seconds"] if kept else 0.0
            begin = functools.partial(TensorBoardSink, folder.path, settings, seconds)
            self._sinks.start("TensorBoard", begin)
        for row in kept:
            self._sinks.log(row)

    def write(self, kind: str, clock: Clock, metrics: Mapping[str, object]) -> None:
        """Append one row to `metrics.jsonl`, then pass it on to the trackers.

        A row of kind `sample` has `prompt`, `text` and `operated_text` (a string or None), and is
        also appended to `samples.txt`.

        Args:
            kind: a key of `agents.tracking.schema.AXES`.
            clock: the progress of the run.
            metrics: names and values: numbers, scalars or arrays of numpy or torch, strings, None,
                and sequences or mappings of these.

        Raises:
            ValueError: if the kind is unknown or a metric has the name of a field of the clock.
            TypeError: if JSON cannot hold a value.
        """
        check_choice("kind", kind, AXES)
        head = {"kind": kind, **dataclasses.asdict(clock)}
        if taken := sorted(head.keys() & metrics.keys()):
            raise ValueError(f"metrics must not be named like a field of the clock, got {taken}")
        row = {**head, **{name: to_json(value, name) for name, value in metrics.items()}}
        line = dump_json(row) + "\n"
        sample = sample_text(row) if kind == "sample" else ""
        # A run may be killed at any time: a complete row has been written when this returns.
        self._metrics.write(line)
        self._metrics.flush()
        self._samples.write(sample)
        self._samples.flush()
        self._sinks.log(row)

    def positions(self) -> tuple[int, int]:
        """Sync `metrics.jsonl` and `samples.txt` to the disk; return their lengths in bytes.

        These rows survive a power failure; `resume_from` takes the lengths.
        """
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())
        return self.folder.metrics.stat().st_size, self.folder.samples.stat().st_size

    def write_references(self, references: Mapping[str, object]) -> None:
        """Write `references.json`.

        Args:
            references: `references`, the scores of n-gram models, and `corpus_nats_per_char`, the
                true entropy of the text or None.

        Raises:
            TypeError: if JSON cannot hold a value.
        """
        _write_json(self.folder.references, to_json(references, "references"))

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json` atomically.

        Raises:
            TypeError: if JSON cannot hold a value.
        """
        content = to_json(summary, "summary")
        _write_json(self.folder.summary, content)
        self._sinks.summarise(content)

    def close(self, *, failed: bool = False) -> None:
        """Close the files and finish the trackers; a second call does nothing."""
        with ExitStack() as stack:  # all of them, even if one fails on a full disk
            stack.callback(self._sinks.finish, failed=failed)
            stack.callback(self._samples.close)
            stack.callback(self._metrics.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def to_json(value: object, name: str, *, exact: bool = False) -> Any:
    """Convert a value to types that strict JSON can hold.

    Args:
        value: None, numbers, strings, paths, scalars and arrays of numpy or torch, dataclasses, and
            lists, tuples and mappings with string keys of these.
        name: of the value, for errors.
        exact: whether to distinguish non-finite floats.

    Returns:
        None, bool, int, float, str, list or dict; a float that is not finite becomes None, or, if
        `exact`, "inf", "-inf" or "nan".

    Raises:
        TypeError: if a part of the value is of another type.
    """
    value = _unwrap(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{name} must have strings as keys, got {odd[0]!r}")
        return {key: to_json(item, f"{name}.{key}", exact=exact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(x, f"{name}[{i}]", exact=exact) for i, x in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value) if exact else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{name} must be a value that JSON can hold, got {type(value).__name__}")


def _unwrap(value: object) -> object:
    """Convert the outermost type to one that JSON has, if necessary."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike | torch.device | torch.dtype):
        return str(value)
    return value


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, dump_json(content, indent=2) + "\n")
