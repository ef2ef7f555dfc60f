"""The jobs that tests/agents/test_distributed.py lets torchrun start in several processes."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.cli import main as cli
from agents.distributed import Ranks, joined, share_edits
from agents.errors import DivergedError
from agents.evaluation.paired import PairedResult
from agents.grpo import learner as learner_module
from agents.grpo.learner import GRPOLearner, GRPOStats, RegularizerConfig
from agents.training import curriculum
from avatarl_env.surgery import HeadGain, SurgicalTheater, find_targets
from tests.patients import tiny_patient
from tests.training_runs import CE, everything, make_learner

OLD = {"sync_every": 5, "clip": 0.5, "clip_high": 0.5, "temperature": 1.2}
KL = RegularizerConfig(kl_coefficient=0.1, kl_target=0.5, partial_credit=0.1, entropy_bonus=0.01)
RECIPES: dict[str, dict[str, Any]] = {
    "proper_maxrl": {"estimator": "proper_maxrl", "optimizer": "adamw"},
    "seed_sampled": {"estimator": "seed_sampled", "optimizer": "adamw", **OLD, "regularizer": KL},
    "rollouts": {"estimator": "grpo", "horizon": 8, "group_size": 4, "optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "ce": {"optimizer": "adamw", **CE},
}
N_UPDATES = 8


def learn(recipe: str, ranks: Ranks) -> tuple[GRPOLearner, list[GRPOStats]]:
    """Learn for a while; alone this is what several processes are held against."""
    patient = tiny_patient()
    learner = make_learner(
        patient.model, patient.splits["train"], ranks=ranks, learning_rate=5e-3, **RECIPES[recipe]
    )
    return learner, [learner.update() for _ in range(N_UPDATES)]


def curves(out: Path) -> None:
    """Learn together, one loss no number; then let the first process operate, and tell."""
    with joined() as ranks:
        found: dict[str, Any] = {}
        for recipe in RECIPES:
            learner, stats = learn(recipe, ranks)
            counts = learner.forward_tokens, learner.kl_coefficient
            found[recipe] = {"stats": stats, "after": everything(learner), "counts": counts}
        found["skipped"] = skip(learner, ranks)
        found["after the skip"] = everything(learner)
        found["operated"] = operate(learner, ranks)
        found["after the operation"] = everything(learner)
        found["refusals"] = [refusal(ranks, refusing) for refusing in ((), (0,), (1,), (0, 1))]
        with joined() as again:
            assert again == ranks
    with joined() as ranks:  # a second group, once the first is gone
        found["sum"] = sum(ranks.gather(ranks.rank + 1))
    torch.save(found, out / f"{ranks.rank}.pt")


def skip(learner: GRPOLearner, ranks: Ranks) -> tuple[GRPOStats, int]:
    """Do an update whose loss is no number, in the last process."""
    factor = float("nan") if ranks.rank == ranks.count - 1 else 1.0
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, lambda _: factor)
        stats = learner.update()
    return stats, learner.n_bad_in_a_row


def spoil(patch: pytest.MonkeyPatch, factor: Callable[[GRPOLearner], float]) -> None:
    """Multiply what a learner learns from, and what it reads, on this rank."""
    update, average = GRPOLearner.update, learner_module.average_gradients
    factors: list[float] = []

    def noted(self: GRPOLearner, *arguments: Any) -> GRPOStats:
        factors.append(factor(self))
        return update(self, *arguments)

    def spoilt(ranks: Ranks, model: torch.nn.Module, readings: torch.Tensor) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(factors[-1])
        average(ranks, model, readings.mul_(factors[-1]))

    patch.setattr(GRPOLearner, "update", noted)
    patch.setattr(learner_module, "average_gradients", spoilt)


def operate(learner: GRPOLearner, ranks: Ranks) -> list[bool]:
    """Share nothing, then an operation; return which changed the weights here."""
    changed = []
    for kept in (False, True):
        before = [p.detach().clone() for p in learner.model.parameters()]
        operator = HeadGain(find_targets(learner.model))
        if ranks.is_first:
            with SurgicalTheater(learner.model, [operator]) as theater:
                operator.apply(theater, [0.5, -0.5, 0.25, 1.0])
                if kept:
                    theater.commit()
        edited = operator.parameters() if kept else ()
        assert share_edits(ranks, learner.model, edited if ranks.is_first else ()) == kept
        after = learner.model.parameters()
        changed.append(any(not torch.equal(p, q) for p, q in zip(after, before, strict=True)))
    return changed


def refusal(ranks: Ranks, refusing: tuple[int, ...]) -> str:
    """Agree, some processes refusing; return why in the end."""
    try:
        with ranks.agreeing(ValueError, ImportError):
            if ranks.rank in refusing:
                refuse(ranks.rank)
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refuse(rank: int) -> None:
    raise ImportError(f"{rank} refuses")


def command_line(out: Path, plan: str, words: list[str]) -> int:
    """Do what `train.py` does, with what a plan says happening on the way; note how it ended.

    A plan is words like `term@3`: at update 3, SIGTERM for whoever started the processes;
    `die`: the second ends; `once`: from then on the second's loss is NaN, ten times.
    `keep@1` commits every operation, `helps@1` lets every operation be one to sample under,
    `surgeon@1` lets the surgeon diverge.
    """
    learners: list[GRPOLearner] = []
    events = dict(word.split("@") for word in plan.split(",") if word)
    n_operated: list[int] = []
    patch_learner(learners, events, n_operated)
    patch_run(events)
    code = cli.main(words)
    end = everything(learners[-1]) if learners else []
    rank = os.environ["RANK"]
    found = {"code": code, "end": end, "n": len(learners), "operated": len(n_operated)}
    torch.save(found, out / f"{rank}.pt")
    return code


def patch_learner(learners: list[GRPOLearner], plan: dict[str, str], n_operated: list[int]) -> None:
    """Note all learners, and let happen what is planned."""
    build, update = GRPOLearner.__init__, GRPOLearner.update
    rank, poisoned = int(os.environ["RANK"]), itertools.count()

    def noted(self: GRPOLearner, *arguments: Any, **keywords: Any) -> None:
        build(self, *arguments, **keywords)
        learners.append(self)

    def planned(self: GRPOLearner, operated: Any = None) -> GRPOStats:
        if self.n_done == int(plan.get("term", -1)) and rank == 0:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1)  # until it has sent it on
        if self.n_done == int(plan.get("die", -1)) and rank == 1:
            os._exit(9)
        n_operated.extend([1] if operated is not None else [])
        return update(self, operated)

    def factor(learner: GRPOLearner) -> float:
        bad = learner.n_done >= int(plan.get("once", 10**6)) and rank == 1
        return float("nan") if bad and next(poisoned) < 10 else 1.0

    GRPOLearner.__init__ = noted  # type: ignore[method-assign]
    GRPOLearner.update = planned  # type: ignore[method-assign]
    spoil(pytest.MonkeyPatch(), factor)


def patch_run(plan: dict[str, str]) -> None:
    """Let the operations and the surgeon do what is planned."""
    PairedResult.is_improvement = property(lambda _: "keep" in plan)  # type: ignore[assignment, method-assign]
    patch = pytest.MonkeyPatch()
    final = curriculum.final_operations

    def diverges(*_: object) -> None:
        raise DivergedError("the surgeon has diverged")

    def helping(*arguments: Any) -> Any:
        return [ending._replace(total=1.0, flatline=None) for ending in final(*arguments)]

    if "surgeon" in plan:
        patch.setattr("agents.surgeons.sb3.SB3Surgeon.operate", diverges)
    if "helps" in plan:
        patch.setattr(curriculum, "final_operations", helping)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, place, *rest = sys.argv[1:]
    sys.argv[0] = "train.py"  # whose command line this is
    if job == "curves":
        curves(Path(place))
    else:
        sys.exit(command_line(Path(place), rest[0], rest[1:]))
