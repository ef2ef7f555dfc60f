"""The record of a run: one folder of plain files, and whoever else is to be told.

`config.json` holds the settings, `references.json` what the model is to be held against,
`metrics.jsonl` one JSON object per line, `samples.txt` text to read, `summary.json` the outcome.
All of it is strict JSON: a number that is not finite is written as null. Weights & Biases and
TensorBoard are told what has been written, and a run never depends on them: whatever goes wrong
there costs one warning.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from agents.tracking import wandb as wandb_sink
from agents.tracking.run_folder import RunFolder, refuse_used
from agents.tracking.schema import AXES
from agents.tracking.sinks import Guarded, Sink, sample_text
from agents.tracking.tensorboard import TensorBoardSink, check_installed
from avatarl_env.files import dump_json, write_atomically

__all__ = [
    "KINDS",
    "Clock",
    "MetricWriter",
    "RunFolder",
    "check_tracking",
    "refuse_used",
    "to_json",
]

KINDS = tuple(AXES)


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


def check_tracking(track: str | None, tensorboard: bool) -> None:
    """Raise what `MetricWriter` would raise for these choices, before there is a run.

    Raises:
        ImportError: If TensorBoard is asked for and not installed; says which extra has it.
        ValueError: If `track` or WANDB_MODE is not one of its choices.
    """
    wandb_sink.is_wanted(track)
    if tensorboard:
        check_installed()


class MetricWriter:
    """Everything that a run writes down while it goes on; a context manager.

    Args:
        folder: The run's folder.
        config: The resolved settings: a dataclass or a mapping, nested at will.
        track: `off`, `offline` or `online` for Weights & Biases. None means that nobody chose:
            then the variable WANDB_MODE decides, and without it the answer is `off`.
        tensorboard: Whether to write event files for TensorBoard too.
        resume_from: For a run that goes on in a reopened folder: how many bytes of `metrics.jsonl`
            and `samples.txt` to keep, as `positions` said. Weights & Biases and TensorBoard are
            told all rows that are kept once more, as of a run of their own: what they had been told
            may be more than that.

    Raises:
        ImportError: If TensorBoard is asked for and not installed; says which extra has it.
        ValueError: If `track` or WANDB_MODE is not one of its choices, or no line ends where
            `resume_from` says. Nothing has been changed then.
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
        # Before all else: it makes the folder a run.
        write_atomically(folder.config, dump_json(settings, indent=2) + "\n")
        self._metrics = folder.metrics.open("a", encoding="utf-8", newline="\n")
        self._samples = folder.samples.open("a", encoding="utf-8", newline="\n")
        kept = list(folder.rows())
        self._sinks: list[Guarded] = []
        if wandb_sink.is_wanted(track):
            start: Callable[[], Sink] = functools.partial(
                wandb_sink.start, folder.path, settings, track
            )
            self._sinks.append(Guarded("Weights & Biases", start))
        if tensorboard:
            seconds = kept[-1]["seconds"] if kept else 0.0
            start = functools.partial(TensorBoardSink, folder.path, settings, seconds)
            self._sinks.append(Guarded("TensorBoard", start))
        for row in kept:
            self._tell(row)

    def write(self, kind: str, clock: Clock, metrics: Mapping[str, object]) -> None:
        """Append one row to `metrics.jsonl`, then tell Weights & Biases and TensorBoard.

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
        line = dump_json(row) + "\n"
        sample = sample_text(row) if kind == "sample" else ""
        # A run may be killed at any time: a row that was written is on the disk, whole.
        self._metrics.write(line)
        self._metrics.flush()
        self._samples.write(sample)
        self._samples.flush()
        self._tell(row)

    def positions(self) -> tuple[int, int]:
        """Return the lengths of `metrics.jsonl` and `samples.txt`, bytes, when the disk has them.

        What is written up to here survives a power cut, and `resume_from` goes back to here.
        """
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())
        return self.folder.metrics.stat().st_size, self.folder.samples.stat().st_size

    def write_references(self, references: Mapping[str, object]) -> None:
        """Write `references.json`: what is known of the text before anything is learned from it.

        Args:
            references: `references`, the scores of n-gram tables, and `corpus_nats_per_char`, the
                true entropy of the text or None. The summary has them too.

        Raises:
            TypeError: If a value has no form in JSON.
        """
        content = to_json(references, "references")
        write_atomically(self.folder.references, dump_json(content, indent=2) + "\n")

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json` in one piece: a reader finds all of it or nothing.

        Raises:
            TypeError: If a value has no form in JSON.
        """
        content = to_json(summary, "summary")
        write_atomically(self.folder.summary, dump_json(content, indent=2) + "\n")
        for sink in self._sinks:
            sink.summarise(content)

    def close(self, *, failed: bool = False) -> None:
        """Close the files and let the others finish; a second call does nothing."""
        with ExitStack() as stack:  # all of them, also where a full disk takes no last row
            for sink in self._sinks:
                stack.callback(sink.finish, failed=failed)
            stack.callback(self._samples.close)
            stack.callback(self._metrics.close)

    def _tell(self, row: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.log(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


def to_json(value: object, name: str, *, exact: bool = False) -> Any:
    """Turn a value into what strict JSON can hold.

    Args:
        value: None, numbers, strings, paths, scalars and arrays of numpy or torch, dataclasses, and
            lists, tuples and mappings with string keys of these.
        name: What to call the value in an error.
        exact: Whether a float that is not finite is to be had back.

    Returns:
        None, bool, int, float, str, list or dict; a float that is not finite becomes None, or, if
        `exact`, "inf", "-inf" or "nan".

    Raises:
        TypeError: If some part of the value is of another type.
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
