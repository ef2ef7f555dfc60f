"""A tiny patient with a text of its own, on the table or in a folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm.storage import save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.patient import Patient
from avatarl_env.text.corpus import Corpus
from tests.fakes import tiny_gpt

SIZES: dict[str, Any] = {"n_prompts": 32, "prompt_length": 8, "n_new": 4}
"""Of a quick evaluation."""


def tiny_text(n_characters: int = 4000, seed: int = 0) -> str:
    """Write random words of a small made-up language."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioulmnrst", k=rng.randint(1, 5))) for _ in range(40)]
    text = ""
    while len(text) < n_characters:
        text += rng.choice(words) + rng.choice(["\n", " ", " ", " "])
    return text[:n_characters]


def tiny_corpus() -> Corpus:
    """Return the corpus of the made-up language."""
    return Corpus("made-up", tiny_text(), "made by the tests")


def tiny_patient(seed: int = 0, corpus: Corpus | None = None) -> Patient:
    """Put an untrained GPT of two layers, two heads, width 32 and context 64 on the table."""
    corpus = corpus or tiny_corpus()
    tokenizer = CharTokenizer.from_text(corpus.text)
    model = tiny_gpt(seed, vocab_size=tokenizer.vocab_size, context=64, n_heads=2)
    return Patient(model.eval(), tokenizer, corpus)


def tiny_env(patient: Patient | None = None, **keywords: Any) -> AttentionSurgeryEnv:
    """Return an environment on ``patient``, or on a new tiny one."""
    return AttentionSurgeryEnv(patient or tiny_patient(), **{**SIZES, **keywords})


def store_tiny_patient(folder: Path) -> str:
    """Write the tiny patient and its text into ``folder``; return what ``lm`` has to be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    patient = tiny_patient()
    about = {"corpus": str(folder / "text.txt"), "made_by": "the tests"}
    save_model(folder, patient.model, patient.tokenizer, about)
    return str(folder)


def actions(n_steps: int, n_coefficients: int = 4, seed: int = 0) -> np.ndarray:
    """Draw actions (n_steps, n_coefficients) in [-1, 1], float32."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n_steps, n_coefficients)).astype(np.float32)


def global_random_states() -> tuple[object, ...]:
    """Return the states of the generators that everybody shares, comparable with ``==``."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - read, not drawn from
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()
