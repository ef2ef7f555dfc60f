"""What the processes of a run but the first do: the same updates, each on its share of a batch.

The first process alone operates, evaluates, and writes. What it does to the model, when to stop,
and where a resumed run stands, it tells the others in these calls; they make theirs in turn.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.distributed import Ranks, on_cpu, require_same, take_edits
from agents.errors import DivergedError
from agents.training.build import LearningSetup
from agents.training.config import BadInput, TrainConfig
from agents.training.curriculum import Phase, make_phases, updates
from agents.training.resume import Progress, Stopped, torch_threads
from avatarl_env.lm.storage import load_weights
from avatarl_env.surgery import find_targets, make_operator

REFUSED = (ValueError, ImportError)
"""Errors before anything is trained or written: the input's fault."""


class Parts(NamedTuple):
    """What every process builds its part of the run of."""

    config: TrainConfig
    corpus: str
    corpus_sha256: str
    n_threads: int


class Start(NamedTuple):
    """Where the run stands when the processes begin."""

    folder: Path
    phase: int
    steps: int
    weights: dict[str, torch.Tensor]
    learner: dict[str, Any]
    operation: list[float] | None
    """Coefficients under which the model samples, if any."""


def call_others(setup: LearningSetup, config: TrainConfig) -> None:
    """Let the other processes build their parts.

    Raises:
        ValueError: if one of them cannot.
    """
    ranks, corpus = setup.learner.ranks, setup.corpus
    ranks.broadcast(Parts(config, corpus.name, corpus.sha256, torch.get_num_threads()))
    with ranks.agreeing(*REFUSED):
        pass


def start_others(setup: LearningSetup, folder: Path, progress: Progress) -> None:
    """Let the other processes begin where this one does, with the same bits."""
    if setup.learner.ranks.count == 1:
        return
    weights = dict(setup.learner.model.named_parameters())
    state = {"weights": weights, "learner": setup.learner.get_state()}
    at = (folder, progress.phase, progress.steps)
    start = Start(*at, **on_cpu(state), operation=progress.operation)
    setup.learner.ranks.broadcast(start)


def follow(ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """Do the run that the first process does; return its folder and summary.

    Raises:
        BadInput: if it, or another process, cannot be begun.
        DivergedError: if the model cannot be trained on.
        Stopped: if the first process was asked to stop.
        LostError: if another process has ended before its time.
        DriftError: if the processes no longer have the same model.
    """
    while True:
        try:
            return _follow(ranks)
        except DivergedError:
            goes_back: bool = ranks.broadcast()
            if not goes_back:
                raise


def _follow(ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    with ExitStack() as stack:
        try:
            config, setup = _build(ranks, stack)
        except REFUSED as error:
            raise BadInput(str(error)) from error
        begun: Start = ranks.broadcast()
        follower = _Follower(config, setup, begun)
        steps = begun.steps
        for phase in make_phases(config.curriculum, config.surgeon)[begun.phase :]:
            for _ in range(steps, phase.steps):
                follower.step(phase)
                signum: int | None = ranks.broadcast()
                if signum is not None:
                    raise Stopped(signum, begun.folder)
            steps = 0
            require_same(ranks, setup.learner.model)
        folder, summary = ranks.broadcast()
    return folder, summary


class _Follower:
    """One process's learner, and what the first process does to its model."""

    def __init__(self, config: TrainConfig, setup: LearningSetup, begun: Start) -> None:
        """Stand where the first process stands."""
        self._learner = setup.learner
        self._patient = setup.patient
        self._operator = make_operator(
            config.operator, find_targets(setup.patient.model, config.layers)
        )
        self._operation = begun.operation
        load_weights(self._learner.model, begun.weights)
        self._learner.set_state(begun.learner)

    def step(self, phase: Phase) -> None:
        """Do one step of a phase: this process's share of it."""
        ranks, learner = self._learner.ranks, self._learner
        for _ in updates(learner, phase.updates, self._operated):
            pass
        if phase.commits and take_edits(ranks, learner.model):
            learner.model_changed()
        if phase.rollouts:
            self._operation = ranks.broadcast()

    def _operated(self) -> AbstractContextManager[object] | None:
        if self._operation is None:
            return None
        return self._patient.operated(self._operator, self._operation)


def _build(ranks: Ranks, stack: ExitStack) -> tuple[TrainConfig, LearningSetup]:
    """Build this process's part, once the first has built its own."""
    with ranks.agreeing(*REFUSED):
        pass
    parts: Parts = ranks.broadcast()
    with ranks.agreeing(*REFUSED):
        stack.enter_context(torch_threads(parts.n_threads))
        setup = LearningSetup(parts.config, ranks, parts.corpus)
        if setup.corpus.sha256 != parts.corpus_sha256:
            raise ValueError(
                f"corpus must be the same for every process, got another {parts.corpus!r}"
            )
    with ranks.agreeing(*REFUSED):  # the run's folder
        pass
    return parts.config, setup
