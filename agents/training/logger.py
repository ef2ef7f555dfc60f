"""The run's logger: what the curriculum does becomes rows, a progress bar and samples."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from agents.evaluation.language_model import PROGRESS_CHARACTERS, evaluate_text
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.surgeons.registry import EpisodeRecord, Surgeon
from agents.terminal import printable
from agents.tracking.writer import Clock, MetricWriter
from agents.training.best_model import BestModel
from agents.training.curriculum import FALSE_COMMIT_RATE, Commit, Phase
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

WRITE_EVERY = 5  # updates between two rows of kind "grpo"
SAMPLE_EVERY = 5  # evaluations between two samples
SAMPLE_CHARACTERS = 240
OF_TEXTS = {"reward": "text_reward", "accuracy": "matched"}  # what these are at horizons above 1


class RunLogger:
    """Writes the rows of a run and shows how far it is."""

    def __init__(
        self,
        writer: MetricWriter,
        learner: GRPOLearner,
        env: AttentionSurgeryVectorEnv,
        *,
        evaluate_every: int,
        rng: np.random.Generator,
        best: BestModel | None = None,
        quiet: bool = False,
    ) -> None:
        """Open the logger; the run's clock starts now.

        Args:
            writer: takes the rows.
            learner: whose updates are counted.
            env: whose patient is evaluated and sampled.
            evaluate_every: updates between two evaluations.
            rng: draws the samples' dice.
            best: is told of every evaluation.
            quiet: show no progress bar.
        """
        self._writer = writer
        self._learner = learner
        self._env = env
        self._evaluate_every = evaluate_every
        self._best = best
        self._quiet = quiet
        self._start = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}
        self._phase = Phase("start", 0, 0, 0, commits=False)
        self._rates: list[float] = []
        self._last_update = self._start
        self._phase_start = self._start
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._evaluated = -1  # updates done when the model was last evaluated
        self.n_operations = 0
        self.commits: list[dict[str, Any]] = []
        self._last_coefficients: np.ndarray | None = None
        # The dice and prompts of all samples are the same, so that samples can be compared.
        self._sample = env.patient.prompts(
            "surgeon", 2, env.config.prompt_length, SAMPLE_CHARACTERS, rng
        )

    @property
    def forward_tokens(self) -> int:
        """Compute spent so far on learning and operating, in tokens of one forward.

        Evaluations for the reader (progress, final figures, samples) are not counted.
        """
        return self._learner.forward_tokens + self._env.patient.forward_tokens

    @property
    def seconds(self) -> float:
        """Time since the logger was opened."""
        return time.perf_counter() - self._start

    def get_state(self) -> dict[str, Any]:
        """Return what later rows depend on."""
        return {
            "seconds": self.seconds,
            "phase_seconds": time.perf_counter() - self._phase_start,
            "first": self._first,
            "last": self._last,
            "evaluated": self._evaluated,
            "n_operations": self.n_operations,
            "commits": self.commits,
            "last_coefficients": self._last_coefficients,
            "best": None if self._best is None else self._best.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there; `resume` opens the phase again."""
        self._start = time.perf_counter() - state["seconds"]
        self._phase_start = time.perf_counter() - state["phase_seconds"]
        self._first, self._last = dict(state["first"]), dict(state["last"])
        self._evaluated, self.n_operations = state["evaluated"], state["n_operations"]
        self.commits = [dict(commit) for commit in state["commits"]]
        last = state["last_coefficients"]
        self._last_coefficients = None if last is None else np.asarray(last)
        if self._best is not None:
            self._best.set_state(state["best"])

    def resume(self, phase: Phase, done: int) -> None:
        """Open a phase of which so many steps were done before."""
        self._phase = phase
        self._show(phase, done)
        self._last_update = time.perf_counter()

    def begin(self, phase: Phase) -> None:
        """Open a phase."""
        self._phase = phase
        self._first, self._last = {}, {}
        self._show(phase, 0)
        if phase.updates and self._learner.n_done == 0:  # where it all begins
            self._evaluate()
            self._write_samples()
        self._phase_start = self._last_update = time.perf_counter()

    def _show(self, phase: Phase, done: int) -> None:
        """Show a progress bar of which so many steps are done."""
        per_step = phase.updates + phase.operations * self._env.num_envs
        self._bar = tqdm(
            total=phase.steps * per_step,
            initial=done * per_step,
            desc=f"{phase.name:>9}",
            disable=self._quiet,
            unit="it",
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # seconds; a log needs few lines
        )

    def end(self) -> dict[str, Any]:
        """Close the phase; return its name, steps, seconds, and first and last metrics."""
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
        """Close the progress bar, wherever it stands; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Tell the reader something, without breaking a progress bar."""
        if self._quiet:
            return
        try:
            tqdm.write(printable(text, sys.stdout))
        except OSError as error:
            if error.errno != errno.EIO:  # that of a terminal that has been closed
                raise

    def updated(self, stats: GRPOStats) -> None:
        """Take note of a GRPO update."""
        now = time.perf_counter()
        self._rates.append(self._learner.tokens_per_update / (now - self._last_update))
        self._advance(1, loss=f"{stats.loss:.4f}", reward=f"{stats.reward:.3f}")
        n_done = self._learner.n_done
        if n_done % WRITE_EVERY == 0 or n_done == 1:
            named = OF_TEXTS if self._learner.config.horizon > 1 else {}
            row = {f"grpo/{named.get(x, x)}": value for x, value in stats._asdict().items()}
            row["grpo/skipped"] = float(self._learner.n_skipped)
            row["time/tokens_per_second"] = float(np.median(self._rates))
            self._rates.clear()
            self._write("grpo", row)
        if n_done % self._evaluate_every == 0:
            self._evaluate()
        if n_done % (SAMPLE_EVERY * self._evaluate_every) == 0:
            self._write_samples()
        self._last_update = time.perf_counter()

    def operated(self, records: list[EpisodeRecord], surgeon: Surgeon) -> None:
        """Take note of a round of operations."""
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
        stats = surgeon.stats()
        if stats:
            self._write("surgeon", dict(stats))
        mean = float(np.mean([record.total for record in records]))
        # Not how many ended: where a patient died, the next operation began before its turn.
        n_planned = self._phase.operations * self._env.num_envs
        self._advance(n_planned, operation=f"{mean:+.4f}")
        self._last_update = time.perf_counter()

    def judged(self, commit: Commit) -> None:
        """Take note of an attempt to commit."""
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

    def behaved(self, operation: EpisodeRecord | None) -> None:
        """Take note of who samples from now on: the model under an operation, or as it stands."""
        row: dict[str, Any] = {"behavior/operated": operation is not None}
        row["behavior/gain"] = None if operation is None else operation.total
        row["behavior/coefficients"] = None if operation is None else operation.coefficients
        self._write("behavior", row)
        self._last_update = time.perf_counter()

    def commit_summary(self, policy: str) -> dict[str, Any]:
        """Return tries, keeps and the number of false ones to be expected at most."""
        tried = len(self.commits)
        return {
            "policy": policy,
            "tried": tried,
            "kept": sum(commit["kept"] for commit in self.commits),
            "expected_false_at_most": tried * FALSE_COMMIT_RATE,
            "operations": self.commits,
        }

    def _evaluate(self) -> None:
        self._evaluated = self._learner.n_done
        validation = self._env.patient.splits["validation"][: PROGRESS_CHARACTERS + 1]
        metrics = evaluate_text(self._env.patient.model, validation)
        row = {f"validation/{name}": value for name, value in metrics._asdict().items()}
        self._write("evaluation", row)
        if self._best is not None:
            self._best.consider(metrics.loss, self._evaluated)
        self._advance(0, accuracy=f"{metrics.accuracy:.3f}")

    def _write_samples(self) -> None:
        """Write what the model writes now and, in phases that operate, under the last operation."""
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
        self._writer.write(kind, clock, row)
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        self._first = numbers | self._first
        self._last |= numbers

    def _advance(self, n: int, **shown: str) -> None:
        self._shown |= shown
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(n)
