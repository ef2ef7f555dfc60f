"""Weights & Biases: a copy of a run's rows, only on request.

Without an account or a network the run continues, after a warning and a bounded delay.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from agents.tracking.schema import numbers
from agents.tracking.sinks import first_line
from avatarl_env.errors import check_choice

if TYPE_CHECKING:
    import wandb

TRACK_CHOICES = ("off", "offline", "online")
INIT_TIMEOUT = 20.0
"""Longest wait for the server at the start, seconds."""
FINISH_TIMEOUT = 30.0
"""Longest upload at the end, seconds."""

_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
# Updates and operations have separate counters, but every row has the compute so far. wandb's own
# step would drop rows that arrive late.
_STEP_METRIC = "forward_tokens"

_logger = logging.getLogger(__name__)


def is_wanted(track: str | None) -> bool:
    """Whether a run should be tracked.

    Args:
        track: one of `TRACK_CHOICES`, or None for the value of WANDB_MODE (default off).

    Raises:
        ValueError: if `track` or WANDB_MODE is not one of its choices.
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
    """Start tracking a run; if that fails, warn and start it offline.

    Args:
        folder: of the run; gets a `wandb` folder.
        config: the settings of the run, in JSON types.
        track: `offline`, `online`, or None for the value of WANDB_MODE.

    Raises:
        Exception: of any type, if it does not start offline either.
    """
    # wandb mistakes our package `agents` for another one and would print an advertisement.
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
    # wandb's error reports would delay the end of a run by seconds.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    if track != "offline":
        try:
            return WandbSink(_init(wandb, folder, config, track))
        except Exception as error:  # wandb.Error, OSError, and those of its dependencies
            reason = first_line(error)
            _logger.warning("Weights & Biases did not start (%s): trying offline", reason)
    return WandbSink(_init(wandb, folder, config, "offline"))


class WandbSink:
    """Logs to a Weights & Biases run that has just started."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        run.define_metric(_STEP_METRIC)
        run.define_metric("*", step_metric=_STEP_METRIC)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row; text, lists and nulls stay in `metrics.jsonl`."""
        self._run.log(dict(numbers(row)))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Set the numbers of the summary."""
        self._run.summary.update(dict(numbers(summary)))

    def finish(self, *, failed: bool) -> None:
        """Upload the remaining rows, for at most `FINISH_TIMEOUT` seconds.

        Raises:
            TimeoutError: if that is too short; has the command that uploads the rest.
        """
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError as error:
            folder = self._run.settings.sync_dir
            raise TimeoutError(
                f"the upload took over {FINISH_TIMEOUT:g} s; finish it with: wandb sync {folder}"
            ) from error


def _init(module: ModuleType, folder: Path, config: Any, mode: str | None) -> wandb.Run:
    """Start a run that records only our rows, and cannot hang."""
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
        mode=mode,  # None: WANDB_MODE decides; any other value overrides it
        reinit="create_new",  # does not touch a run that the caller has open
        settings=settings,
    )
    return cast("wandb.Run", run)
