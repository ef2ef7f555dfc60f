"""The curriculum: phases as data, and the loop that runs them.

A phase says which learners are on and for how many steps; a step is some GRPO updates, then some
operations, then, where the phase allows it, an attempt to commit one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agents.distributed import share_edits
from agents.errors import DivergedError
from agents.evaluation.paired import PairedResult, compare_pairs
from agents.evaluation.surgeon_effect import final_operations
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.surgeons.registry import NONE, EpisodeRecord, Surgeon, check_records
from avatarl_env.errors import check_choice, check_integer
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

PROBE, IF_BETTER, ROLLOUT = "probe", "if_better", "rollout"
MOST_BAD_UPDATES = 10  # in a row, with nothing learned from any
FALSE_COMMIT_RATE = 0.05  # chance that a worthless operation passes one of a commit's two bounds


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """How long the phases are, and what becomes of good operations.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    bootstrap_updates: int = 1200
    """GRPO updates of the first phase, without a surgeon."""
    surgery_rounds: int = 6
    """Rounds of operations of the second phase, without GRPO."""
    joint_rounds: int = 4
    """Rounds of the third phase, each GRPO updates, then operations, then a commit's result."""
    updates_per_round: int = 25
    """GRPO updates of a joint round."""
    n_rows: int = 64
    """Operations side by side, in one forward of the language model."""
    operations_per_round: int = 1
    """Operations of a round, on every row."""
    commit: str = IF_BETTER
    """probe (operations are always undone), if_better (kept in joint, if judged to be better) or
    rollout (never kept: in joint the operated model samples what the model as it stands learns
    from)."""
    paired_prompts: int = 256
    """Fresh prompts, and as many windows, that an operation is judged on."""
    evaluate_every: int = 100
    """GRPO updates between measurements on a fixed slice of the validation text."""

    def __post_init__(self) -> None:
        least = {"n_rows": 1, "operations_per_round": 1, "paired_prompts": 2, "evaluate_every": 1}
        for name in self.__dataclass_fields__:
            if name != "commit":
                count = check_integer(name, getattr(self, name), least.get(name, 0))
                object.__setattr__(self, name, count)
        check_choice("commit", self.commit, (PROBE, IF_BETTER, ROLLOUT))

    @property
    def n_updates(self) -> int:
        """GRPO updates of all phases."""
        return self.bootstrap_updates + self.joint_rounds * self.updates_per_round


class Phase(NamedTuple):
    """Which learners are on, and for how long."""

    name: str
    steps: int
    updates: int
    """GRPO updates per step."""
    operations: int
    """Operations per step, on every row."""
    commits: bool
    """Whether each step ends with an attempt to commit."""
    rollouts: bool = False
    """Whether each step ends with the choice of an operation under which the next one samples."""


def make_phases(config: CurriculumConfig, surgeon: str) -> tuple[Phase, ...]:
    """Return the phases that have something to do.

    Without a surgeon the language model gets the same updates, and nothing operates.
    """
    operations = 0 if surgeon == NONE else config.operations_per_round
    commits = config.commit == IF_BETTER and operations > 0
    rollouts = config.commit == ROLLOUT and operations > 0
    phases = (
        Phase("bootstrap", config.bootstrap_updates, 1, 0, commits=False),
        Phase("surgery", config.surgery_rounds, 0, operations, commits=False),
        Phase(
            "joint", config.joint_rounds, config.updates_per_round, operations, commits, rollouts
        ),
    )
    return tuple(p for p in phases if p.steps and (p.updates or p.operations))


class Commit(NamedTuple):
    """One attempt to keep an operation."""

    coefficients: NDArray[np.float64]
    result: PairedResult
    kept: bool


class RunLogger(Protocol):
    """Who is told what happens."""

    def updated(self, stats: GRPOStats) -> None:
        """Take note of a GRPO update."""

    def operated(self, records: list[EpisodeRecord], surgeon: Surgeon) -> None:
        """Take note of a round of operations."""

    def judged(self, commit: Commit) -> None:
        """Take note of an attempt to commit."""

    def behaved(self, operation: EpisodeRecord | None) -> None:
        """Take note of the operation under which the model samples from now on, if any."""


