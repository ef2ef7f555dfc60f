"""One run from configuration to report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from agents.distributed import DriftError, Ranks, joined, require_same
from agents.errors import DivergedError
from agents.evaluation.language_model import evaluate_references
from agents.evaluation.surgeon_effect import measure_effect
from agents.report import LiveReport, write_report
from agents.tracking.writer import MetricWriter, RunFolder, refuse_used
from agents.training.best_model import BestModel
from agents.training.build import Setup, resolved
from agents.training.checkpoint import State, locked, read, read_about, sound
from agents.training.config import MOST_THREADS, BadInput, TrainConfig, to_settings
from agents.training.curriculum import Curriculum, make_phases
from agents.training.following import REFUSED, call_others, follow, start_others
from agents.training.logger import RunLogger
from agents.training.resume import (
    Checkpointer,
    Progress,
    Stopped,
    check,
    check_processes,
    checkpoints_of,
    latest,
    restore,
    restore_surgeon,
    torch_threads,
)
from agents.training.stored import check_corpus, config_to_resume, stored_run
from agents.training.summary import about_model, introduction, save_final, summarise
from avatarl_env.errors import check_integer


@dataclass(frozen=True)
class RunSummary:
    """Where a run is, and its `summary.json`."""

    folder: Path
    summary: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What the surgeon was worth, in words."""
        return str(self.summary["surgeon_effect"]["verdict"])


def train(config: TrainConfig, *, quiet: bool = False, command: str | None = None) -> RunSummary:
    """Run the curriculum: build, train and operate, measure, write down.

    In each of the processes that torchrun starts this trains on a share of every batch; the first
    does the rest, with its own configuration. All return the same.

    Args:
        config: what to do; with `resume` what to go on with.
        quiet: show no progress.
        command: how the run was started, for the record.

    Returns:
        The run's folder and summary.

    Raises:
        BadInput: (a ValueError) if the configuration does not fit the corpus or the machine, the
            run folder is not empty, or there is nothing to go on with exactly. Nothing has been
            trained or written then.
        NotWritten: (an OSError) if the disk is full, or does not take the run for another reason.
        DivergedError: if the model or the surgeon cannot be trained on, also not from the last
            checkpoint.
        Stopped: (a KeyboardInterrupt) if SIGINT or SIGTERM asked the run to stop; it has written a
            checkpoint.
        LostError: if another process of the run has ended before its time.
        DriftError: if the processes no longer have the same model.
    """
    with joined() as ranks, ranks.together(BadInput, DivergedError, DriftError, Stopped):
        if not ranks.is_first:
            return RunSummary(*follow(ranks))
        try:
            return _attempt(config, ranks, quiet=quiet, command=command)
        except _GoBackError as error:
            reason, again = str(error.__cause__), error.config
        # Outside the handler: the error holds the first attempt's model and all that goes with it.
        if not quiet:
            tqdm.write(f"{reason}: going back to the last checkpoint, once")
        return _attempt(again, ranks, quiet=quiet, command=command, may_go_back=False)


class _GoBackError(Exception):
    """The model diverged, and there is a checkpoint to go back to."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config.resume)
        self.config = config


class _Begun(NamedTuple):
    """A run that has been built, or built again."""

    config: TrainConfig
    """Resolved: it means the same anywhere."""
    setup: Setup
    folder: RunFolder
    checkpoint: Path | None = None
    """Where to go on from."""
    state: State | None = None
    """What it holds."""


def _attempt(
    config: TrainConfig,
    ranks: Ranks,
    *,
    quiet: bool,
    command: str | None,
    may_go_back: bool = True,
) -> RunSummary:
    with ExitStack() as stack:
        try:
            begun = _begin(config, ranks, stack)
        except REFUSED as error:  # a later one is no fault of the input, but ours
            raise BadInput(str(error)) from error
        config, setup, folder, checkpoint, state = begun
        stack.enter_context(folder.written_to())
        stack.enter_context(_report_at_the_end(folder.path))
        writer = stack.enter_context(
            MetricWriter(
                folder,
                config=_settings(begun, ranks),
                track=config.track,
                tensorboard=config.tensorboard,
                resume_from=_positions(config, state),
            )
        )
        about = about_model(setup, command)
        home = checkpoints_of(folder.path)
        best = BestModel(home / "best", setup.patient.model, setup.tokenizer, about)
        logger = RunLogger(
            writer,
            setup.learner,
            setup.env,
            evaluate_every=config.curriculum.evaluate_every,
            rng=setup.generators.samples,
            best=best,
            quiet=quiet,
        )
        logger.say(introduction(config, setup, folder))
        references = _references(setup)
        writer.write_references(references)
        stack.enter_context(closing(logger))  # what breaks off leaves no half a bar on the line
        progress = Progress()
        if state is not None and checkpoint is not None:
            progress = restore(state, checkpoint, setup, logger)
            logger.say(f"going on from {checkpoint}, {logger.seconds:.0f} s into the run")
        elif config.resume:
            logger.say("there is no checkpoint yet: the run begins anew")
            best.clear()
        start_others(setup, folder.path, progress)
        checkpointer = Checkpointer(config, setup, logger, writer)
        try:
            with checkpointer.listening():
                _run_phases(config, setup, logger, progress, checkpointer)
        except DivergedError as error:
            if ranks.broadcast(may_go_back and latest(folder.path) is not None):
                raise _GoBackError(replace(config, resume=str(folder.path))) from error
            raise
        summary = summarise(config, setup, logger, progress) | {"best": best.found}
        summary |= {**references, "command": command, "seconds": logger.seconds}
        summary["checkpoints"] = {
            "written": checkpointer.n_written,
            "seconds": checkpointer.seconds,
        }
        save_final(config, setup, home / "final", about)
        writer.write_summary(summary)
        ranks.broadcast((folder.path, summary))
    return RunSummary(folder.path, summary)


def _begin(config: TrainConfig, ranks: Ranks, stack: ExitStack) -> _Begun:
    """Build a run, or build it again.

    Raises:
        ValueError: if it cannot be done; nothing has been trained or written then.
    """
    begun = None
    with ranks.agreeing(*REFUSED):
        if config.resume is not None:
            begun = _build_again(config, ranks, stack)
            config, setup = begun.config, begun.setup
        else:
            stack.enter_context(torch_threads(config.threads))
            if config.out is not None:
                refuse_used(config.out)
            setup = Setup(config, ranks)
            config = resolved(config, setup)
    call_others(setup, config)
    with ranks.agreeing(*REFUSED):
        if begun is None:
            begun = _Begun(config, setup, _new_folder(config, stack))
    return begun


def _new_folder(config: TrainConfig, stack: ExitStack) -> RunFolder:
    """Make the run's folder, and hold it."""
    path = _new_folder_name(config.preset) if config.out is None else config.out
    folder = RunFolder(path)
    stack.enter_context(locked(folder.path))
    refuse_used(path)  # whoever held it until now may have begun a run
    return folder


