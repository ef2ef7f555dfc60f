"""A run under way: what surrounds the loop on each rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agents.distributed import require_same
from agents.errors import Stopped
from agents.evaluation.surgeon_effect import measure_effect
from agents.report import LiveReport
from agents.surgeons.registry import save_surgeon
from agents.tracking.run_folder import CHECKPOINTS, resume_command
from agents.training import checkpoint
from agents.training.build import Parts
from agents.training.curriculum import Phase, make_phases
from agents.training.logger import Logger, RunLogger
from agents.training.resume import Progress, describe
from agents.training.signals import StopSignals
from agents.training.summary import RunSummary, about_model, summarise
from avatarl_env.lm.storage import save_model


class Run:
    """A run on one rank; the first also logs, evaluates and writes."""

    def __init__(
        self, parts: Parts, progress: Progress, log: Logger, folder: Path, command: str | None
    ) -> None:
        """Connect the parts.

        Args:
            parts: restored to the state at `progress`.
            progress: how much of the run is done.
            log: a `RunLogger` on the first rank, a silent `Logger` on the others.
            folder: of the run.
            command: the command that started the run, for its records.
        """
        self.curriculum = parts.curriculum
        self.progress = progress
        self.log = log
        self.folder = folder
        self.checkpoint = Checkpointer(parts, progress, log, folder)
        self._parts = parts
        self._command = command

    def remaining_phases(self) -> tuple[Phase, ...]:
        """Return the phases that have not ended, the current one first."""
        config = self._parts.config
        return make_phases(config.curriculum, config.surgeon)[self.progress.phase :]

    def remaining_steps(self, phase: Phase) -> Iterator[int]:
        """Begin or resume a phase; yield the index of each remaining step."""
        if self.progress.steps:
            self.log.resume(phase, self.progress.steps)
        else:
            self.log.begin(phase)
        for step in range(self.progress.steps, phase.steps):
            # Counted first: the checkpoint at the end of the step includes it.
            self.progress.steps += 1
            self.progress.total += 1
            yield step

    def finish(self, phase: Phase) -> None:
        """End a phase: evaluate the model and, after operations, the surgeon's effect.

        Raises:
            DriftError: if the ranks have different weights.
        """
        parts, progress = self._parts, self.progress
        require_same(parts.learner.ranks, parts.learner.model)
        progress.phases.append(self.log.end())
        if phase.operations and parts.surgeon is not None:
            self.log.say(f"measuring the surgeon's effect after {phase.name}")
            effect = measure_effect(
                parts.surgeon,
                self.curriculum.eval_env,
                phase.name,
                parts.generators.effect,
                parts.config.curriculum.effect_prompts,
            )
            progress.effects.append(effect._replace(n_practised=self.log.n_operations))
        progress.phase, progress.steps = progress.phase + 1, 0

    def summary(self) -> RunSummary:
        """Write the final model and `summary.json`; return the summary on every rank."""
        self.checkpoint.signals.remove()  # no step follows that could end first
        summary: dict[str, Any] = {}
        if isinstance(self.log, RunLogger):
            summary = self._write_summary(self.log)
        return RunSummary(self.folder, self._parts.learner.ranks.broadcast(summary))

    def _write_summary(self, log: RunLogger) -> dict[str, Any]:
        parts, checkpointer = self._parts, self.checkpoint
        summary = summarise(parts, log, self.progress) | {
            "command": self._command,
            "seconds": log.seconds,
            "checkpoints": {"written": checkpointer.n_written, "seconds": checkpointer.seconds},
        }
        final = self.folder / CHECKPOINTS / "final"
        about = about_model(parts, self._command)
        save_model(final, parts.learner.model, parts.tokenizer, about)
        checkpointer.save_surgeon(final)
        log.writer.write_summary(summary)
        return summary


class Checkpointer:
    """Called after each step: writes checkpoints at intervals and stops the run on a signal."""

    def __init__(self, parts: Parts, progress: Progress, log: Logger, folder: Path) -> None:
        """Start the first interval.

        Args:
            parts: their state is stored.
            progress: stored too.
            log: a `RunLogger` on the first rank; other ranks write nothing.
            folder: of the run.
        """
        self.n_written = 0
        self.seconds = 0.0
        """Time spent on checkpoints."""
        self.signals = StopSignals(
            lambda: log.say("stopping after this step; repeat the signal to stop at once")
        )
        self._parts = parts
        self._progress = progress
        self._log = log
        self._folder = folder
        self._report = LiveReport(folder)
        self._last = time.perf_counter()

    def step(self) -> None:
        """Refresh the report, write a checkpoint if one is due, stop after a signal.

        Raises:
            Stopped: on every rank, after a last checkpoint, if the first received a signal.
        """
        is_written = False
        if isinstance(self._log, RunLogger):
            self._report.refresh()
            if time.perf_counter() - self._last >= self._parts.config.checkpoint_seconds:
                is_written = self._write(self._log)
        # Read once: a signal may come at any time, and all ranks must stop at the same step.
        signum: int | None = self._parts.learner.ranks.broadcast(self.signals.signum)
        if signum is not None:
            if isinstance(self._log, RunLogger) and not is_written:
                self._write(self._log)
            raise Stopped(f"stopped; resume with: {resume_command(self._folder)}", signum)

    def save_surgeon(self, folder: Path) -> None:
        """Store the surgeon, if there is one."""
        parts = self._parts
        if parts.surgeon is not None:
            seed, config = parts.generators.surgeon_seed, parts.config
            save_surgeon(parts.surgeon, folder, config.surgeon, seed, config.surgeon_options)

    def _write(self, log: RunLogger) -> bool:
        """Write a checkpoint, unless the last update was skipped: a run may be diverging."""
        parts, progress = self._parts, self._progress
        if parts.learner.n_bad_in_a_row:
            return False
        start = time.perf_counter()
        surgeon = parts.surgeon
        state = {
            "progress": progress.get_state(),
            "operation": parts.curriculum.operation,
            "model": dict(parts.learner.model.named_parameters()),
            "learner": parts.learner.get_state(),
            "generators": parts.generators.get_state(),
            "logger": log.get_state(),
            "positions": list(log.writer.positions()),
            "forward_tokens": parts.patient.forward_tokens,
            "surgeon": None if surgeon is None else surgeon.get_state(),
        }
        about = describe(parts.config, parts.corpus.sha256, parts.learner.ranks.count)
        root = self._folder / CHECKPOINTS
        checkpoint.write(root, progress.total, state, about, self.save_surgeon)
        self.n_written += 1
        self._last = time.perf_counter()
        self.seconds += self._last - start
        return True
