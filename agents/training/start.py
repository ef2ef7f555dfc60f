"""Starting and resuming a run: from a configuration to a `Run` on every rank.

The first rank finds out what there is to do, then all build their parts, and only when none of them
has refused is anything written. Then all take the first rank's state.
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
from agents.surgeons.registry import reading
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
"""Errors of the input, before anything is trained or written."""


@contextmanager
def open_run(
    config: TrainConfig, ranks: Ranks, *, quiet: bool = False, command: str | None = None
) -> Iterator[Run]:
    """Start or resume a run on every rank; at the end close its files and write its report.

    Args:
        config: what to do.
        ranks: that train together; all make this call.
        quiet: show no progress.
        command: how the run was started, for the record.

    Raises:
        BadInput: if one of the ranks cannot start or resume the run.
    """
    with ExitStack() as stack:
        try:
            start = _build_all(config, ranks, stack)
        except REFUSED as error:
            raise BadInput(str(error)) from error
        log, progress, path = Logger(), Progress(), Path()
        if start.folder is not None:
            path = start.folder.path
            log = _open_log(start, start.folder, stack, quiet=quiet, command=command)
            progress = _restore(start, log)
        path, progress = _share_state(start.parts, ranks, path, progress)
        run = Run(start.parts, progress, log, path, command)
        try:
            with run.checkpoint.signals:
                yield run
        except DivergedError as error:
            error.folder = ranks.broadcast(path if checkpoint.latest(path) else None)
            raise


class _Plan(NamedTuple):
    """What the first rank finds out before anything is built."""

    config: TrainConfig
    """Resolved: it means the same anywhere."""
    corpus: Corpus
    n_threads: int
    folder: RunFolder | None = None
    """Of a run that is resumed."""
    checkpoint: tuple[Path, dict[str, Any]] | None = None
    """The newest, and what a run must match to resume from it."""


class _Start(NamedTuple):
    """What a rank has built."""

    parts: Parts
    folder: RunFolder | None = None
    """None on every rank but the first."""
    checkpoint: Path | None = None
    state: State | None = None
    """Read from the checkpoint."""


def _build_all(config: TrainConfig, ranks: Ranks, stack: ExitStack) -> _Start:
    """Build the parts on every rank; make or reopen the folder on the first.

    Raises:
        ValueError: (or ImportError) on every rank, if one of them cannot.
    """
    plan: _Plan | None = None
    with ranks.agreeing(*REFUSED):
        if ranks.is_first:
            resumes = config.resume is not None
            plan = _plan_resumed(config, ranks, stack) if resumes else _plan_new(config)
    told = None if plan is None else (plan.config, plan.corpus.sha256, plan.n_threads)
    config, sha256, n_threads = ranks.broadcast(told)
    stack.enter_context(torch_threads(n_threads))
    path: Path | None = None
    state: State | None = None
    with ranks.agreeing(*REFUSED):
        corpus = load_corpus(config.corpus) if plan is None else plan.corpus
        if corpus.sha256 != sha256:
            raise ValueError(f"corpus must be the same on every rank, got another {corpus.name!r}")
        parts = build(config, corpus, ranks)
        if plan is not None and plan.folder is not None and plan.checkpoint is not None:
            path, about = plan.checkpoint
            state = _read_checkpoint(path, about, plan.folder, parts)
    folder: RunFolder | None = None
    with ranks.agreeing(*REFUSED):
        if plan is not None:
            folder = plan.folder or _new_folder(config, stack)
    return _Start(parts, folder, path, state)


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
    # As many threads as when the run began: others would round otherwise.
    stored = config.threads if about is None else about.get("threads")
    n_threads = check_integer("threads", stored, 0, MOST_THREADS) or torch.get_num_threads()
    found = None if path is None or about is None else (path, about)
    return _Plan(_resolved(config, corpus), corpus, n_threads, folder, found)


def _resolved(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    """Return a configuration that means the same anywhere."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(config, corpus=corpus.name, device=device)