def _build_again(config: TrainConfig, ranks: Ranks, stack: ExitStack) -> _Begun:
    run = stored_run(Path(config.resume or ""))
    config = config_to_resume(config, run)
    folder = RunFolder.reopen(config.resume or "")
    check_processes(run.n_processes, ranks.count, folder.path)
    stack.enter_context(locked(folder.path))
    check_corpus(config, run.corpus_sha256)
    checkpoint = latest(folder.path)
    about = None if checkpoint is None else read_about(checkpoint)
    # As many threads as when the run began: others would round otherwise.
    threads = config.threads if about is None else about.get("threads")
    stack.enter_context(torch_threads(check_integer("threads", threads, 0, MOST_THREADS)))
    setup = Setup(config, ranks)
    config = resolved(config, setup)
    if checkpoint is None or about is None:
        return _Begun(config, setup, folder)
    with sound(checkpoint):
        check(about, checkpoint, config, setup.corpus.sha256, ranks.count)
    state = read(checkpoint)
    _check_holds(folder, state, checkpoint)
    restore_surgeon(checkpoint, setup)
    return _Begun(config, setup, folder, checkpoint, state)


def _check_holds(folder: RunFolder, state: State, checkpoint: Path) -> None:
    """Refuse a checkpoint whose rows the run's files no longer have; say what can be done."""
    try:
        folder.check_holds(*state["positions"])
    except ValueError as error:
        raise ValueError(
            f"{error}: restore the file, or delete {checkpoint} to resume from the checkpoint "
            "before it, or from the start if there is none"
        ) from error


def _settings(begun: _Begun, ranks: Ranks) -> dict[str, Any]:
    """Return what `config.json` holds: what was chosen, and what was found."""
    chosen = to_settings(begun.config) | {"out": str(begun.folder.path), "resume": None}
    return chosen | {"corpus_sha256": begun.setup.corpus.sha256, "processes": ranks.count}


def _positions(config: TrainConfig, state: State | None) -> tuple[int, int] | None:
    """Return how much of a resumed run's files was written when its checkpoint was."""
    if config.resume is None:
        return None
    if state is None:
        return 0, 0
    metrics, samples = state["positions"]
    return int(metrics), int(samples)


def _run_phases(
    config: TrainConfig,
    setup: Setup,
    logger: RunLogger,
    progress: Progress,
    checkpointer: Checkpointer,
) -> None:
    """Run every phase; after each that operates, ask what the surgeon was worth."""
    curriculum = Curriculum(
        setup.learner, setup.eval_env, setup.surgeon, config.curriculum, setup.generators.commit
    )
    phases = make_phases(config.curriculum, config.surgeon)
    if progress.operation is not None:
        curriculum.operation = np.asarray(progress.operation)
    report = LiveReport(checkpointer.folder)
    for phase in phases[progress.phase :]:
        if progress.steps:
            logger.resume(phase, progress.steps)
        else:
            logger.begin(phase)
        for done in curriculum.steps(phase, logger, progress.steps):
            progress.steps = done
            operation = curriculum.operation
            progress.operation = None if operation is None else operation.tolist()
            report.refresh()
            checkpointer.stepped(progress)
        require_same(setup.learner.ranks, setup.learner.model)
        progress.phases.append(logger.end())
        if phase.operations and setup.surgeon is not None:
            logger.say(f"measuring what the surgeon was worth after {phase.name}")
            effect = measure_effect(
                setup.surgeon, setup.eval_env, phase.name, setup.generators.effect
            )
            progress.effects.append(effect._replace(n_practised=logger.n_operations))
        progress.phase, progress.steps = progress.phase + 1, 0


def _references(setup: Setup) -> dict[str, Any]:
    """Return what the model is to be held against: it is known before anything is learned."""
    return {
        "references": evaluate_references(setup.patient),
        "corpus_nats_per_char": setup.corpus.nats_per_char,
    }


@contextmanager
def _report_at_the_end(folder: Path) -> Iterator[None]:
    """Write the report of what there is when the body ends, also if it breaks off."""
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):  # what broke off is what is to be told
            write_report(folder)
        raise
    write_report(folder)


def _new_folder_name(preset: str) -> str:
    """Make a folder for a run that was given none, and return its name; nobody else gets it.

    Raises:
        ValueError: if it cannot be made.
    """
    name = time.strftime(f"runs/%Y%m%d-%H%M%S-{preset}")
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    for path in map(Path, names):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"out must be a folder that can be written to, got {str(path)!r}: {error.strerror}"
            ) from error
        break
    return str(path)
