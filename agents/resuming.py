"""Going on with a run: what its checkpoints hold, and who may go on from one."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
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

from agents import checkpoint
from agents.checkpoint import BadCheckpoint, load_weights
from agents.config import TrainConfig, from_settings, preset
from agents.effect import Effect
from agents.journal import Journal
from agents.launch import started_by
from agents.setup import Setup
from agents.surgeons import reading, save_surgeon
from agents.tracking import MetricWriter
from avatarl_env.files import read_json

PACKAGES = ("torch", "gymnasium", "stable-baselines3", "numpy", "avatarl-env")
OWN = ("resume", "out", "track", "tensorboard")  # settings that a resumed run may have of its own


class Stopped(KeyboardInterrupt):
    """Somebody asked the run to stop: it has written a checkpoint and does."""

    def __init__(self, signum: int, folder: Path) -> None:
        """Remember who asked, and what can be gone on with."""
        command = " ".join(started_by("train.py"))
        super().__init__(f"stopped; go on with: {command} --resume {folder}")
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
        self, config: TrainConfig, setup: Setup, journal: Journal, writer: MetricWriter
    ) -> None:
        """Remember whose state it is; the first checkpoint is due after the first interval."""
        self._config = config
        self._setup = setup
        self._journal = journal
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
            "journal": self._journal.get_state(),
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
        """Let SIGINT and SIGTERM end the body after the step under way; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self._signum = number
            self._journal.say("stopping after this step; once more to stop at once")
            give_back()

        def give_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            give_back()


def checkpoints_of(folder: Path) -> Path:
    """Return where a run's checkpoints lie."""
    return folder / "checkpoints"


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
    settings = {name: value for name, value in asdict(config).items() if name not in OWN}
    about = {"settings": settings, "corpus_sha256": corpus_sha256, "versions": versions()}
    numbers = {"threads": torch.get_num_threads(), "processes": n_processes}
    return dict(json.loads(json.dumps({**about, **numbers})))  # as JSON gives it back


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` CPU threads in the body; 0 leaves its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stored_config(asked: TrainConfig, n_processes: int = 1) -> TrainConfig:
    """Return the configuration of the run that is to be resumed.

    Args:
        asked: names the run in ``resume``. Its other settings are the presets' or the run's own.
        n_processes: how many are to go on with it.

    Raises:
        ValueError: if there is no such run, it has finished, another setting is asked for, or it
            had another number of processes.
    """
    folder = Path(asked.resume or "")
    path = folder / "config.json"
    if not os.path.isfile(path):  # also of a name that is too long
        raise ValueError(f"resume must be a run folder, with its config.json, got {asked.resume!r}")
    if (folder / "summary.json").is_file():
        raise ValueError(f"resume must be a run that has not finished, got {asked.resume!r}")
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"resume must be a run with a readable config.json, got {path}") from error
    config = from_settings(settings)
    _check_processes(settings, n_processes, folder)
    usual, own = _flat(preset(asked.preset)), _flat(config)
    for name, value in _flat(asked).items():
        if name not in OWN and value != usual[name] and value != own[name]:
            raise ValueError(
                f"{name} must be the run's own where it is resumed, {own[name]!r}, got {value!r}"
            )
    track = config.track if asked.track is None else asked.track
    tensorboard = config.tensorboard or asked.tensorboard
    return dataclasses.replace(
        config, resume=asked.resume, out=str(folder), track=track, tensorboard=tensorboard
    )


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
    _check_processes(about, n_processes, path)
    here = describe(config, corpus_sha256, n_processes)
    for name, what in (("settings", "configuration"), ("corpus_sha256", "corpus")):
        if about[name] != here[name]:
            raise BadCheckpoint(f"checkpoint must be of this {what}, got another in {path}")
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


def restore(state: Mapping[str, Any], setup: Setup, journal: Journal) -> Progress:
    """Put everything but the surgeon where it was when the checkpoint was written.

    Args:
        state: read from the checkpoint.
        setup: as freshly built.
        journal: as freshly opened.
    """
    load_weights(setup.learner.model, state["model"])
    setup.patient.n_changes += 1
    setup.patient.forward_tokens = state["forward_tokens"]
    setup.learner.set_state(state["learner"])
    setup.generators.set_state(state["generators"])
    journal.set_state(state["journal"])
    progress = dict(state["progress"])
    effects = [Effect.from_summary(summary) for summary in progress.pop("effects")]
    return Progress(**progress, effects=effects)


def _check_processes(about: Mapping[str, Any], n_processes: int, path: Path) -> None:
    """Refuse to go on with more processes, or fewer: their shares of a sum would round otherwise.

    Raises:
        BadCheckpoint: says how many there were.
    """
    began = about.get("processes", 1)
    if began != n_processes:
        raise BadCheckpoint(
            f"processes must be as many as when the run began, {began}, got {n_processes} for "
            f"{path} (torchrun --nproc-per-node)"
        )


def _flat(config: TrainConfig) -> dict[str, Any]:
    """Return all settings by their dotted names."""

    def walk(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if isinstance(value, dict) and name not in ("surgeon_options", "score"):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(asdict(config), ""))
