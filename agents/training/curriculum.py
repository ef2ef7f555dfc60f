"""The curriculum: phases as data, and the parts of their steps.

A phase determines which learners are on and for how many steps. A step consists of GRPO updates,
then operations, then, if the phase has commits, an attempt to commit one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.distributed import share_edits
from agents.errors import DivergedError
from agents.evaluation.paired import PairedResult, compare_pairs
from agents.evaluation.surgeon_effect import final_operations
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.surgeons.base import Surgeon
from agents.surgeons.episodes import EpisodeRecord, check_records
from agents.surgeons.registry import NONE
from avatarl_env.errors import check_choice, check_integer
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

PROBE, IF_BETTER, ROLLOUT = "probe", "if_better", "rollout"
MOST_BAD_UPDATES = 10
"""Consecutive updates with a non-finite loss or gradient after which a run has diverged."""
FALSE_COMMIT_RATE = 0.05
"""Probability that a worthless operation passes one of a commit's two one-sided bounds."""
_LEAST = {
    "n_rows": 1,
    "operations_per_round": 1,
    "paired_prompts": 2,
    "evaluate_every": 1,
    "effect_operations": 2,
    "sample_length": 4,
}


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """The lengths of the phases, and the policy for commits.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    bootstrap_updates: int = 1200
    """GRPO updates in the first phase, without a surgeon."""
    surgery_rounds: int = 6
    """Rounds of operations in the second phase, without GRPO."""
    joint_rounds: int = 4
    """Rounds in the third phase: GRPO updates, then operations, then an attempt to commit one."""
    updates_per_round: int = 25
    """GRPO updates in a joint round."""
    n_rows: int = 64
    """Parallel operations, which share each forward pass of the language model."""
    operations_per_round: int = 1
    """Operations in a round, on every row."""
    commit: str = IF_BETTER
    """probe (always undone), if_better (in the joint phase, committed after a paired test) or
    rollout (never committed; in the joint phase the unoperated model learns from samples of the
    operated one)."""
    paired_prompts: int = 256
    """Fresh prompts, and as many windows, in the paired test before a commit."""
    evaluate_every: int = 100
    """GRPO updates between evaluations on a fixed slice of the validation text."""
    effect_operations: int = 8
    """Operations in the measurement of the surgeon's effect after a phase, at least 2."""
    effect_prompts: int = 256
    """Fresh validation prompts in that measurement, over all its operations."""
    sample_length: int = 240
    """Characters in a sample."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name != "commit":
                count = check_integer(name, getattr(self, name), _LEAST.get(name, 0))
                object.__setattr__(self, name, count)
        check_choice("commit", self.commit, (PROBE, IF_BETTER, ROLLOUT))
        if self.effect_prompts < self.effect_operations:
            raise ValueError(
                f"effect_prompts must be at least effect_operations, {self.effect_operations}, "
                f"got {self.effect_prompts}"
            )

    @property
    def n_updates(self) -> int:
        """GRPO updates in all phases."""
        return sum(phase.steps * phase.updates for phase in make_phases(self, NONE))


class Phase(NamedTuple):
    """The learners that are on, and the number of steps."""

    name: str
    steps: int
    updates: int = 0
    """GRPO updates per step."""
    operations: int = 0
    """Operations per step, on every row."""
    commits: bool = False
    """Whether each step ends with an attempt to commit."""
    rollouts: bool = False
    """Whether each step ends by choosing an operation under which the model samples next."""


def _bootstrap(config: CurriculumConfig) -> Phase:
    return Phase("bootstrap", config.bootstrap_updates, updates=1)


def _surgery(config: CurriculumConfig) -> Phase:
    return Phase("surgery", config.surgery_rounds, operations=config.operations_per_round)


def _joint(config: CurriculumConfig) -> Phase:
    return Phase(
        "joint",
        config.joint_rounds,
        updates=config.updates_per_round,
        operations=config.operations_per_round,
        commits=config.commit == IF_BETTER,
        rollouts=config.commit == ROLLOUT,
    )


PHASES: dict[str, Callable[[CurriculumConfig], Phase]] = {
    "bootstrap": _bootstrap,
    "surgery": _surgery,
    "joint": _joint,
}
"""The phases of a run, in order: `PHASES["cooldown"] = ...` adds one at the end."""


def make_phases(config: CurriculumConfig, surgeon: str) -> tuple[Phase, ...]:
    """Return the phases that are not empty.

    Without a surgeon, the language model gets the same updates and there are no operations.
    """
    phases = [make(config) for make in PHASES.values()]
    if surgeon == NONE:
        phases = [p._replace(operations=0, commits=False, rollouts=False) for p in phases]
    return tuple(p for p in phases if p.steps and (p.updates or p.operations))


class Commit(NamedTuple):
    """One attempt to commit an operation."""

    coefficients: NDArray[np.float64]
    """(A,)."""
    result: PairedResult
    kept: bool


class Curriculum:
    """The actions of learner and surgeon in a step; every rank makes the same calls."""

    def __init__(
        self,
        learner: GRPOLearner,
        eval_env: AttentionSurgeryVectorEnv,
        surgeon: Surgeon | None,
        config: CurriculumConfig,
        rng: np.random.Generator,
    ) -> None:
        """Connect the parts.

        Args:
            learner: trains the model that `eval_env` holds.
            eval_env: tries operations before a commit; has the patient of the surgeon's
                environment, and autoreset mode NEXT_STEP.
            surgeon: None for no surgery, and on every rank but the first.
            config: of the run.
            rng: draws the prompts of the paired tests.
        """
        self.learner = learner
        self.eval_env = eval_env
        self.surgeon = surgeon
        self.config = config
        self.operation: NDArray[np.float64] | None = None
        """(A,) coefficients under which the model samples; None: unoperated."""
        self._ranks = learner.ranks
        self._rng = rng

    def set_operation(self, coefficients: Tensor | None) -> None:
        """Restore the operation under which the model samples; None: unoperated."""
        self.operation = None if coefficients is None else coefficients.double().numpy()

    def update(self) -> GRPOStats:
        """Do one GRPO update on samples of the model under the chosen operation.

        Raises:
            DivergedError: after `MOST_BAD_UPDATES` consecutive non-finite updates.
        """
        stats = self.learner.update(self._behavior())
        self.eval_env.model_changed()
        if self.learner.n_bad_in_a_row >= MOST_BAD_UPDATES:
            raise DivergedError(
                f"{MOST_BAD_UPDATES} updates in a row had a loss or gradient that is not finite, "
                f"up to update {self.learner.n_done}"
            )
        return stats

    def operate(self, n_operations: int) -> list[EpisodeRecord]:
        """Let the surgeon operate and learn; return its records, an empty list on other ranks.

        Raises:
            DivergedError: if the surgeon's networks diverge.
        """
        records: list[EpisodeRecord] = []
        with self._ranks.agreeing(DivergedError):
            if self.surgeon is not None:
                records = self.surgeon.operate(n_operations)
                check_records(records)
        return records

    def try_commit(self) -> Commit | None:
        """Test the surgeon's best deterministic operation; commit it if it is an improvement.

        The best has the highest return on its own prompts; the test draws fresh ones.

        Returns:
            The attempt, or None on every rank but the first.
        """
        commit = None if self.surgeon is None else self._test(self.surgeon)
        env = self.eval_env
        if commit is not None and commit.kept:
            env.patient.commit(env.operator, commit.coefficients)
        edited = env.operator.parameters() if commit is not None and commit.kept else ()
        if share_edits(self._ranks, self.learner.model, edited):
            self.learner.model_changed()
        return commit

    def choose_behavior(self) -> EpisodeRecord | None:
        """Choose the operation under which the model samples: the best if its return is positive.

        Returns:
            Its record, or None if there is none, and on every rank but the first.
        """
        best = None if self.surgeon is None else self._best(self.surgeon)
        if best is not None and (best.total <= 0 or best.flatline is not None):
            best = None
        self.operation = self._ranks.broadcast(None if best is None else best.coefficients)
        return best

    def _behavior(self) -> AbstractContextManager[object] | None:
        if self.operation is None:
            return None
        return self.eval_env.patient.operated(self.eval_env.operator, self.operation)

    def _test(self, surgeon: Surgeon) -> Commit:
        env, best = self.eval_env, self._best(surgeon)
        result = compare_pairs(
            env.patient,
            env.operator,
            best.coefficients,
            env.config,
            n_prompts=self.config.paired_prompts,
            rng=self._rng,
        )
        kept = result.is_improvement and best.flatline is None
        return Commit(best.coefficients, result, kept)

    def _best(self, surgeon: Surgeon) -> EpisodeRecord:
        """Perform a deterministic operation on every row; return the one with the best return."""
        records = final_operations(surgeon, self.eval_env, int(self._rng.integers(2**31)))
        return max(records, key=lambda record: record.total)
