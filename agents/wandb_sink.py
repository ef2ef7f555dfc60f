"""Weights & Biases as an addition to a run's own files, never as their only copy.

Off unless somebody asks for it. Whatever goes wrong there costs a warning and never the run: no
account, no network at the start, none at the end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from avatarl_env.choices import check_choice

if TYPE_CHECKING:
    import wandb

TRACK_CHOICES = ("off", "offline", "online")

_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
# The two clocks of a run, model updates and operations, tick at different rates. Every row has the
# compute spent so far, so that is the axis; wandb's own step would drop whatever arrives late.
_STEP_METRIC = "forward_tokens"
_METRIC_GROUPS = ("grpo", "time", "validation", "surgeon", "score", "baseline", "commit")
_ALONE = "the run goes on without it"

_logger = logging.getLogger(__name__)


def is_wanted(track: str | None) -> bool:
    """Check the choice, and say whether it asks for Weights & Biases at all.

    Args:
        track: One of `TRACK_CHOICES`. None means that nobody chose: then the variable WANDB_MODE
            decides, and without it the answer is no.

    Raises:
        ValueError: If `track` or WANDB_MODE is not one of its choices.
    """
    if track is not None:
        check_choice("track", track, TRACK_CHOICES)
        return track != "off"
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        return False
    check_choice("WANDB_MODE", mode, _WANDB_MODES)
    return mode != "disabled"


def start(folder: Path, config: Any, track: str | None) -> WandbSink | None:
    """Start a run as asked; where that fails, offline; where that fails too, give None.

    Args:
        folder: Where the `wandb` folder goes.
        config: The settings of the run, in JSON's types.
        track: `offline`, `online`, or None for what WANDB_MODE says.
    """
    import wandb

    # wandb takes our package `agents` for another of that name, and would advertise a tool for it.
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
    attempts = ["offline"] if track == "offline" else [track, "offline"]
    for mode in attempts:
        try:
            return WandbSink(wandb, _init(wandb, folder, config, mode))
        except (wandb.Error, OSError) as error:
            rest = _ALONE if mode == "offline" else "trying offline"
            _logger.warning("Weights & Biases did not start (%s): %s", _line(error), rest)
    return None


class WandbSink:
    """A run at Weights & Biases that can fail without anybody but the log noticing."""

    def __init__(self, module: ModuleType, run: wandb.Run) -> None:
        self._error: type[Exception] = module.Error
        self._run: wandb.Run | None = run
        run.define_metric(_STEP_METRIC)
        for group in _METRIC_GROUPS:
            run.define_metric(f"{group}/*", step_metric=_STEP_METRIC)

    def log(self, row: Mapping[str, object]) -> None:
        """Send the numbers of a row; text, lists and nulls stay in `metrics.jsonl`."""
        self._attempt(lambda run: run.log(dict(_numbers(row))))

    def summarise(self, summary: Mapping[str, object]) -> None:
        """Set the numbers of the summary as those of the run."""
        self._attempt(lambda run: run.summary.update(dict(_numbers(summary))))

    def finish(self, *, failed: bool) -> None:
        """Upload what is left, for no longer than the `finish_timeout` of the run."""
        self._attempt(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _attempt(self, action: Callable[[wandb.Run], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except (self._error, OSError) as error:
            _logger.warning("Weights & Biases failed (%s): %s", _line(error), _ALONE)
            self._run = None


def _init(module: ModuleType, folder: Path, config: Any, mode: str | None) -> wandb.Run:
    """Start a run that records what it is given and nothing else, and can never hang."""
    settings = module.Settings(
        silent=True,
        console="off",
        disable_git=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        init_timeout=20,
        finish_timeout=30,
    )
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", "avatarl-env"),
        name=folder.resolve().name,
        dir=str(folder),
        config=config,
        mode=mode,  # None leaves the choice to WANDB_MODE, which any other value overrides
        reinit="create_new",  # a run that the caller has open is not ours to write to or to finish
        settings=settings,
    )
    return cast("wandb.Run", run)


def _numbers(row: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row; those of a nested mapping are called `outer/inner`."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{name}", value


def _line(error: Exception) -> str:
    """Give the first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
