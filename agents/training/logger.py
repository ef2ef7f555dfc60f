"""Loggers: the rows, samples and progress bar of a run."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.errors import printable
from agents.evaluation.language_model import PROGRESS_CHARACTERS, evaluate_references, evaluate_text
from agents.grpo.learner import GRPOStats
from agents.surgeons.registry import EpisodeRecord
from agents.tracking.writer import Clock, MetricWriter
from agents.training.best_model import BestModel
from agents.training.build import Parts
from agents.training.curriculum import FALSE_COMMIT_RATE, Commit, Phase

WRITE_EVERY = 5
"""Updates between two rows of kind "grpo"."""
SAMPLE_EVERY = 5
"""Evaluations between two samples."""
TEXT_METRICS = {"reward": "text_reward", "accuracy": "matched"}
"""Names of these metrics at horizons above 1, where they measure whole texts."""


class Logger:
    """A logger that writes nothing, for every rank but the first."""

    n_operations = 0
    """Operations of the surgeon so far."""

    def begin(self, phase: Phase) -> None:
        """Begin a phase."""

    def resume(self, phase: Phase, done: int) -> None:
        """Resume a phase of which `done` steps were done."""

    def update(self, stats: GRPOStats) -> None:
        """Log a GRPO update."""

    def operations(self, records: list[EpisodeRecord]) -> None:
        """Log a round of operations."""

    def commit(self, commit: Commit | None) -> None:
        """Log an attempt to commit."""

    def behavior(self, operation: EpisodeRecord | None) -> None:
        """Log the operation under which the model samples from now on; None: unoperated."""

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""

    def end(self) -> dict[str, Any]:
        """End the phase; return its name, steps, seconds, and first and last metrics."""
        return {}


class RunLogger(Logger):
    """Writes the rows of a run, evaluates and samples the model, and shows the progress."""

    def __init__(
        self, writer: MetricWriter, parts: Parts, best: BestModel, *, quiet: bool = False
    ) -> None:
        """Start the run's clock.

        Args:
            writer: of the run's files.
            parts: of the run.
            best: receives every evaluation.
            quiet: show no progress bar.
        """
        self.writer = writer
        self.best = best
        self._learner = parts.learner
        self._env = parts.env
        self._surgeon = parts.surgeon
        self._config = parts.config.curriculum
        self._quiet = quiet
        self.references: dict[str, Any] = {
            "references": evaluate_references(parts.patient),
            "corpus_nats_per_char": parts.corpus.nats_per_char,
        }
        """Scores of n-gram tables on the validation text, and the text's own entropy."""
        writer.write_references(self.references)
        self.n_operations = 0
        self.commits: list[dict[str, Any]] = []
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}
        self._phase = Phase("start", 0)
        self._rates: list[float] = []
        self._start = self._phase_start = self._last_update = time.perf_counter()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._evaluated = -1  # updates done at the last evaluation
        self._last_coefficients: np.ndarray | None = None
        # All samples share prompts and noise, so that they can be compared.
        self._sample = parts.patient.prompts(
            "surgeon",
            2,
            parts.env.config.prompt_length,
            self._config.sample_length,
            parts.generators.samples,
        )

    @property
    def forward_tokens(self) -> int:
        """Compute spent on learning and operating, in tokens of one forward.

        Evaluations for the reader (progress, final figures, samples) are not counted.
        """
        return self._learner.forward_tokens + self._env.patient.forward_tokens

    @property
    def seconds(self) -> float:
        """Time since the start of the run, without interruptions."""
        return time.perf_counter() - self._start

    def get_state(self) -> dict[str, Any]:
        """Return the state that later rows depend on."""
        return {
            "seconds": self.seconds,
            "phase_seconds": time.perf_counter() - self._phase_start,
            "first": self._first,
            "last": self._last,
            "evaluated": self._evaluated,
            "n_operations": self.n_operations,
            "commits": self.commits,
            "last_coefficients": self._last_coefficients,
            "best": self.best.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state; `resume` then opens the phase again."""
        self._start = time.perf_counter() - state["seconds"]
        self._phase_start = time.perf_counter() - state["phase_seconds"]
        self._first, self._last = dict(state["first"]), dict(state["last"])
        self._evaluated, self.n_operations = state["evaluated"], state["n_operations"]
        self.commits = [dict(commit) for commit in state["commits"]]
        last = state["last_coefficients"]
        self._last_coefficients = None if last is None else np.asarray(last)
        self.best.set_state(state["best"])

    def begin(self, phase: Phase) -> None:
        """Begin a phase; the run's first evaluates and samples the untrained model."""
        self._phase = phase
        self._first, self._last = {}, {}
        self._show(phase, 0)
        if phase.updates and self._learner.n_done == 0:
            self._evaluate()
            self._write_samples()
        self._phase_start = self._last_update = time.perf_counter()

    def resume(self, phase: Phase, done: int) -> None:
        """Resume a phase of which `done` steps were done."""
        self._phase = phase
        self._show(phase, done)
        self._last_update = time.perf_counter()

    def end(self) -> dict[str, Any]:
        """End the phase; return its name, steps, seconds, and first and last metrics."""
        if self._phase.updates and self._learner.n_done != self._evaluated:
            self._evaluate()
        self._write_samples()
        self.close()
        return {
            "name": self._phase.name,
            "steps": self._phase.steps,
            "seconds": time.perf_counter() - self._phase_start,
            "first": self._first,
            "last": self._last,
        }

    def close(self) -> None:
        """Close the progress bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._quiet:
            return
        try:
            tqdm.write(printable(text, sys.stdout))
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal has been closed
                raise

    def update(self, stats: GRPOStats) -> None:
        """Log a GRPO update."""
        now = time.perf_counter()
        self._rates.append(self._learner.tokens_per_update / (now - self._last_update))
        self._advance(1, loss=f"{stats.loss:.4f}", reward=f"{stats.reward:.3f}")
        n_done, every = self._learner.n_done, self._config.evaluate_every
        if n_done % WRITE_EVERY == 0 or n_done == 1:
            renamed = TEXT_METRICS if self._learner.config.horizon > 1 else {}
            row = {f"grpo/{renamed.get(x, x)}": value for x, value in stats._asdict().items()}
            row["grpo/skipped"] = float(self._learner.n_skipped)
            row["time/tokens_per_second"] = float(np.median(self._rates))
            self._rates.clear()
            self._write("grpo", row)
        if n_done % every == 0:
            self._evaluate()
        if n_done % (SAMPLE_EVERY * every) == 0:
            self._write_samples()
        self._last_update = time.perf_counter()

    def operations(self, records: list[EpisodeRecord]) -> None:
        """Log a round of operations and the surgeon's training metrics."""
        for record in records:
            self.n_operations += 1
            self._last_coefficients = record.coefficients
            row: dict[str, Any] = {
                "surgeon/return": record.total,
                "surgeon/length": record.length,
                "surgeon/mean_abs_action": record.mean_abs_action,
                "surgeon/coefficients": record.coefficients,
                "surgeon/flatline": record.flatline,
                "surgeon/lost_score": record.lost_score,
            }
            row |= {f"score/{name}": value for name, value in record.terms.items()}
            row |= {f"baseline/{name}": value for name, value in record.baseline_terms.items()}
            self._write("operation", row)
        stats = {} if self._surgeon is None else self._surgeon.stats()
        if stats:
            self._write("surgeon", dict(stats))
        # A flatline lets a row start its next operation early, so the records may be more, or none.
        n_planned = self._phase.operations * self._env.num_envs
        returns = [record.total for record in records]
        shown = {"operation": f"{np.mean(returns):+.4f}"} if returns else {}
        self._advance(n_planned, **shown)
        self._last_update = time.perf_counter()

    def commit(self, commit: Commit | None) -> None:
        """Log an attempt to commit."""
        if commit is None:
            return
        row = {
            "kept": commit.kept,
            "kl_ref_gain": commit.result.kl_ref_gain._asdict(),
            "heldout_loss_fall": commit.result.heldout_loss_fall._asdict(),
            "coefficients": commit.coefficients.tolist(),
        }
        self._write("commit", {f"commit/{name}": value for name, value in row.items()})
        self.commits.append({"phase": self._phase.name, "update": self._learner.n_done, **row})
        kept = sum(record["kept"] for record in self.commits)
        self._advance(0, commits=f"{kept}/{len(self.commits)}")
        self._last_update = time.perf_counter()

    def behavior(self, operation: EpisodeRecord | None) -> None:
        """Log the operation under which the model samples from now on; None: unoperated."""
        row: dict[str, Any] = {"behavior/operated": operation is not None}
        row["behavior/gain"] = None if operation is None else operation.total
        row["behavior/coefficients"] = None if operation is None else operation.coefficients
        self._write("behavior", row)
        self._last_update = time.perf_counter()

    def commit_summary(self, policy: str) -> dict[str, Any]:
        """Return the attempts to commit, and the largest expected number of false commits."""
        tried = len(self.commits)
        return {
            "policy": policy,
            "tried": tried,
            "kept": sum(commit["kept"] for commit in self.commits),
            "expected_false_at_most": tried * FALSE_COMMIT_RATE,
            "operations": self.commits,
        }

    def _show(self, phase: Phase, done: int) -> None:
        per_step = phase.updates + phase.operations * self._env.num_envs
        self._bar = tqdm(
            total=phase.steps * per_step,
            initial=done * per_step,
            desc=f"{phase.name:>9}",
            disable=self._quiet,
            unit="it",
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # seconds; a log needs few lines
        )

    def _evaluate(self) -> None:
        self._evaluated = self._learner.n_done
        validation = self._env.patient.splits["validation"][: PROGRESS_CHARACTERS + 1]
        metrics = evaluate_text(self._env.patient.model, validation)
        row = {f"validation/{name}": value for name, value in metrics._asdict().items()}
        self._write("evaluation", row)
        self.best.consider(metrics.loss, self._evaluated)
        self._advance(0, accuracy=f"{metrics.accuracy:.3f}")

    def _write_samples(self) -> None:
        """Sample the unoperated model and, in phases with operations, under the last one."""
        patient = self._env.patient
        with patient.uncounted():
            plain = self._texts(patient.evaluate(self._sample).generations.tokens)
            operated: list[str | None] = [None] * len(plain)
            if self._phase.operations and self._last_coefficients is not None:
                evaluation = patient.evaluate_operated(
                    self._env.operator, self._last_coefficients, self._sample
                )
                operated = [*self._texts(evaluation.generations.tokens)]
        for prompt, text, other in zip(self._sample.tokens, plain, operated, strict=True):
            row = {"prompt": patient.tokenizer.decode(prompt), "text": text}
            self._write("sample", {**row, "operated_text": other})

    def _texts(self, tokens: np.ndarray) -> list[str]:
        n_prompt = self._sample.tokens.shape[1]
        return [self._env.patient.tokenizer.decode(row[n_prompt:]) for row in tokens]

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        clock = Clock(
            phase=self._phase.name,
            update=self._learner.n_done,
            operation=self.n_operations,
            forward_tokens=self.forward_tokens,
            seconds=self.seconds,
        )
        self.writer.write(kind, clock, row)
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        self._first = numbers | self._first
        self._last |= numbers

    def _advance(self, n: int, **shown: str) -> None:
        self._shown |= shown
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(n)
