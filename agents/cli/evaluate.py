"""`avatarl evaluate`: a stored model, and a saved surgeon, on validation text."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from gymnasium.vector import AutoresetMode

from agents.cli import Refusal
from agents.cli.parsing import Run, read_json, read_words, refusing, run_settings
from agents.evaluation.language_model import evaluate_text
from agents.evaluation.surgeon_effect import N_OPERATIONS, measure_effect, verdict
from agents.surgeons.registry import ABOUT as SURGEON
from agents.surgeons.registry import Surgeon, find_surgeon, load_surgeon
from agents.tracking.writer import to_json
from agents.training.config import rules_of
from avatarl_env.lm.storage import ABOUT, model_folder
from avatarl_env.patient import Patient
from avatarl_env.vector_env import AttentionSurgeryVectorEnv


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a stored model, and a saved surgeon, on the whole validation text."""

    run: Run
    """Run folder, model folder, or: bundled."""
    corpus: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Corpus name or a file; default the text that the model was trained on."""
    surgeon: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Run whose surgeon is measured, by the rules of that run."""
    seed: int = 0
    """Seed of the prompts and the random operations in this measurement."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object on one line."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def main(words: Sequence[str], prog: str) -> str:
    """Return the figures, in words or as JSON (null for a non-finite number).

    Raises:
        Refusal: if there is no such model, text or surgeon, or they do not fit together.
        SystemExit: after `--help`.
    """
    request = read_words(Evaluate, words, prog)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures alone
        record = to_json(_evaluate(request), "record")
    return json.dumps(record, allow_nan=False) if request.json else _in_words(record)


def _evaluate(request: Evaluate) -> dict[str, Any]:
    with refusing(ValueError, lm="run"):
        if not (model_folder(request.run) / ABOUT).is_file():
            raise Refusal(
                f"run must be a model of this package, {request.run!r} is one of transformers"
            )
        patient = Patient.load(request.run, request.corpus, request.device)
    # Loaded first, so that a surgeon that does not fit is refused before any measurement.
    saved = None if request.surgeon is None else _load_surgeon(request, patient)
    text = patient.corpus.split("validation")
    metrics = evaluate_text(patient.model, patient.splits["validation"])
    record: dict[str, Any] = {
        "model": request.run,
        "corpus": patient.corpus.name,
        "corpus_sha256": patient.corpus.sha256,
        "characters": len(text) - 1,  # the first is not predicted
        "unknown_characters": patient.tokenizer.n_unknown(text),  # type: ignore[attr-defined]
        "validation": metrics._asdict(),
    }
    if saved is not None:
        name, surgeon, eval_env = saved
        rng = np.random.default_rng(request.seed)
        with refusing(ValueError):  # its actions are not finite
            effect = measure_effect(surgeon, eval_env, "training", rng)
        record["surgeon_effect"] = {
            "surgeon": name,
            "folder": request.surgeon,
            "verdict": verdict([effect], name),
            "measurement": effect.as_summary(),
        }
    return record


def _load_surgeon(
    request: Evaluate, patient: Patient
) -> tuple[str, Surgeon, AttentionSurgeryVectorEnv]:
    """Return a saved surgeon's name, the surgeon, and an environment with its run's rules."""
    given = repr(request.surgeon)
    home = find_surgeon(Path(str(request.surgeon)))
    if home is None:
        raise Refusal(f"surgeon must be a folder with a saved surgeon's {SURGEON}, got {given}")
    settings = run_settings(home) or run_settings(Path(request.run))
    if settings is None:
        raise Refusal(f"surgeon must be in the folder of its run, with config.json, got {given}")
    try:
        rules, n_rows = rules_of(settings), settings["curriculum"]["n_rows"]
        with refusing(ValueError, ImportError):
            patient.corpus.require(patient.model.context, "context")
            # With as many rows as in training: a surgeon is built for a number of rows.
            env = AttentionSurgeryVectorEnv(n_rows, patient, **rules)
            eval_env = AttentionSurgeryVectorEnv(
                N_OPERATIONS, patient, autoreset_mode=AutoresetMode.NEXT_STEP, **rules
            )
            surgeon = load_surgeon(home, env)
    except (KeyError, TypeError, MemoryError) as error:
        raise Refusal(
            f"surgeon must be of a run whose config.json has its rules, got {given}: {error}"
        ) from error
    return str(read_json(home / SURGEON)["surgeon"]), surgeon, eval_env


def _in_words(record: dict[str, Any]) -> str:
    metrics = {
        name: "not finite" if value is None else f"{value:.4f}"
        for name, value in record["validation"].items()
    }
    lines = [
        f"{record['model']} on {record['characters']:,} characters of {record['corpus']} "
        "(validation)",
        f"loss           {metrics['loss']} nats/char",
        f"bits per char  {metrics['bits_per_char']}",
        f"accuracy       {metrics['accuracy']}",
        f"entropy        {metrics['entropy']} nats/char",
        f"calibration    {metrics['calibration_error']} (expected calibration error)",
    ]
    if record["unknown_characters"]:
        lines.append(f"{record['unknown_characters']:,} characters are unknown to the model")
    effect = record.get("surgeon_effect")
    if effect is not None:
        lines += ["", effect["verdict"]]
    return "\n".join(lines)
