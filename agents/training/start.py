"""Start or resume a run: from a configuration to a `Run` on every rank.

1. The first rank resolves the configuration and, to resume, finds the newest checkpoint.
2. Every rank builds its parts; the first restores them from the checkpoint.
3. If no rank has failed, the first rank creates or opens the run's files.
4. The other ranks take over the first rank's weights, learner and progress.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.distributed import Ranks
from agents.errors import BadInput, DivergedError
from agents.report import write_report
from agents.state import State, flatten, unflatten
from agents.surgeons.base import reading
from agents.tracking.run_folder import CHECKPOINTS, RunFolder, refuse_used
from agents.tracking.writer import MetricWriter, check_tracking
from agents.training import checkpoint, resume
from agents.training.best_model import BestModel
from agents.training.build import Parts, build
from agents.training.config import MOST_THREADS, TrainConfig, to_settings
from agents.training.logger import Logger, RunLogger
from agents.training.resume import Progress
from agents.training.run import Run
from agents.training.summary import about_model, introduction
from avatarl_env.errors import check_integer
from avatarl_env.lm.storage import load_weights
from avatarl_env.text.corpus import Corpus, load_corpus

REFUSED = (ValueError, ImportError)
"""Errors that mean bad input if they are raised before the training starts."""


@contextmanager
def open_run(
    config: TrainConfig, ranks: Ranks, *, quiet: bool = False, command: str | None = None
) -> Iterator[Run]:
    """Start or resume a run on every rank; on exit close its files and write its report.

    Args:
        config: of the run.
        ranks: the processes that train together; each makes this call.
        quiet: show no progress.
        command: the command that started the run, for its records.

    Raises:
        BadInput: on every rank, if one of them cannot start or resume the run.
    """
    with ExitStack() as stack:
        run = _start(config, ranks, stack, quiet=quiet, command=command)
        try:
            with run.checkpoint.signals:
                yield run
        except DivergedError as error:
            error.folder = ranks.broadcast(run.folder if checkpoint.latest(run.folder) else None)
            raise


class _Plan(NamedTuple):
    """What the first rank decides before the parts are built."""

    config: TrainConfig
    """With the corpus and the device that "auto" stands for."""
    corpus: Corpus
    n_threads: int
    folder: RunFolder | None = None
    """Of a run to resume."""
    checkpoint: tuple[Path, dict[str, Any]] | None = None
    """The newest checkpoint, and what a run must match to resume from it."""


def _start(
    config: TrainConfig, ranks: Ranks, stack: ExitStack, *, quiet: bool, command: str | None
) -> Run:
    plan: _Plan | None = None  # on the first rank alone, like `state`
    state: State | None = None
    log, path, progress = Logger(), Path(), Progress()
    try:
        with ranks.agreeing(*REFUSED):
            if ranks.is_first:
                resumes = config.resume is not None
                plan = _plan_resumed(config, ranks, stack) if resumes else _plan_new(config)
        shared = None if plan is None else (plan.config, plan.corpus.sha256, plan.n_threads)
        config, sha256, n_threads = ranks.broadcast(shared)
        stack.enter_context(torch_threads(n_threads))
        with ranks.agreeing(*REFUSED):
            corpus = load_corpus(config.corpus) if plan is None else plan.corpus
            if corpus.sha256 != sha256:
                raise ValueError(
                    f"corpus must be the same on every rank, got another {corpus.name!r}"
                )
            parts = build(config, corpus, ranks)
            if plan is not None:
                state, progress = _restore(plan, parts)
        with ranks.agreeing(*REFUSED):
            if plan is not None:
                folder = plan.folder or _new_folder(config, stack)
                path = folder.path
                log = _open_log(parts, folder, state, stack, quiet=quiet, command=command)
    except REFUSED as error:
        raise BadInput(str(error)) from error
    path, progress = _share_state(parts, ranks, path, progress)
    return Run(parts, progress, log, path, command)


def _plan_new(config: TrainConfig) -> _Plan:
    check_tracking(config.track, config.tensorboard)
    if config.out is not None:
        refuse_used(config.out)
    corpus = load_corpus(config.corpus)
    n_threads = config.threads or torch.get_num_threads()
    return _Plan(_resolved(config, corpus), corpus, n_threads)


def _plan_resumed(config: TrainConfig, ranks: Ranks, stack: ExitStack) -> _Plan:
    folder_name = config.resume or ""
    run = resume.stored_run(Path(folder_name))
    config = resume.config_to_resume(config, run)
    check_tracking(config.track, config.tensorboard)
    folder = RunFolder.reopen(folder_name)
    resume.check_ranks(run.n_ranks, ranks.count, folder.path)
    stack.enter_context(checkpoint.locked(folder.path))
    corpus = resume.corpus_to_resume(config.corpus, run.corpus_sha256)
    path = checkpoint.latest(folder.path)
    about = None if path is None else checkpoint.read_about(path)
    # The run's own number of threads: another number would round differently.
    stored = config.threads if about is None else about.get("threads")
    n_threads = check_integer("threads", stored, 0, MOST_THREADS) or torch.get_num_threads()
    newest = None if path is None or about is None else (path, about)
    return _Plan(_resolved(config, corpus), corpus, n_threads, folder, newest)


def _resolved(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """Replace "auto" by the corpus and the device that it stands for."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(config, corpus=corpus.name, device=device)


