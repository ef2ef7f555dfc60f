"""A tiny patient with its own text, live or in a folder, and operators for it."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm.storage import save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.patient import Evaluation, Patient
from avatarl_env.surgery import HeadGain, SurgicalTheater, Targets
from avatarl_env.text.corpus import Corpus
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import tiny_gpt

SIZES: dict[str, Any] = {"n_prompts": 32, "prompt_length": 8, "n_new": 4}
"""Sizes of a quick evaluation."""


@functools.cache
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
    """Return a patient with an untrained GPT: 2 layers, 2 heads, width 32, context 64."""
    corpus = corpus or tiny_corpus()
    tokenizer = CharTokenizer.from_text(corpus.text)
    model = tiny_gpt(seed, vocab_size=tokenizer.vocab_size, context=64, n_heads=2)
    return Patient(model.eval(), tokenizer, corpus)


def tiny_env(patient: Patient | None = None, **keywords: Any) -> AttentionSurgeryEnv:
    """Return an environment on `patient`, or on a new tiny one."""
    return AttentionSurgeryEnv(patient or tiny_patient(), **{**SIZES, **keywords})


def tiny_vector_env(
    num_envs: int = 3, patient: Patient | None = None, **keywords: Any
) -> AttentionSurgeryVectorEnv:
    """Return a vector environment on `patient`, or on a new tiny one."""
    return AttentionSurgeryVectorEnv(num_envs, patient or tiny_patient(), **{**SIZES, **keywords})


def store_tiny_patient(folder: Path) -> str:
    """Write the tiny patient and its text into `folder`; return the value for `lm`."""
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


class InPlaceGain:
    """HeadGain without `row_edits`: it cannot operate on the rows of a batch."""

    def __init__(self, targets: Targets, **options: Any) -> None:
        self._gain = HeadGain(targets, **options)
        self.labels = self._gain.labels

    def parameters(self) -> Iterable[Tensor]:
        return self._gain.parameters()

    def apply(self, theater: SurgicalTheater, coefficients: Any) -> None:
        self._gain.apply(theater, coefficients)


def count_hooks(model: nn.Module) -> int:
    """Count the hooks on a model and all its modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_reading(
    found: Evaluation, expected: Evaluation, uniforms: np.ndarray, tolerance: float = 1e-4
) -> int:
    """Check that two evaluations differ by rounding alone; return how many texts do differ.

    A text may differ where a uniform lies within `tolerance` of the boundary between two tokens;
    the terms, means over all texts, are not compared then.

    Args:
        found: one evaluation.
        expected: the other, of the same prompts.
        uniforms: (M, N) the sampling noise of both.
        tolerance: of probabilities, terms and vitals.
    """
    new, old = found.generations.new_tokens, expected.generations.new_tokens
    n_differing = 0
    for row in range(len(uniforms)):
        differs = np.flatnonzero(new[row] != old[row])
        stop = int(differs[0]) if len(differs) else uniforms.shape[1]
        np.testing.assert_allclose(
            np.exp(found.generations.distributions[row, :stop]),
            np.exp(expected.generations.distributions[row, :stop]),
            rtol=0,
            atol=tolerance,
        )
        if len(differs):
            n_differing += 1
            low, high = sorted((int(new[row, stop]), int(old[row, stop])))
            slices = np.exp(expected.generations.distributions[row, stop]).cumsum()[low:high]
            gap = np.abs(slices - uniforms[row, stop]).max()
            assert gap <= tolerance, f"text {row} differs at {stop}, {gap} off a boundary"
    pairs = [(found.generations.prompt_loss, expected.generations.prompt_loss)]
    pairs += zip(found.vitals, expected.vitals, strict=True)
    if not n_differing:
        pairs.append(([*found.terms.values()], [*expected.terms.values()]))
    for left, right in pairs:
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=tolerance)
    return n_differing


def global_random_states() -> tuple[object, ...]:
    """Return the states of the global random generators, comparable with `==`."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - read, not drawn from
    return random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()


def plain(value: Any) -> Any:
    """Turn trajectories, infos and states into data that `==` compares to the last bit."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        content = plain(list(value)) if value.dtype == object else value.tobytes()
        return value.dtype.str, value.shape, content
    return value
