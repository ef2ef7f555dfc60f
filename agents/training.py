"""One run from configuration to report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents.config import BadInput, TrainConfig
from agents.curriculum import Curriculum, make_phases
from agents.effect import N_OPERATIONS, Effect, measure_effect, verdict
from agents.evaluation import evaluate_text
from agents.grpo.learner import PRECISIONS, GRPOLearner
from agents.grpo.objectives import ESTIMATORS, SAMPLED
from agents.journal import Journal
from agents.report import write_report
from agents.surgeons import NONE, Surgeon, make_surgeon, save_surgeon
from agents.tracking import MetricWriter, RunFolder, refuse_used
from agents.wandb_sink import is_wanted
from avatarl_env.lm.attention import attention_backend
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.patient import Patient
from avatarl_env.text.corpus import load_corpus
from avatarl_env.text.ngram import NGramReference
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

REFERENCE_NAMES = ("bigram", "trigram", "4-gram", "5-gram")
PACKAGES = ("torch", "gymnasium", "stable-baselines3", "numpy", "avatarl-env")


@dataclass(frozen=True)
class RunSummary:
    """Where a run is, and its ``summary.json``."""

    folder: Path
    summary: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What the surgeon was worth, in words."""
        return str(self.summary["surgeon_effect"]["verdict"])


@dataclass(frozen=True)
class Generators:
    """One generator per consumer, all spawned from the run's seed."""

    init: torch.Generator
    grpo: np.random.Generator
    commit: np.random.Generator
    effect: np.random.Generator
    samples: np.random.Generator
    surgeon_seed: int

    @classmethod
    def spawn(cls, seed: int) -> Generators:
        """Spawn them; adding a consumer at the end changes none of the others."""
        init, grpo, commit, effect, samples, surgeon = np.random.SeedSequence(seed).spawn(6)
        return cls(
            torch.Generator().manual_seed(_seed(init)),
            np.random.default_rng(grpo),
            np.random.default_rng(commit),
            np.random.default_rng(effect),
            np.random.default_rng(samples),
            _seed(surgeon),
        )


class Setup:
    """Everything a run consists of, built and checked before anything is written."""

    def __init__(self, config: TrainConfig) -> None:
        """Build it.

        Raises:
            ValueError: if the configuration does not fit the corpus or the machine.
        """
        self.device = _device(config.device)
        is_wanted(config.track)  # refuses a WANDB_MODE that there is not
        self.corpus = load_corpus(config.corpus)
        self.corpus.require(config.lm.context, "context")  # windows are one longer than that
        self.generators = Generators.spawn(config.seed)
        # Characters that only held-out text has are unknown, as they would be to any user.
        self.tokenizer = CharTokenizer.from_text(self.corpus.split("train"))
        sizes = config.lm.with_vocabulary(self.tokenizer.vocab_size)
        model = GPT(sizes, self.generators.init).to(self.device)
        self.patient = Patient(model, self.tokenizer, self.corpus)
        rules = {"operator": config.operator, **asdict(config.operation)}
        self.env = AttentionSurgeryVectorEnv(config.curriculum.n_rows, self.patient, **rules)
        # Of its own, so that trying operations out disturbs none under way.
        self.exam = AttentionSurgeryVectorEnv(
            N_OPERATIONS, self.patient, autoreset_mode=AutoresetMode.NEXT_STEP, **rules
        )
        self.learner = GRPOLearner(
            model,
            self.patient.splits["train"],
            config.grpo,
            n_updates=config.curriculum.n_updates,
            rng=self.generators.grpo,
        )
        self.surgeon: Surgeon | None = None
        if config.surgeon != NONE:
            seed, options = self.generators.surgeon_seed, config.surgeon_options
            self.surgeon = make_surgeon(config.surgeon, self.env, seed, options)


def train(config: TrainConfig, *, quiet: bool = False, command: str | None = None) -> RunSummary:
    """Run the curriculum: build, train and operate, measure, write down.

    Args:
        config: what to do.
        quiet: show no progress.
        command: how the run was started, for the record.

    Returns:
        The run's folder and summary.

    Raises:
        BadInput: (a ValueError) if the configuration does not fit the corpus or the machine, or the
            run folder is not empty. Nothing has been trained or written then.
    """
    start = time.perf_counter()
    with _threads(config.threads):
        try:
            if config.out:
                refuse_used(config.out)
            setup = Setup(config)
            folder = RunFolder(config.out or _new_folder_name(config.preset))
        except (ImportError, ValueError) as error:  # a later one is no fault of the input, but ours
            raise BadInput(str(error)) from error
        settings = asdict(config) | {"corpus": setup.corpus.name, "out": str(folder.path)}
        settings["corpus_sha256"] = setup.corpus.sha256
        with (
            _report_at_the_end(folder.path),
            MetricWriter(folder, config=settings, track=config.track) as writer,
        ):
            journal = Journal(
                writer,
                setup.learner,
                setup.env,
                evaluate_every=config.curriculum.evaluate_every,
                rng=setup.generators.samples,
                quiet=quiet,
            )
            journal.say(_introduction(config, setup, folder))
            with closing(journal):  # a run that breaks off leaves no half a bar on the line
                phases, effects = _run_phases(config, setup, journal)
            summary = _summarise(config, setup, journal, phases, effects)
            summary |= {"command": command, "seconds": time.perf_counter() - start}
            _save(config, setup, folder, command)
            writer.write_summary(summary)
    return RunSummary(folder.path, summary)