def _read_checkpoint(path: Path, about: dict[str, Any], folder: RunFolder, parts: Parts) -> State:
    """Check that a checkpoint fits the parts; restore the surgeon; return the rest of the state.

    The surgeon comes first, before anything is written: its own files may not fit.
    """
    with checkpoint.sound(path):
        here = resume.describe(parts.config, parts.corpus.sha256, parts.learner.ranks.count)
        resume.check(about, here, path)
    state = checkpoint.read(path)
    try:
        folder.check_holds(*state["positions"])
    except ValueError as error:
        raise ValueError(
            f"{error}: restore the file, or delete {path} to resume from the checkpoint before "
            "it, or from the start if there is none"
        ) from error
    if parts.surgeon is not None:
        with reading(path):
            parts.surgeon.load(path)
            parts.surgeon.set_state(state["surgeon"])
    return state


def _new_folder(config: TrainConfig, stack: ExitStack) -> RunFolder:
    """Make the run's folder, and lock it."""
    path = _new_folder_name(config.preset) if config.out is None else config.out
    folder = RunFolder(path)
    stack.enter_context(checkpoint.locked(folder.path))
    refuse_used(path)  # another process may have held the lock and begun a run
    return folder


def _new_folder_name(preset: str) -> str:
    """Make a folder for a run that was given none; no other process gets the same.

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


def _open_log(
    start: _Start, folder: RunFolder, stack: ExitStack, *, quiet: bool, command: str | None
) -> RunLogger:
    """Open the run's files and its progress bar; `stack` closes them."""
    parts, config, state = start.parts, start.parts.config, start.state
    stack.enter_context(folder.written_to())
    stack.enter_context(_report_at_the_end(folder.path))
    positions = (0, 0) if state is None else state["positions"]
    settings = to_settings(config) | {"out": str(folder.path), "resume": None}
    settings["corpus_sha256"] = parts.corpus.sha256
    settings["processes"] = parts.learner.ranks.count
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
    log = RunLogger(writer, parts, best, quiet=quiet)
    log.say(introduction(parts, folder.path))
    stack.enter_context(closing(log))
    return log


def _restore(start: _Start, log: RunLogger) -> Progress:
    """Restore everything but the surgeon from the checkpoint, if there is one.

    Raises:
        BadInput: if the state is not one of such a run.
    """
    parts, path, state = start.parts, start.checkpoint, start.state
    if state is None or path is None:
        if parts.config.resume is not None:
            log.say("there is no checkpoint yet: the run begins anew")
            log.best.clear()
        return Progress()
    try:
        with checkpoint.sound(path):
            load_weights(parts.learner.model, state["model"])
            parts.patient.n_changes += 1
            parts.patient.forward_tokens = state["forward_tokens"]
            parts.learner.set_state(state["learner"])
            parts.generators.set_state(state["generators"])
            parts.curriculum.set_operation(state["operation"])
            log.set_state(state["logger"])
            progress = Progress.from_state(state["progress"])
    except ValueError as error:
        raise BadInput(str(error)) from error
    log.say(f"resuming from {path}, {log.seconds:.0f} s into the run")
    return progress


def _share_state(
    parts: Parts, ranks: Ranks, folder: Path, progress: Progress
) -> tuple[Path, Progress]:
    """Let every rank begin where the first does, with the same bits; return folder and progress."""
    if ranks.count == 1:
        return folder, progress
    learner, curriculum = parts.learner, parts.curriculum
    own = {
        "weights": dict(learner.model.named_parameters()),
        "learner": learner.get_state(),
        "operation": curriculum.operation,
    }
    folder, phase, steps, state = ranks.broadcast(
        (folder, progress.phase, progress.steps, flatten(own) if ranks.is_first else None)
    )
    if ranks.is_first:
        return folder, progress
    given = unflatten(*state)
    load_weights(learner.model, given["weights"])
    learner.set_state(given["learner"])
    curriculum.set_operation(given["operation"])
    return folder, Progress(phase, steps)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads in the body."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _report_at_the_end(folder: Path) -> Iterator[None]:
    """Write the report when the body ends, also by an error."""
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):  # the body's error matters more
            write_report(folder)
        raise
    write_report(folder)
