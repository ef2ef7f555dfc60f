"""The training loop: GRPO trains the model, the surgeon operates on it.

Every rank that torchrun starts runs this same loop. The first operates, evaluates and writes; each
updates the model on its shard of every batch. `curriculum.py` defines updates, operations and
commits; `run.py` handles checkpoints and signals.
"""

from __future__ import annotations

from dataclasses import replace

from tqdm import tqdm

from agents.distributed import Ranks, joined
from agents.errors import BadInput, DivergedError, DriftError, Stopped
from agents.training.config import TrainConfig
from agents.training.start import open_run
from agents.training.summary import RunSummary


def train(config: TrainConfig, *, quiet: bool = False, command: str | None = None) -> RunSummary:
    """Start or resume a run, and write its folder.

    A run that diverges is resumed from its last checkpoint, once.

    Args:
        config: of the run; with `resume`, names the run to resume.
        quiet: show no progress.
        command: the command that started the run, for its records.

    Returns:
        The run's folder and summary, the same on every rank.

    Raises:
        BadInput: (a ValueError) if the configuration does not fit the corpus or the machine, the
            run folder is not empty, or the run cannot be resumed exactly. Nothing has been
            trained.
        NotWritten: (an OSError) if the disk is full or otherwise refuses the run's files.
        DivergedError: if the model or the surgeon diverged, and again after the restart.
        Stopped: (a KeyboardInterrupt) if a signal asked the run to stop; it has written a
            checkpoint.
        LostError: if another rank has ended.
        DriftError: if the ranks no longer have the same weights.
    """
    with joined() as ranks, ranks.together(BadInput, DivergedError, DriftError, Stopped):
        try:
            return _train(config, ranks, quiet=quiet, command=command)
        except DivergedError as error:
            if error.folder is None:
                raise
            reason, folder = str(error), error.folder
        # After the handler, since the error keeps the first attempt's model in memory.
        if ranks.is_first and not quiet:
            tqdm.write(f"{reason}: going back to the last checkpoint, once")
        again = replace(config, resume=str(folder), out=None)
        return _train(again, ranks, quiet=quiet, command=command)


def _train(config: TrainConfig, ranks: Ranks, *, quiet: bool, command: str | None) -> RunSummary:
    with open_run(config, ranks, quiet=quiet, command=command) as run:
        for phase in run.remaining_phases():
            for _ in run.remaining_steps(phase):
                for _ in range(phase.updates):
                    run.log.update(run.curriculum.update())
                if phase.operations:
                    run.log.operations(run.curriculum.operate(phase.operations))
                if phase.commits:
                    run.log.commit(run.curriculum.try_commit())
                if phase.rollouts:
                    run.log.behavior(run.curriculum.choose_behavior())
                run.checkpoint.step()
            run.finish(phase)
        return run.summary()