def _run_phases(
    config: TrainConfig, setup: Setup, journal: Journal
) -> tuple[list[dict[str, Any]], list[Effect]]:
    """Run every phase; after each that operates, ask what the surgeon was worth."""
    curriculum = Curriculum(
        setup.learner, setup.exam, setup.surgeon, config.curriculum, setup.generators.commit
    )
    phases, effects = [], []
    for phase in make_phases(config.curriculum, config.surgeon):
        journal.begin(phase)
        curriculum.run(phase, journal)
        phases.append(journal.end())
        if phase.operations and setup.surgeon is not None:
            journal.say(f"measuring what the surgeon was worth after {phase.name}")
            effect = measure_effect(setup.surgeon, setup.exam, phase.name, setup.generators.effect)
            effects.append(effect._replace(n_practised=journal.n_operations))
    return phases, effects


def _summarise(
    config: TrainConfig,
    setup: Setup,
    journal: Journal,
    phases: list[dict[str, Any]],
    effects: list[Effect],
) -> dict[str, Any]:
    """Return what ``summary.json`` says, but for time and command."""
    model, validation = setup.patient.model, setup.patient.splits["validation"]
    return {
        "preset": config.preset,
        "seed": config.seed,
        "surgeon": config.surgeon,
        "corpus": setup.corpus.name,
        "corpus_sha256": setup.corpus.sha256,
        "corpus_nats_per_char": setup.corpus.nats_per_char,
        "phases": phases,
        "validation": evaluate_text(model, validation)._asdict(),
        "validation_unknown_characters": setup.tokenizer.n_unknown(
            setup.corpus.split("validation")
        ),
        "references": _references(setup.patient),
        "commits": journal.commit_summary(config.curriculum.commit),
        "surgeon_effect": {
            "verdict": verdict(effects, config.surgeon),
            "measurements": [effect.as_summary() for effect in effects],
        },
        "forward_tokens": journal.forward_tokens,
        "n_parameters": model.n_parameters,
        "environment": _environment(setup.device),
    }


def _save(config: TrainConfig, setup: Setup, folder: RunFolder, command: str | None) -> None:
    """Write the final checkpoint: the model as it stands, and what the surgeon learned."""
    checkpoint = folder.path / "checkpoints" / "final"
    about = {"corpus": setup.corpus.name, "corpus_sha256": setup.corpus.sha256}
    about["made_by"] = command or "agents.train"
    save_model(checkpoint, setup.learner.model, setup.tokenizer, about)
    if setup.surgeon is not None:
        seed, options = setup.generators.surgeon_seed, config.surgeon_options
        save_surgeon(setup.surgeon, checkpoint, config.surgeon, seed, options)


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


def _introduction(config: TrainConfig, setup: Setup, folder: RunFolder) -> str:
    estimator = config.grpo.estimator
    kind = ", the exact expectation, a bound on RL" if config.grpo.exploration != SAMPLED else ""
    if ESTIMATORS[estimator].is_control:
        kind = ", a supervised control, not RL"
    backend = attention_backend(setup.device, PRECISIONS[config.grpo.precision])
    return (
        f"{setup.corpus.name}, {len(setup.corpus.text):,} characters; a GPT of "
        f"{setup.patient.model.n_parameters:,} parameters on {setup.device} "
        f"({torch.get_num_threads()} threads, attention by {backend}); "
        f"{estimator}, {config.grpo.exploration}{kind}; surgeon {config.surgeon}; "
        f"into {folder.path}"
    )


def _environment(device: torch.device) -> dict[str, Any]:
    """Return versions and machine, as far as results depend on them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        **versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
    }


def _device(name: str) -> torch.device:
    """Return the device that ``name`` means.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta", which holds no numbers, raises too
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch has, got {name!r}: {reason}") from error
    return device


@contextmanager
def _report_at_the_end(folder: Path) -> Iterator[None]:
    """Write the report of what there is when the body ends, also if it breaks off."""
    try:
        yield
    finally:
        write_report(folder)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` CPU threads in the body; 0 leaves its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _new_folder_name(preset: str) -> str:
    return time.strftime(f"runs/%Y%m%d-%H%M%S-{preset}")


def _seed(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1)[0] >> 1)  # 31 bits: what every library takes
