"""Going on with a run: what its checkpoints hold, and who may go on from one."""

from __future__ import annotations

import os
import platform
import signal
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from agents.errors import STOPPING
from agents.evaluation.surgeon_effect import Effect
from agents.surgeons.registry import reading, save_surgeon
from agents.tracking.run_folder import CHECKPOINTS, resume_command
from agents.tracking.writer import MetricWriter
from agents.training import checkpoint
from agents.training.build import Setup
from agents.training.checkpoint import BadCheckpoint
from agents.training.config import BadInput, TrainConfig, to_settings
from agents.training.logger import RunLogger
from agents.training.stored import HARMLESS, PLACES, flat
from avatarl_env.lm.storage import load_weights

PACKAGES = ("torch", "gymnasium", "stable-baselines3", "numpy", "avatarl-env")


class Stopped(KeyboardInterrupt):
    """Somebody asked the run to stop: it has written a checkpoint and does."""

    def __init__(self, signum: int, folder: Path) -> None:
        """Remember who asked, and what can be gone on with."""
        super().__init__(f"stopped; go on with: {resume_command(folder)}")
        self.signum = signum


@dataclass
class Progress:
    """How far a run is."""

    phase: int = 0
    """Number of the phase that is under way."""
    steps: int = 0
    """Steps done in it; 0: it has not begun."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """Records of the phases that have ended."""
    effects: list[Effect] = field(default_factory=list)
    operation: list[float] | None = None
    """Coefficients under which the model samples what it learns from, if any."""


class Checkpointer:
    """Writes checkpoints between steps: now and then, and when a signal asks the run to stop."""

    def __init__(
        self, config: TrainConfig, setup: Setup, logger: RunLogger, writer: MetricWriter
    ) -> None:
        """Remember whose state it is; the first checkpoint is due after the first interval."""
        self._config = config
        self._setup = setup
        self._logger = logger
        self._writer = writer
        self.folder: Path = writer.folder.path
        self._root = checkpoints_of(self.folder)
        known = checkpoint.checkpoints(self._root)
        self._number = checkpoint.number_of(known[-1]) if known else 0
        self._last = time.perf_counter()
        self.seconds = 0.0
        """Time spent on checkpoints."""
        self.n_written = 0
        self._signum: int | None = None

    def stepped(self, progress: Progress) -> None:
        """Write a checkpoint if one is due.

        Raises:
            Stopped: if a signal came meanwhile; after a last checkpoint.
        """
        due = time.perf_counter() - self._last >= self._config.checkpoint_seconds
        # What could not be learned from is not what to go back to.
        may = not self._setup.learner.n_bad_in_a_row
        n_before = self.n_written
        if due and may:
            self.write(progress)
        # Asked for once: a signal may come at any time, and all processes have to stop alike.
        signum: int | None = self._setup.learner.ranks.broadcast(self._signum)
        if signum is not None:
            if may and self.n_written == n_before:
                self.write(progress)
            raise Stopped(signum, self.folder)

    def write(self, progress: Progress) -> None:
        """Write a checkpoint."""
        start = time.perf_counter()
        self._number += 1
        setup, surgeon = self._setup, self._setup.surgeon
        state = {
            "progress": {
                **asdict(progress),
                "effects": [effect.as_summary() for effect in progress.effects],
            },
            "model": dict(setup.learner.model.named_parameters()),
            "learner": setup.learner.get_state(),
            "generators": setup.generators.get_state(),
            "logger": self._logger.get_state(),
            "positions": list(self._writer.positions()),
            "forward_tokens": setup.patient.forward_tokens,
            "surgeon": None if surgeon is None else surgeon.get_state(),
        }
        about = describe(self._config, setup.corpus.sha256, setup.learner.ranks.count)
        checkpoint.write(self._root, self._number, state, about, self._save_surgeon)
        self.n_written += 1
        self._last = time.perf_counter()
        self.seconds += self._last - start

    def _save_surgeon(self, folder: Path) -> None:
        if self._setup.surgeon is not None:
            seed = self._setup.generators.surgeon_seed
            name, options = self._config.surgeon, self._config.surgeon_options
            save_surgeon(self._setup.surgeon, folder, name, seed, options)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let a signal that asks to stop end the body after the step under way; a second at once.

        Of a terminal that is closed several SIGHUPs may come: they count as one. A signal that
        this process was started to ignore, as shells do in the background, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOPPING}
        heard = [number for number in STOPPING if before[number] != signal.SIG_IGN]
        hangup = getattr(signal, "SIGHUP", None)

        def note(number: int, frame: FrameType | None) -> None:
            self._signum = number
            for each in heard:
                signal.signal(each, signal.SIG_IGN if each == hangup else before[each])
            if number == hangup:
                leave_closed_terminal()
            self._logger.say("stopping after this step; once more to stop at once")

        for number in heard:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])


def checkpoints_of(folder: Path) -> Path:
    """Return where a run's checkpoints lie."""
    return folder / CHECKPOINTS


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(config: TrainConfig, corpus_sha256: str, n_processes: int = 1) -> dict[str, Any]:
    """Return what whoever goes on from a checkpoint has to agree with."""
    left_out = (*HARMLESS, *PLACES)
    settings = {name: x for name, x in to_settings(config).items() if name not in left_out}
    about = {"settings": settings, "corpus_sha256": corpus_sha256, "versions": versions()}
    return {**about, "threads": torch.get_num_threads(), "processes": n_processes}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads in the body; 0 leaves its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latest(folder: Path) -> Path | None:
    """Return a run's newest checkpoint, or None where there is none yet."""
    known = checkpoint.checkpoints(checkpoints_of(folder))
    return known[-1] if known else None