def _restore(plan: _Plan, parts: Parts) -> tuple[State | None, Progress]:
    """Restore the parts from the newest checkpoint, if there is one; nothing is written.

    Returns:
        The state, of which only the logger's part is left to restore, and the progress.

    Raises:
        BadCheckpoint: (a ValueError) if the checkpoint does not fit.
    """
    if plan.checkpoint is None or plan.folder is None:
        return None, Progress()
    path, about = plan.checkpoint
    with checkpoint.checking(path):
        here = resume.describe(parts.config, parts.corpus.sha256, parts.learner.ranks.count)
        resume.check(about, here, path)
    state = checkpoint.read(path)
    try:
        plan.folder.check_holds(*state["positions"])
    except ValueError as error:
        raise ValueError(
            f"{error}: restore the file, or delete {path} to resume from the checkpoint before "
            "it, or from the start if there is none"
        ) from error
    if parts.surgeon is not None:
        with reading(path):
            parts.surgeon.load(path)
            parts.surgeon.set_state(state["surgeon"])
    with checkpoint.checking(path):
        load_weights(parts.learner.model, state["model"])
        parts.patient.n_changes += 1
        parts.patient.forward_tokens = state["forward_tokens"]
        parts.learner.set_state(state["learner"])
        parts.generators.set_state(state["generators"])
        parts.curriculum.set_operation(state["operation"])
        return state, Progress.from_state(state["progress"])


def _new_folder(config: TrainConfig, stack: ExitStack) -> RunFolder:
    """Create and lock the run's folder."""
    path = _new_folder_name(config.preset) if config.out is None else config.out
    folder = RunFolder(path)
    stack.enter_context(checkpoint.locked(folder.path))
    refuse_used(path)  # another process may have started a run before the lock was taken
    return folder


def _new_folder_name(preset: str) -> str:
    """Create a run folder named after date, time and preset; a second one gets a number.

    Raises:
        ValueError: if it cannot be created.
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


def _open_log(
    parts: Parts,
    folder: RunFolder,
    state: State | None,
    stack: ExitStack,
    *,
    quiet: bool,
    command: str | None,
) -> RunLogger:
    """Open the run's files and its progress bar, at the state of a resumed run."""
    config = parts.config
    stack.enter_context(folder.written_to())
    stack.enter_context(_reported(folder.path))
    settings = to_settings(config) | {"out": str(folder.path), "resume": None}
    settings["corpus_sha256"] = parts.corpus.sha256
    settings["processes"] = parts.learner.ranks.count
    positions = (0, 0) if state is None else state["positions"]
    writer = stack.enter_context(
        MetricWriter(
            folder,
            config=settings,
            track=config.track,
            tensorboard=config.tensorboard,
            resume_from=None if config.resume is None else positions,
        )
    )
    about = about_model(parts, command)
    best = BestModel(
        folder.path / CHECKPOINTS / "best", parts.patient.model, parts.tokenizer, about
    )
    log = stack.enter_context(closing(RunLogger(writer, parts, best, quiet=quiet)))
    log.say(introduction(parts, folder.path))
    if state is not None:
        path = checkpoint.latest(folder.path)
        assert path is not None
        with checkpoint.checking(path):
            log.set_state(state["logger"])
        log.say(f"resuming from {path}, {log.seconds:.0f} s into the run")
    elif config.resume is not None:
        log.say("there is no checkpoint yet: the run starts from the beginning")
        best.clear()
    return log


def _share_state(
    parts: Parts, ranks: Ranks, folder: Path, progress: Progress
) -> tuple[Path, Progress]:
    """Copy the first rank's weights, learner, operation, folder and progress to every rank."""
    if ranks.count == 1:
        return folder, progress
    learner, curriculum = parts.learner, parts.curriculum
    state = {
        "weights": dict(learner.model.named_parameters()),
        "learner": learner.get_state(),
        "operation": curriculum.operation,
    }
    folder, phase, steps, flat = ranks.broadcast(
        (folder, progress.phase, progress.steps, flatten(state) if ranks.is_first else None)
    )
    if ranks.is_first:
        return folder, progress
    state = unflatten(*flat)
    load_weights(learner.model, state["weights"])
    learner.set_state(state["learner"])
    curriculum.set_operation(state["operation"])
    return folder, Progress(phase, steps)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with `count` CPU threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Write the report after the body, even if it raises."""
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):  # the body's error matters more
            write_report(folder)
        raise
    write_report(folder)
