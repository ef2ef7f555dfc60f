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


def summarise(
    config: TrainConfig,
    setup: Setup,
    journal: Journal,
    progress: Progress,
) -> dict[str, Any]:
    """Return what ``summary.json`` says, but for references, time and command."""
    model, validation = setup.patient.model, setup.patient.splits["validation"]
    return {
        "preset": config.preset,
        "seed": config.seed,
        "surgeon": config.surgeon,
        "surgeon_options": config.surgeon_options,
        "operator": config.operator,
        "layers": config.layers,
        "score": config.score,
        "corpus": setup.corpus.name,
        "corpus_sha256": setup.corpus.sha256,
        "phases": progress.phases,
        "validation": evaluate_text(model, validation)._asdict(),
        "validation_unknown_characters": setup.tokenizer.n_unknown(
            setup.corpus.split("validation")
        ),
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
