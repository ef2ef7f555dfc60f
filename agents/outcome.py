"""What a run came to: the figures of ``summary.json``."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from agents.config import TrainConfig
from agents.effect import verdict
from agents.evaluation import evaluate_text
from agents.journal import Journal
from agents.resuming import Progress, versions
from agents.setup import Setup
from avatarl_env.patient import Patient
from avatarl_env.text.ngram import NGramReference

REFERENCE_NAMES = ("bigram", "trigram", "4-gram", "5-gram")


def summarise(
    config: TrainConfig,
    setup: Setup,
    journal: Journal,
    progress: Progress,
) -> dict[str, Any]:
    """Return what ``summary.json`` says, but for time and command."""
    model, validation = setup.patient.model, setup.patient.splits["validation"]
    return {
        "preset": config.preset,
        "seed": config.seed,
        "surgeon": config.surgeon,
        "surgeon_options": config.surgeon_options,
        "operator": config.operator,
        "corpus": setup.corpus.name,
        "corpus_sha256": setup.corpus.sha256,
        "corpus_nats_per_char": setup.corpus.nats_per_char,
        "phases": progress.phases,
        "validation": evaluate_text(model, validation)._asdict(),
        "validation_unknown_characters": setup.tokenizer.n_unknown(
            setup.corpus.split("validation")
        ),
        "references": _references(setup.patient),
        "commits": journal.commit_summary(config.curriculum.commit),
        "surgeon_effect": {
            "verdict": verdict(progress.effects, config.surgeon),
            "measurements": [effect.as_summary() for effect in progress.effects],
        },
        "skipped_updates": setup.learner.n_skipped,
        "forward_tokens": journal.forward_tokens,
        "n_parameters": model.n_parameters,
        "environment": _environment(setup),
    }


def _references(patient: Patient) -> list[dict[str, Any]]:
    """Score n-gram models, counted on the same training text, on the same validation text."""
    rows = []
    for order, name in enumerate(REFERENCE_NAMES, start=2):
        ngram = NGramReference.fit(patient.splits["train"], patient.tokenizer.vocab_size, order)
        metrics = ngram.evaluate(patient.splits["validation"])
        rows.append(
            {
                "name": name,
                "loss": metrics.loss,
                "bits_per_char": metrics.bits_per_token,
                "accuracy": metrics.accuracy,
                "entropy": metrics.entropy,
            }
        )
    return rows


def _environment(setup: Setup) -> dict[str, Any]:
    """Return versions and machine, as far as results depend on them."""
    device = setup.device
    return {
        **versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": setup.learner.ranks.count,
        "cpu_count": os.cpu_count(),
    }
