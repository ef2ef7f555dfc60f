"""Tests of avatarl_env/overtaking.py, and of when a patient asks it."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from avatarl_env.overtaking import MIN_TEXTS, OvertakenWarning, Race
from avatarl_env.patient import Patient
from avatarl_env.scoring import TextReference, reference_prompt_loss
from avatarl_env.surgery import HeadGain
from tests.patients import tiny_patient


def race(lead: float, n: int, spread: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return losses of a model and of its reference on n texts."""
    rng = np.random.default_rng(seed)
    model = rng.normal(2.0, 0.3, n)
    return model, model + lead + rng.normal(0.0, spread, n)


def test_a_clear_lead_warns_once_and_says_by_how_much() -> None:
    watched = Race()
    with pytest.warns(OvertakenWarning, match=r"by 0\.250 nats per character on 100 prompts"):
        watched.watch(*race(0.25, 100, spread=0), 0)
    watched.watch(*race(0.2, 100), 0)
    assert watched.has_warned


def test_the_bound_by_hand() -> None:
    """Leads 0 and 2 in turn: mean 1, standard error sqrt(32/31) / sqrt(32) = 0.1796."""
    zeros, leads = np.zeros(32), np.tile([0.0, 2.0], 16)
    with pytest.warns(OvertakenWarning, match="by 1.000"):
        Race().watch(zeros, leads, 0)
    Race().watch(zeros, leads - 0.11, 0)  # 0.89 is less than five of them, 0.898


@pytest.mark.parametrize("lead", [-0.5, 0.0])
def test_noise_does_not_warn_however_often_it_is_looked_at(lead: float) -> None:
    watched = Race()
    for seed in range(300):
        watched.watch(*race(lead, 32, seed=seed), 0)
    assert not watched.has_warned


def test_small_leads_add_up_until_the_model_changes() -> None:
    watched = Race()
    for seed in range(40):
        watched.watch(*race(0.02, 32, seed=seed), seed)  # changed before each
    assert not watched.has_warned
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(40):
            watched.watch(*race(0.02, 32, seed=seed), 99)
    assert [warning.category for warning in said] == [OvertakenWarning]


def test_few_texts_are_too_few() -> None:
    Race().watch(*race(5.0, MIN_TEXTS - 1), 0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_model_that_is_no_number_has_overtaken_nobody(loss: float) -> None:
    watched = Race()
    watched.watch(np.full(64, loss), np.ones(64), 0)
    watched.watch(np.zeros(64), np.ones(64), 0)  # of one model: the mean is no number either
    assert not watched.has_warned
    with pytest.warns(OvertakenWarning):
        watched.watch(np.zeros(64), np.ones(64), 1)


# --- of a patient --------------------------------------------------------------------------------


@pytest.fixture
def beaten() -> Patient:
    """The bundled patient, held against a count of single letters."""
    patient = Patient.load("bundled")
    train = patient.splits["train"]
    patient.reference = TextReference(train, patient.reference.vocab_size, order=1)
    return patient


def test_a_patient_warns_at_its_first_baseline_and_never_again(beaten: Patient) -> None:
    operator = HeadGain(beaten.targets)
    zeros = np.zeros(len(operator.labels))
    prompts = beaten.prompts("surgeon", 32, 16, 4, np.random.default_rng(0))
    with warnings.catch_warnings():  # an operated model is not compared
        warnings.simplefilter("error")
        beaten.evaluate_operated(operator, zeros + 0.01, prompts)
        beaten.evaluate_many([prompts, prompts], operator, np.array([zeros, zeros + 0.01]))
    with pytest.warns(OvertakenWarning):
        beaten.evaluate_operated(operator, zeros, prompts)
    beaten.evaluate_operated(operator, zeros, prompts)


def test_several_baselines_at_once_are_evidence_too(beaten: Patient) -> None:
    prompts = [beaten.prompts("surgeon", 8, 16, 4, np.random.default_rng(i)) for i in range(4)]
    with pytest.warns(OvertakenWarning, match="on 32 prompts"):
        beaten.evaluate_many(prompts)


@pytest.mark.parametrize("which", ["bundled", "untrained"])
def test_a_patient_behind_its_reference_does_not_warn(which: str) -> None:
    patient = Patient.load("bundled") if which == "bundled" else tiny_patient()
    rng = np.random.default_rng(0)
    for _ in range(3):
        patient.evaluate_many([patient.prompts("surgeon", 64, 32, 4, rng)])


def test_the_references_loss_is_on_the_same_characters_as_the_models() -> None:
    patient = tiny_patient()
    prompts = patient.prompts("surgeon", 4, 8, 4, np.random.default_rng(0))
    writing = patient.evaluate(prompts).writing
    log_q = patient.reference.ngram.next_log_probs(prompts.tokens)
    picked = np.take_along_axis(log_q, prompts.tokens[:, :, None], 2)[:, 1:, 0]
    found = reference_prompt_loss(writing, patient.reference)
    assert found == pytest.approx(-picked.mean(1), abs=1e-6)
