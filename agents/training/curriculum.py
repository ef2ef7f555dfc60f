"""The curriculum: phases as data, and what a step of one is made of.

A phase says which learners are on and for how many steps. A step is some GRPO updates, then some
operations, then, where the phase allows it, an attempt to commit one.
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
from agents.surgeons.registry import NONE, EpisodeRecord, Surgeon, check_records
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
    """How long the phases are, and when an operation is committed.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    bootstrap_updates: int = 1200
    """GRPO updates of the first phase, without a surgeon."""
    surgery_rounds: int = 6
    """Rounds of operations of the second phase, without GRPO."""
    joint_rounds: int = 4
    """Rounds of the third phase, each GRPO updates, then operations, then a commit's test."""
    updates_per_round: int = 25
    """GRPO updates of a joint round."""
    n_rows: int = 64
    """Operations side by side, in one forward of the language model."""
    operations_per_round: int = 1
    """Operations of a round, on every row."""
    commit: str = IF_BETTER
    """probe (operations are always undone), if_better (committed in joint if the test finds them
    better) or rollout (never committed: in joint the operated model samples what the unoperated
    model learns from)."""
    paired_prompts: int = 256
    """Fresh prompts, and as many windows, of a commit's paired test."""
    evaluate_every: int = 100
    """GRPO updates between evaluations on a fixed slice of the validation text."""
    effect_operations: int = 8
    """Operations by which the surgeon's effect is measured after a phase, at least 2."""
    effect_prompts: int = 256
    """Fresh validation prompts of that measurement, over all its operations."""
    sample_length: int = 240
    """Characters of a sample."""

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
        """GRPO updates of all phases."""
        return sum(phase.steps * phase.updates for phase in make_phases(self, NONE))


class Phase(NamedTuple):
    """Which learners are on, and for how long."""

    name: str
    steps: int
    updates: int = 0
    """GRPO updates per step."""
    operations: int = 0
    """Operations per step, on every row."""
    commits: bool = False
    """Whether each step ends with an attempt to commit."""
    rollouts: bool = False
    """Whether each step ends with the choice of an operation under which the next one samples."""


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
    """Return the phases that have something to do.

    Without a surgeon the language model gets the same updates, and nothing operates.
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
    """What the learner and the surgeon do in a step; every rank makes the same calls."""

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
            eval_env: where operations are tried before they are committed, in mode NEXT_STEP; an
                environment of its own on the patient that the surgeon operates on.
            surgeon: None for no surgery, and on every rank but the first.
            config: commit policy.
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
        """Do one GRPO update, with samples of the model under the chosen operation.

        Raises:
            DivergedError: after `MOST_BAD_UPDATES` consecutive updates that were not finite.
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
        """Let the surgeon operate and learn; return the records, none on other ranks.

        Raises:
            DivergedError: if the surgeon's networks are not finite.
        """
        records: list[EpisodeRecord] = []
        with self._ranks.agreeing(DivergedError):
            if self.surgeon is not None:
                records = self.surgeon.operate(n_operations)
                check_records(records)
        return records

    def try_commit(self) -> Commit | None:
        """Test the surgeon's best deterministic operation; commit it if it is better.

        Best by the prompts it was made on; the test draws fresh ones. None on other ranks.
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
        """Choose the operation under which the model samples next: the best, if it helps at all."""
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
        """Try a deterministic operation on every row; return the best by its own prompts."""
        endings = final_operations(surgeon, self.eval_env, int(self._rng.integers(2**31)))
        return max(endings, key=lambda ending: ending.total)