def check(
    about: Mapping[str, Any],
    path: Path,
    config: TrainConfig,
    corpus_sha256: str,
    n_processes: int = 1,
) -> None:
    """Refuse a checkpoint that belongs to something else.

    Args:
        about: what is said about the checkpoint.
        path: its folder.
        config: of the run that is to go on.
        corpus_sha256: of its text.
        n_processes: how many are to go on.

    Raises:
        BadCheckpoint: (a ValueError) says what differs.
    """
    check_processes(about["processes"], n_processes, path)
    here = describe(config, corpus_sha256, n_processes)
    theirs, ours = (flat(x["settings"]) for x in (about, here))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise BadCheckpoint(
                f"checkpoint must be of this configuration, got another {name} in {path}: "
                f"{theirs.get(name)!r}, in config.json {ours.get(name)!r}"
            )
    if about["corpus_sha256"] != corpus_sha256:
        raise BadCheckpoint(f"checkpoint must be of this corpus, got another in {path}")
    for name, number in about["versions"].items():
        if here["versions"].get(name) != number:
            raise BadCheckpoint(
                f"checkpoint must be of the versions that are installed, got {name} {number} in "
                f"{path} and {here['versions'].get(name)} here"
            )


def restore_surgeon(path: Path, setup: Setup) -> None:
    """Put the surgeon where it was; before anything is written, for its files may not fit.

    Args:
        path: the checkpoint's folder.
        setup: as freshly built.

    Raises:
        BadCheckpoint: if the files are damaged, or of another surgeon.
    """
    if setup.surgeon is None:
        return
    try:
        with reading(path):
            setup.surgeon.load(path)
            setup.surgeon.set_state(checkpoint.read(path)["surgeon"])
    except ValueError as error:
        raise BadCheckpoint(str(error)) from error


def restore(state: Mapping[str, Any], path: Path, setup: Setup, logger: RunLogger) -> Progress:
    """Put everything but the surgeon where it was when the checkpoint was written.

    Args:
        state: read from the checkpoint.
        path: the checkpoint's folder, for messages.
        setup: as freshly built.
        logger: as freshly opened.

    Raises:
        BadInput: if the state is not one of such a run.
    """
    try:
        with checkpoint.sound(path):
            return _restore(state, setup, logger)
    except BadCheckpoint as error:
        raise BadInput(str(error)) from error


def _restore(state: Mapping[str, Any], setup: Setup, logger: RunLogger) -> Progress:
    load_weights(setup.learner.model, state["model"])
    setup.patient.n_changes += 1
    setup.patient.forward_tokens = state["forward_tokens"]
    setup.learner.set_state(state["learner"])
    setup.generators.set_state(state["generators"])
    logger.set_state(state["logger"])
    progress = dict(state["progress"])
    effects = [Effect.from_summary(summary) for summary in progress.pop("effects")]
    return Progress(**progress, effects=effects)


def check_processes(began: int, n_processes: int, path: Path) -> None:
    """Refuse to go on with more processes, or fewer: their shares of a sum would round otherwise.

    Raises:
        BadCheckpoint: says how many there were.
    """
    if began != n_processes:
        raise BadCheckpoint(
            f"processes must be as many as when the run began, {began}, got {n_processes} for "
            f"{path} (torchrun --nproc-per-node)"
        )


def leave_closed_terminal() -> None:
    """Discard stdout and stderr if they lead to a terminal that has been closed."""
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        except OSError:  # not open at all
            continue
