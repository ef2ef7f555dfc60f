"""Weights & Biases as an addition to a run's own files, never as their only copy.

Off unless somebody asks for it. No account, no network at the start, none at the end: each costs a
warning and a bounded time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from agents.tracking.schema import METRICS, numbers
from agents.tracking.sinks import line
from avatarl_env.errors import check_choice

if TYPE_CHECKING:
    import wandb

TRACK_CHOICES = ("off", "offline", "online")
INIT_TIMEOUT = 20.0
"""Longest time to wait for an answer at the start, seconds."""
FINISH_TIMEOUT = 30.0
"""Longest time to go on uploading at the end, seconds."""

_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
# The two clocks of a run, model updates and operations, tick at different rates. Every row has the
# compute spent so far, so that is the axis; wandb's own step would drop whatever arrives late.
_STEP_METRIC = "forward_tokens"

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


def start(folder: Path, config: Any, track: str | None) -> WandbSink:
    """Start a run as asked; where that fails, warn and start it offline.

    Args:
        folder: Where the `wandb` folder goes.
        config: The settings of the run, in JSON's types.
        track: `offline`, `online`, or None for what WANDB_MODE says.

    Raises:
        Exception: Of any kind, if it does not start offline either.
    """
    # wandb takes our package `agents` for another of that name, and would advertise a tool for it.
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
    # Else wandb reports its own errors to its makers, and tries for seconds after a run has ended.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if track != "offline":
        try:
            return WandbSink(_init(wandb, folder, config, track))
        except Exception as error:  # wandb.Error, OSError, and what its parts raise among them
            _logger.warning("Weights & Biases did not start (%s): trying offline", line(error))
    return WandbSink(_init(wandb, folder, config, "offline"))


class WandbSink:
    """A run at Weights & Biases."""

    def __init__(self, run: wandb.Run) -> None:
        """Take a run that has just begun, and say what its curves are drawn against."""
        self._run = run
        run.define_metric(_STEP_METRIC)
        names = (name for metric in METRICS for name in metric.names if "/" in name)
        for group in dict.fromkeys(name.partition("/")[0] for name in names):
            run.define_metric(f"{group}/*", step_metric=_STEP_METRIC)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row; text, lists and nulls stay in `metrics.jsonl`."""
        self._run.log(dict(numbers(row)))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Set the numbers of the summary as those of the run."""
        self._run.summary.update(dict(numbers(summary)))

    def finish(self, *, failed: bool) -> None:
        """Upload what is left, for no longer than `FINISH_TIMEOUT`.

        Raises:
            TimeoutError: If there is more; says how to upload it.
        """
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError as error:
            folder = self._run.settings.sync_dir
            raise TimeoutError(
                f"no end of the upload in {FINISH_TIMEOUT:g} s, later: wandb sync {folder}"
            ) from error


def _init(module: ModuleType, folder: Path, config: Any, mode: str | None) -> wandb.Run:
    """Start a run that records what it is given and nothing else, and can never hang."""
    settings = module.Settings(
        silent=True,
        console="off",
        disable_git=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
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
