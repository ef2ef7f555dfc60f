"""Tests of avatarl_env/overtaking.py, and of when a patient asks it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest

from avatarl_env import overtaking
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.overtaking import MIN_TEXTS, OvertakenWarning, Race
from avatarl_env.patient import Patient
from avatarl_env.scoring import reference_prompt_loss
from avatarl_env.scoring.reference import TextReference
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import tiny_patient

_TEXTS: Iterator[int] = iter(range(10**9))


def texts(n: int) -> np.ndarray:
    """Return n texts of one token each that no test has had before."""
    return np.array([[next(_TEXTS)] for _ in range(n)])


def race(lead: float, n: int, spread: float = 0.1, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return new texts, and losses of a model and of its reference on them."""
    rng = np.random.default_rng(seed)
    model = rng.normal(2.0, 0.3, n)
    return texts(n), model, model + lead + rng.normal(0.0, spread, n)


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
        Race().watch(texts(32), zeros, leads, 0)
    Race().watch(texts(32), zeros, leads - 0.11, 0)  # 0.89 is less than five of them, 0.898


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
    watched.watch(texts(64), np.full(64, loss), np.ones(64), 0)
    watched.watch(
        texts(64), np.zeros(64), np.ones(64), 0
    )  # of one model: the mean is no number either
    assert not watched.has_warned
    with pytest.warns(OvertakenWarning):
        watched.watch(texts(64), np.zeros(64), np.ones(64), 1)


def test_a_text_is_evidence_once_until_the_model_changes() -> None:
    watched = Race()
    some, model, reference = race(5.0, MIN_TEXTS // 2)
    for _ in range(9):
        watched.watch(np.tile(some, (2, 1)), np.tile(model, 2), np.tile(reference, 2), 0)
    assert not watched.has_warned
    watched.watch(some, model, reference, 1)  # another model: evidence again
    with pytest.warns(OvertakenWarning, match="on 32 prompts"):
        watched.watch(*race(5.0, MIN_TEXTS // 2), 1)


def test_what_did_not_show_is_not_looked_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overtaking, "MOST_TEXTS", 64)
    watched = Race()
    watched.watch(*race(-1.0, 64), 0)
    watched.watch(*race(99.0, 640), 0)
    assert len(watched._seen) == 64
    with pytest.warns(OvertakenWarning):
        watched.watch(*race(1.0, 64), 1)


# --- of a task -----------------------------------------------------------------------------------


@pytest.fixture
def beaten() -> Patient:
    """The bundled patient, held against a count of single letters."""
    patient = Patient.load("bundled")
    train = patient.splits["train"]
    patient.reference = TextReference(train, patient.reference.vocab_size, order=1)
    return patient


SIZES = {"n_prompts": 32, "prompt_length": 16, "n_new": 4}


def test_a_task_warns_at_its_first_baseline_and_never_again(beaten: Patient) -> None:
    env = AttentionSurgeryEnv(beaten, **SIZES)
    with pytest.warns(OvertakenWarning, match="on 32 prompts") as said:
        env.reset(seed=0)
    assert said[0].filename == __file__  # whoever called the environment
    env.reset(seed=1)
    AttentionSurgeryEnv(beaten, **SIZES).reset(seed=2)


def test_the_line_that_is_blamed_is_the_callers_behind_gymnasiums_wrappers(beaten: Patient) -> None:
    env = gymnasium.make("AttentionSurgery-v0", lm=beaten, **SIZES)
    with pytest.warns(OvertakenWarning) as said:
        env.reset(seed=0)
    assert said[0].filename == __file__


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_several_baselines_at_once_are_evidence_too(injury: float, beaten: Patient) -> None:
    """With an injury those of the healthy model."""
    env = AttentionSurgeryVectorEnv(4, beaten, **{**SIZES, "n_prompts": 8, "injury": injury})
    with pytest.warns(OvertakenWarning, match="on 32 prompts"):
        env.reset(seed=0)


def test_a_score_that_does_not_pull_to_the_reference_is_no_reason_to_warn(beaten: Patient) -> None:
    AttentionSurgeryEnv(beaten, score={"heldout_loss": 1.0}, **SIZES).reset(seed=0)


def test_neither_validation_nor_the_same_prompts_again_are_evidence(beaten: Patient) -> None:
    env = AttentionSurgeryEnv(beaten, **{**SIZES, "n_prompts": 16, "episode_length": 2})
    for _ in range(3):
        env.reset(seed=0)
    for seed in range(1, 4):
        env.verify(np.zeros((2, *env.action_space.shape)), seed)
    with pytest.warns(OvertakenWarning, match="on 32 prompts"):
        env.reset(seed=4)


@pytest.mark.parametrize("which", ["bundled", "untrained"])
def test_a_patient_behind_its_reference_does_not_warn(which: str) -> None:
    patient = Patient.load("bundled") if which == "bundled" else tiny_patient()
    env = AttentionSurgeryEnv(patient, n_prompts=64, prompt_length=32, n_new=4)
    for seed in range(3):
        env.reset(seed=seed)


def test_the_references_loss_is_on_the_same_characters_as_the_models() -> None:
    patient = tiny_patient()
    prompts = patient.prompts("surgeon", 4, 8, 4, np.random.default_rng(0))
    generations = patient.evaluate(prompts).generations
    log_q = patient.reference.ngram.next_log_probs(prompts.tokens)
    picked = np.take_along_axis(log_q, prompts.tokens[:, :, None], 2)[:, 1:, 0]
    found = reference_prompt_loss(generations, patient.reference)
    assert found == pytest.approx(-picked.mean(1), abs=1e-6)
