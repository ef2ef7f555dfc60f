"""Tests of avatarl_env/patient.py."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarl_env.patient import Evaluation, Patient, Prompts
from avatarl_env.scoring import measure_many
from avatarl_env.surgery import Operator, SurgicalTheater, make_operator
from avatarl_env.text.corpus import Corpus
from tests.fakes import fingerprint
from tests.patients import (
    InPlaceGain,
    assert_same_reading,
    count_hooks,
    store_tiny_patient,
    tiny_patient,
)


@pytest.fixture
def patient() -> Patient:
    return tiny_patient()


def some_prompts(patient: Patient, seed: int = 0, n_new: int = 12) -> Prompts:
    return patient.prompts("surgeon", 4, 8, n_new, np.random.default_rng(seed))


def same(left: Evaluation, right: Evaluation) -> bool:
    """Whether two evaluations are equal to the last bit."""
    pairs = [
        *zip(vars(left.generations).values(), vars(right.generations).values(), strict=True),
        *zip(left.vitals, right.vitals, strict=True),
    ]
    return left.terms == right.terms and all(np.array_equal(a, b) for a, b in pairs)


def forwarded_tokens(model: nn.Module) -> list[int]:
    """Return a list that every forward appends its number of tokens to."""
    counts: list[int] = []
    model.embed.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    return counts


# --- text ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def striped() -> Corpus:
    """A corpus whose splits have no letter in common."""
    rng = random.Random(0)
    letters = {"abc": 1700, "def": 100, "ghi": 200}
    text = "".join("".join(rng.choices(some, k=n)) for some, n in letters.items())
    return Corpus("striped", text, "made by the tests")


@pytest.mark.parametrize(
    ("split", "letters"), [("train", "abc"), ("surgeon", "def"), ("validation", "ghi")]
)
def test_prompts_come_from_their_split(split: str, letters: str, striped: Corpus) -> None:
    patient = tiny_patient(corpus=striped)
    prompts = patient.prompts(split, 50, 10, 6, np.random.default_rng(0))
    assert prompts.tokens.shape == (50, 10)
    assert prompts.tokens.dtype == np.int64
    texts = [patient.tokenizer.decode(row) for row in prompts.tokens]
    assert set("".join(texts)) == set(letters)
    assert all(text in striped.split(split) for text in texts)
    assert len(set(texts)) > 20
    assert prompts.uniforms.shape == (50, 6)
    assert prompts.uniforms.dtype == np.float32
    assert 0 <= prompts.uniforms.min() < prompts.uniforms.max() < 1


def test_the_whole_split_is_a_window_and_one_more_is_refused(patient: Patient) -> None:
    rng = np.random.default_rng(0)
    assert len(patient.splits["surgeon"]) == 200
    window = patient.windows("surgeon", 1, 200, rng)
    assert window[0].tolist() == patient.splits["surgeon"].tolist()
    with pytest.raises(ValueError, match=r"length must be at most 200 \(surgeon\), got 201"):
        patient.windows("surgeon", 1, 201, rng)


# --- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def naive_loss(model: nn.Module, row: Tensor) -> float:
    losses = []
    for t in range(1, len(row)):
        logits = model(row[None, :t])[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[row[t]]))
    return sum(losses) / len(losses)


def test_prompt_loss_equals_a_naive_teacher_forced_loss(patient: Patient) -> None:
    prompts = some_prompts(patient)
    expected = [naive_loss(patient.model, torch.from_numpy(row)) for row in prompts.tokens]
    assert patient.evaluate(prompts).generations.prompt_loss == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.01


# --- many operations -----------------------------------------------------------------------------

OPERATIONS = [("head_gain", {"tied": False}), ("spectral_bands", {})]


def many(
    patient: Patient, name: str | None, n: int = 5, **options: Any
) -> tuple[list[Prompts], Operator | None, np.ndarray]:
    """Return prompts of n operations, the operator and coefficients (n, A), one row of zeros."""
    prompts = [some_prompts(patient, seed, n_new=6) for seed in range(n)]
    if name is None:
        return prompts, None, np.zeros((n, 0))
    operator = make_operator(name, patient.targets, **options)
    coefficients = np.random.default_rng(0).uniform(-1, 1, (n, len(operator.labels)))
    coefficients[1:2] = 0
    return prompts, operator, coefficients


def one_by_one(
    patient: Patient, prompts: list[Prompts], operator: Operator | None, coefficients: np.ndarray
) -> list[Evaluation]:
    if operator is None:
        return [patient.evaluate(p) for p in prompts]
    pairs = zip(coefficients, prompts, strict=True)
    return [patient.evaluate_operated(operator, c, p) for c, p in pairs]


@pytest.mark.parametrize("at_once", [1, 11, 256])
@pytest.mark.parametrize(("name", "options"), [(None, {}), OPERATIONS[1]])
def test_evaluating_many_operations_equals_one_by_one(
    name: str | None, options: dict[str, Any], at_once: int, patient: Patient
) -> None:
    """Five operations of four prompts: one or two of them, or all, in one forward."""
    arguments = many(patient, name, **options)
    expected = one_by_one(patient, *arguments)
    before = fingerprint(patient.model)
    versions = [p._version for p in patient.model.parameters()]
    counts, patient.forward_tokens = forwarded_tokens(patient.model), 0
    patient.rows_per_forward = at_once
    found = patient.evaluate_many(*arguments)
    assert len(found) == 5
    for one, other, prompts in zip(found, expected, arguments[0], strict=True):
        assert_same_reading(one, other, prompts.uniforms)
        ((_, terms),) = measure_many(one.generations, patient.reference)
        assert one.terms == terms  # measured together, to the last bit those of each alone
    n_parts = math.ceil(5 / max(1, at_once // 4))
    assert len(counts) == n_parts * 6  # the prompts and five new tokens
    assert sum(counts) == patient.forward_tokens == 5 * 4 * (8 + 5)
    assert fingerprint(patient.model) == before
    assert [p._version for p in patient.model.parameters()] == versions  # never written
    assert count_hooks(patient.model) == 1  # the test's


def test_operations_of_different_sizes_are_refused(patient: Patient) -> None:
    """Rows would be assigned to the wrong operation: 2 + 6 prompts are 2 * 4."""
    first = some_prompts(patient)
    others = [
        Prompts(first.tokens[:2], first.uniforms[:2]),
        Prompts(first.tokens[:, :5], first.uniforms),
        Prompts(first.tokens, first.uniforms[:, :5]),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"^prompts must be of one number and length"):
            patient.evaluate_many([first, other])
    assert patient.forward_tokens == 0


@pytest.mark.parametrize("shape", [(0, 4), (2, 4), (5, 4), (4,), (16,)])
def test_coefficients_that_are_not_one_row_each_are_refused(
    shape: tuple[int, ...], patient: Patient
) -> None:
    """Two rows for four operations would divide the batch differently."""
    prompts, operator, _ = many(patient, "head_gain", n=4)
    windows = np.zeros((4, 3, 9), dtype=np.int64)
    message = r"^coefficients must have (4 rows|shape \(N, A\))"
    with pytest.raises(ValueError, match=message):
        patient.evaluate_many(prompts, operator, np.zeros(shape))
    with pytest.raises(ValueError, match=message):
        patient.losses(windows, operator, np.zeros(shape))
    assert patient.forward_tokens == 0


@pytest.mark.parametrize("at_once", [1, 7])
@pytest.mark.parametrize(("name", "options"), [(None, {}), *OPERATIONS])
def test_losses_equal_naive_ones_under_each_operation(
    name: str | None, options: dict[str, Any], at_once: int, patient: Patient
) -> None:
    _, operator, coefficients = many(patient, name, n=3, **options)
    rng = np.random.default_rng(3)
    windows = np.stack([patient.windows("validation", 3, 10, rng) for _ in range(3)])
    expected = []
    for rows, c in zip(windows, coefficients, strict=True):
        with SurgicalTheater(patient.model, [operator] if operator else patient.targets) as theater:
            if operator is not None:
                operator.apply(theater, c)
            expected.append([naive_loss(patient.model, torch.from_numpy(row)) for row in rows])
    before, counts = fingerprint(patient.model), forwarded_tokens(patient.model)
    patient.model.train()
    patient.rows_per_forward = at_once
    patient.tokens_per_forward = 30
    losses = patient.losses(windows, operator, coefficients)
    assert losses.shape == (3, 3)
    assert losses.dtype == np.float64
    assert losses == pytest.approx(np.array(expected), abs=1e-5)
    assert sum(counts) == patient.forward_tokens == 3 * 3 * 9
    assert max(counts) <= 27 or name is None or at_once == 7
    assert fingerprint(patient.model) == before
    assert patient.model.training
    assert count_hooks(patient.model) == 1  # the test's


def test_an_operator_without_row_edits_operates_one_by_one_and_warns_once(
    patient: Patient, caplog: pytest.LogCaptureFixture
) -> None:
    class Plain(InPlaceGain):
        """A class of its own: the warning is given once for each."""

    prompts, overlaid, coefficients = many(patient, "head_gain")
    operator = Plain(patient.targets)
    windows = np.stack([p.tokens for p in prompts])
    expected = one_by_one(patient, prompts, operator, coefficients)
    losses = patient.losses(windows, overlaid, coefficients)
    for _ in range(2):
        found = patient.evaluate_many(prompts, operator, coefficients)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        assert patient.losses(windows, operator, coefficients) == pytest.approx(losses, abs=1e-5)
    assert len(caplog.messages) == 1
    assert "Plain has no row_edits" in caplog.messages[0]


# --- loading -------------------------------------------------------------------------------------


def test_load_returns_the_stored_model_and_its_training_text(folder: str) -> None:
    loaded, original = Patient.load(folder), tiny_patient()
    assert fingerprint(loaded.model) == fingerprint(original.model)
    assert loaded.tokenizer == original.tokenizer
    assert loaded.corpus.text == original.corpus.text
    assert not loaded.model.training
    assert same(loaded.evaluate(some_prompts(loaded)), original.evaluate(some_prompts(original)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_evaluates_about_the_same(dtype: str, folder: str) -> None:
    patient = Patient.load(folder, dtype=dtype)
    assert {p.dtype for p in patient.model.parameters()} == {getattr(torch, dtype)}
    prompts = some_prompts(patient)
    generations, vitals, terms = patient.evaluate(prompts)
    exact = tiny_patient().evaluate(prompts)
    assert generations.prompt_loss == pytest.approx(exact.generations.prompt_loss, abs=0.05)
    assert vitals.query_log_rms == pytest.approx(exact.vitals.query_log_rms, abs=0.05)
    assert all(math.isfinite(value) for value in terms.values())


def test_a_model_without_a_stored_corpus_needs_one(tmp_path: Path) -> None:
    folder = store_tiny_patient(tmp_path)
    about = json.loads((tmp_path / "model.json").read_text())
    del about["corpus"]
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="corpus must be given"):
        Patient.load(folder)
    assert Patient.load(folder, corpus=str(tmp_path / "text.txt")).corpus.text


def test_a_text_that_changed_since_training_is_refused_unless_given(tmp_path: Path) -> None:
    folder = store_tiny_patient(tmp_path / "model")
    about_path = tmp_path / "model" / "model.json"
    about = json.loads(about_path.read_text(encoding="utf-8"))
    about["corpus_sha256"] = "0" * 64
    about_path.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(ValueError, match="was trained on, with sha256 0000"):
        Patient.load(folder)
    assert Patient.load(folder, corpus=about["corpus"]).corpus.name == about["corpus"]
