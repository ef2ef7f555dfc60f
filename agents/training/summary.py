"""What a run is and came to: its introduction, the figures of `summary.json`, its model."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from agents.evaluation.language_model import evaluate_text
from agents.evaluation.surgeon_effect import verdict
from agents.grpo.estimators import ESTIMATORS, SAMPLED
from agents.grpo.learner import PRECISIONS
from agents.surgeons.registry import save_surgeon
from agents.tracking.run_folder import RunFolder
from agents.training.build import Setup
from agents.training.config import TrainConfig
from agents.training.logger import RunLogger
from agents.training.resume import Progress, versions
from avatarl_env.lm.attention import attention_backend
from avatarl_env.lm.storage import save_model


def summarise(
    config: TrainConfig,
    setup: Setup,
    logger: RunLogger,
    progress: Progress,
) -> dict[str, Any]:
    """Return what `summary.json` says, but for references, time and command."""
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
        "commits": logger.commit_summary(config.curriculum.commit),
        "surgeon_effect": {
            "verdict": verdict(progress.effects, config.surgeon),
            "measurements": [effect.as_summary() for effect in progress.effects],
        },
        "skipped_updates": setup.learner.n_skipped,
        "forward_tokens": logger.forward_tokens,
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


def introduction(config: TrainConfig, setup: Setup, folder: RunFolder) -> str:
    """Return what a run says as it begins."""
    estimator = config.grpo.estimator
    kind = ", the exact expectation, a bound on RL" if config.grpo.exploration != SAMPLED else ""
    if ESTIMATORS[estimator].is_control:
        kind = ", a supervised control, not RL"
    n = setup.learner.ranks.count
    processes = f"{n} processes, each " if n > 1 else ""
    backend = attention_backend(setup.device, PRECISIONS[config.grpo.precision])
    return (
        f"{setup.corpus.name}, {len(setup.corpus.text):,} characters; a GPT of "
        f"{setup.patient.model.n_parameters:,} parameters on {setup.device} "
        f"({processes}{torch.get_num_threads()} threads, attention by {backend}); "
        f"{estimator}, {config.grpo.exploration}{kind}; surgeon {config.surgeon}; "
        f"into {folder.path}"
    )


def about_model(setup: Setup, command: str | None) -> dict[str, Any]:
    """Return what is stored beside a run's models."""
    corpus = setup.corpus
    made_by = command or "agents.train"
    return {"corpus": corpus.name, "corpus_sha256": corpus.sha256, "made_by": made_by}


def save_final(config: TrainConfig, setup: Setup, folder: Path, about: dict[str, Any]) -> None:
    """Write the model as it stands, and what the surgeon learned."""
    save_model(folder, setup.learner.model, setup.tokenizer, about)
    if setup.surgeon is not None:
        seed, options = setup.generators.surgeon_seed, config.surgeon_options
        save_surgeon(setup.surgeon, folder, config.surgeon, seed, options)