def updates(
    learner: GRPOLearner,
    n_updates: int,
    operated: Callable[[], AbstractContextManager[object] | None] = lambda: None,
) -> Iterator[GRPOStats]:
    """Do so many GRPO updates; yield what each was like.

    Args:
        learner: does them.
        n_updates: how many.
        operated: makes the context in which the actions of an update are sampled, or None.

    Raises:
        DivergedError: if too many updates in a row had a loss or gradient that is not finite.
    """
    for _ in range(n_updates):
        yield learner.update(operated())
        if learner.n_bad_in_a_row >= MOST_BAD_UPDATES:
            raise DivergedError(
                f"{MOST_BAD_UPDATES} updates in a row had a loss or gradient that is not finite, "
                f"up to update {learner.n_done}"
            )


class Curriculum:
    """The loop: GRPO trains the model, the surgeon operates on it."""

    def __init__(
        self,
        learner: GRPOLearner,
        eval_env: AttentionSurgeryVectorEnv,
        surgeon: Surgeon | None,
        config: CurriculumConfig,
        rng: np.random.Generator,
    ) -> None:
        """Bring everybody together.

        Args:
            learner: trains the model that `eval_env` holds.
            eval_env: where operations are tried that are to be judged, in mode NEXT_STEP; on the
                patient that the surgeon operates on, in an environment of its own.
            surgeon: None for no surgery.
            config: commit policy.
            rng: draws the judgement's prompts.
        """
        self.learner = learner
        self.eval_env = eval_env
        self.surgeon = surgeon
        self.config = config
        self.operation: NDArray[np.float64] | None = None
        """Coefficients under which the model samples what it learns from; None: as it stands."""
        self._rng = rng

    def run(self, phase: Phase, logger: RunLogger) -> None:
        """Run one phase."""
        for _ in self.steps(phase, logger):
            pass

    def steps(self, phase: Phase, logger: RunLogger, start: int = 0) -> Iterator[int]:
        """Run one phase; yield after each step how many are done: there it can be left and resumed.

        Args:
            phase: what to do.
            logger: is told.
            start: steps that were done before.

        Raises:
            DivergedError: if too many updates in a row had a loss or gradient that is not finite,
                or the surgeon's networks are not.
        """
        for step in range(start, phase.steps):
            for stats in updates(self.learner, phase.updates, self._operated):
                logger.updated(stats)
                self.eval_env.model_changed()
            if phase.operations and self.surgeon is not None:
                with self.learner.ranks.telling(DivergedError):
                    records = self.surgeon.operate(phase.operations)
                    check_records(records)
                logger.operated(records, self.surgeon)
                if phase.commits:
                    logger.judged(self._consider(self.surgeon))
                if phase.rollouts:
                    logger.behaved(self._choose(self.surgeon))
            yield step + 1

    def _consider(self, surgeon: Surgeon) -> Commit:
        """Try a deterministic operation on every row, and judge the best; keep it if better.

        The best by its own prompts, which is no cheating: what it is judged on is fresh.
        """
        eval_env, best = self.eval_env, self._best(surgeon)
        result = compare_pairs(
            eval_env.patient,
            eval_env.operator,
            best.coefficients,
            eval_env.config,
            n_prompts=self.config.paired_prompts,
            rng=self._rng,
        )
        kept = result.is_improvement and best.flatline is None
        if kept:
            eval_env.patient.commit(eval_env.operator, best.coefficients)
            self.learner.model_changed()
        share_edits(self.learner.ranks, self.learner.model, eval_env.operator if kept else None)
        return Commit(best.coefficients, result, kept)

    def _choose(self, surgeon: Surgeon) -> EpisodeRecord | None:
        """Choose under which operation the model samples next: the best, if it helped at all."""
        best = self._best(surgeon)
        helps = best.total > 0 and best.flatline is None
        self.operation = best.coefficients if helps else None
        self.learner.ranks.broadcast(self.operation)
        return best if helps else None

    def _best(self, surgeon: Surgeon) -> EpisodeRecord:
        """Try a deterministic operation on every row; return the best, by its own prompts."""
        endings = final_operations(surgeon, self.eval_env, int(self._rng.integers(2**31)))
        return max(endings, key=lambda ending: ending.total)

    def _operated(self) -> AbstractContextManager[object] | None:
        if self.operation is None:
            return None
        return self.eval_env.patient.operated(self.eval_env.operator, self.operation)
