"""A run's first line, the contents of its `summary.json`, and the origin of its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agents.evaluation.language_model import evaluate_text
from agents.evaluation.surgeon_effect import verdict
from agents.grpo.config import PRECISIONS
from agents.grpo.estimators import ESTIMATORS, SAMPLED
from agents.tracking.environment import environment
from agents.training.build import Parts
from agents.training.logger import RunLogger
from agents.training.resume import Progress
from avatarl_env.lm.attention import attention_backend


@dataclass(frozen=True)
class RunSummary:
    """A run's folder, and its `summary.json`."""

    folder: Path
    summary: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The surgeon's effect in words."""
        return str(self.summary["surgeon_effect"]["verdict"])


def summarise(parts: Parts, log: RunLogger, progress: Progress) -> dict[str, Any]:
    """Evaluate the final model; return the contents of `summary.json` but for the run's cost."""
    config, corpus = parts.config, parts.corpus
    model = parts.patient.model
    validation = evaluate_text(model, parts.patient.splits["validation"])
    return {
        "preset": config.preset,
        "seed": config.seed,
        "surgeon": config.surgeon,
        "surgeon_options": config.surgeon_options,
        "operator": config.operator,
        "layers": config.layers,
        "score": config.score,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "phases": progress.phases,
        "validation": validation._asdict(),
        "validation_unknown_characters": parts.tokenizer.n_unknown(corpus.split("validation")),
        "commits": log.commit_summary(config.curriculum.commit),
        "surgeon_effect": {
            "verdict": verdict(progress.effects, config.surgeon),
            "measurements": [effect.as_summary() for effect in progress.effects],
        },
        "skipped_updates": parts.learner.n_skipped,
        "forward_tokens": log.forward_tokens,
        "n_parameters": model.n_parameters,
        "environment": environment(parts.device, parts.learner.ranks.count),
        "best": log.best.found,
        # The last reference is the n-gram that `kl_ref` compares texts with.
        "model_beats_reference": validation.loss < log.references["references"][-1]["loss"],
        **log.references,
    }


def introduction(parts: Parts, folder: Path) -> str:
    """Return the line that a run prints first."""
    config, corpus = parts.config, parts.corpus
    estimator, exploration = config.grpo.estimator, config.grpo.exploration
    kind = ", the exact expectation, an upper bound for RL" if exploration != SAMPLED else ""
    if ESTIMATORS[estimator].is_control:
        kind = ", a supervised control, not RL"
    n = parts.learner.ranks.count
    ranks = f"{n} processes, each " if n > 1 else ""
    backend = attention_backend(parts.device, PRECISIONS[config.grpo.precision])
    return (
        f"{corpus.name}, {len(corpus.text):,} characters; a GPT of "
        f"{parts.patient.model.n_parameters:,} parameters on {parts.device} "
        f"({ranks}{torch.get_num_threads()} threads, attention by {backend}); "
        f"{estimator}, {exploration}{kind}; surgeon {config.surgeon}; into {folder}"
    )


def about_model(parts: Parts, command: str | None) -> dict[str, Any]:
    """Return the origin that is stored with a run's models."""
    corpus = parts.corpus
    made_by = command or "agents.train"
    return {"corpus": corpus.name, "corpus_sha256": corpus.sha256, "made_by": made_by}
