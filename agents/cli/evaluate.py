"""`avatarl evaluate`: a stored model, and a saved surgeon, on validation text."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from agents.cli.parsing import Refusal, read_json, read_words, refusing, run_settings

if TYPE_CHECKING:
    from agents.surgeons.registry import Surgeon
    from avatarl_env.patient import Patient
    from avatarl_env.vector_env import AttentionSurgeryVectorEnv


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a stored model, and a saved surgeon, on the whole validation text."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Run folder, model folder, or: bundled."""
    corpus: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Corpus name or a file; default the text that the model learned."""
    surgeon: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Run whose surgeon operates, by its rules."""
    seed: int = 0
    """Of the prompts and random operations that the surgeon is measured with."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object, on one line."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def main(words: Sequence[str], prog: str) -> str:
    """Measure; return the figures, to be read by people or as JSON.

    Raises:
        Refusal: if there is no such model, text or surgeon, or they do not fit together.
    """
    request = read_words(Evaluate, words, prog)
    if request is None:
        return ""
    # Whatever libraries have to say, stdout is for the figures alone.
    with contextlib.redirect_stdout(sys.stderr):
        record = evaluate(request)
    return json.dumps(record, allow_nan=False) if request.json else _in_words(record)


def evaluate(request: Evaluate) -> dict[str, Any]:
    """Return the figures, JSON-able; a number that is not finite is None.

    Raises:
        Refusal: if there is no such model, text or surgeon, or they do not fit together.
    """
    from agents.evaluation.language_model import evaluate_text
    from agents.tracking.writer import to_json
    from avatarl_env.lm.storage import ABOUT, model_folder
    from avatarl_env.patient import Patient

    with refusing(ValueError, lm="run"):
        if not (model_folder(request.run) / ABOUT).is_file():
            raise Refusal(
                "run must be a model of this package, whose tokens are characters, "
                f"got one of transformers in {request.run!r}"
            )
        patient = Patient.load(request.run, request.corpus, request.device)
    # Before anything is measured: what does not fit is refused at once.
    operation = None if request.surgeon is None else _prepare(request, patient)
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
    if operation is not None:
        record["surgeon_effect"] = _effect(request, operation)
    return to_json(record, "record")  # type: ignore[no-any-return]


class _Operation(NamedTuple):
    """A saved surgeon, and where it is to be measured."""

    name: str
    surgeon: Surgeon
    eval_env: AttentionSurgeryVectorEnv


def _prepare(request: Evaluate, patient: Patient) -> _Operation:
    """Load a saved surgeon, to operate on a patient by the rules of its run.

    Raises:
        Refusal: if there is none, or it does not fit the patient.
    """
    from gymnasium.vector import AutoresetMode

    from agents.evaluation.surgeon_effect import N_OPERATIONS
    from agents.surgeons.registry import ABOUT, find_surgeon, load_surgeon
    from agents.training.config import rules_of
    from avatarl_env.vector_env import AttentionSurgeryVectorEnv

    folder = Path(str(request.surgeon))
    home = find_surgeon(folder)
    if home is None:
        raise Refusal(
            f"surgeon must be a folder with a saved surgeon's {ABOUT}, got {str(folder)!r}"
        )
    settings = run_settings(home) or run_settings(Path(request.run))
    if settings is None:
        raise Refusal(
            "surgeon must be in the folder of its run, whose config.json says how it operates, "
            f"got {str(folder)!r}"
        )
    try:
        rules = rules_of(settings)
        n_rows = settings["curriculum"]["n_rows"]
        with refusing(ValueError, ImportError):
            patient.corpus.require(patient.model.context, "context")
            # As in training: it was made for so many rows.
            env = AttentionSurgeryVectorEnv(n_rows, patient, **rules)
            eval_env = AttentionSurgeryVectorEnv(
                N_OPERATIONS, patient, autoreset_mode=AutoresetMode.NEXT_STEP, **rules
            )
            surgeon = load_surgeon(home, env)
    except (KeyError, TypeError, MemoryError) as error:
        raise Refusal(
            "surgeon must be of a run whose config.json says how it operates, "
            f"got {str(folder)!r}: {error}"
        ) from error
    return _Operation(str(read_json(home / ABOUT)["surgeon"]), surgeon, eval_env)


def _effect(request: Evaluate, operation: _Operation) -> dict[str, Any]:
    """Return what a saved surgeon is worth on a patient, as a run measures it."""
    import numpy as np

    from agents.evaluation.surgeon_effect import measure_effect, verdict

    rng = np.random.default_rng(request.seed)
    with refusing(ValueError):  # actions that are no numbers
        effect = measure_effect(operation.surgeon, operation.eval_env, "training", rng)
    return {
        "surgeon": operation.name,
        "folder": request.surgeon,
        "verdict": verdict([effect], operation.name),
        "measurement": effect.as_summary(),
    }


def _in_words(record: dict[str, Any]) -> str:
    metrics = record["validation"]
    lines = [
        f"{record['model']} on {record['characters']:,} characters of {record['corpus']} "
        "(validation)",
        f"loss           {_number(metrics['loss'])} nats/char",
        f"bits per char  {_number(metrics['bits_per_char'])}",
        f"accuracy       {_number(metrics['accuracy'])}",
        f"entropy        {_number(metrics['entropy'])} nats/char",
        f"calibration    {_number(metrics['calibration_error'])} (expected error of confidence)",
    ]
    if record["unknown_characters"]:
        lines.append(f"{record['unknown_characters']:,} characters are unknown to the model")
    effect = record.get("surgeon_effect")
    if effect is not None:
        lines += ["", effect["verdict"]]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
