from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents import judgement
from agents.judgement import Gains, Judgement, judge, measure_gains
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.patient import Patient
from avatarl_env.scoring import Interval, interval, kl_ref
from avatarl_env.surgery import SurgicalTheater
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import small_env, taught_patient

SOME = np.array([0.4, -0.8, 0.6, -0.2])
OTHER = np.array([-1.0, 0.0, 0.3, 1.0])


def measure(
    env: AttentionSurgeryEnv, *operations: np.ndarray, seed: int = 0, **keywords: Any
) -> list[Gains]:
    options = {"split": "surgeon", "n_each": 6, **keywords}
    rng = np.random.default_rng(seed)
    return measure_gains(env.patient, env.operator, [*operations], env.config, rng=rng, **options)


def as_lists(gains: Gains) -> list[list[float]]:
    return [quantity.tolist() for quantity in gains]


def test_zero_coefficients_gain_exactly_nothing() -> None:
    (gains,) = measure(small_env(), np.zeros(4))
    assert as_lists(gains) == [[0.0] * 6, [0.0] * 6]


def test_an_operation_changes_every_prompt_and_window() -> None:
    (gains,) = measure(small_env(), SOME)
    assert all(np.abs(quantity).min() > 0 for quantity in gains)
    assert all(quantity.shape == (6,) for quantity in gains)


def test_all_operations_are_measured_on_the_same_draws() -> None:
    env = small_env()
    first, zero, second, again = measure(env, SOME, np.zeros(4), OTHER, SOME)
    assert as_lists(first) == as_lists(again)
    assert not any(np.concatenate(zero))
    (alone,) = measure(env, OTHER)
    assert as_lists(second) == as_lists(alone)


def test_the_generator_decides_the_draws() -> None:
    env = small_env()
    (one,), (same,), (another,) = (measure(env, SOME, seed=seed) for seed in (1, 1, 2))
    assert as_lists(one) == as_lists(same)
    assert as_lists(one) != as_lists(another)


def test_gains_are_operated_minus_unoperated_and_positive_where_it_got_better() -> None:
    env = small_env()
    patient, config = env.patient, env.config
    (gains,) = measure(env, SOME)
    rng = np.random.default_rng(0)
    prompts = patient.prompts("surgeon", 6, config.prompt_length, config.n_new, rng)
    windows = torch.from_numpy(patient.windows("surgeon", 6, patient.model.context + 1, rng))

    def read() -> tuple[np.ndarray, np.ndarray]:
        score = kl_ref(patient.evaluate(prompts).writing, patient.reference)
        with torch.no_grad():
            log_probs = patient.model(windows[:, :-1]).log_softmax(-1)
        losses = -log_probs.gather(2, windows[:, 1:, None])[:, :, 0].mean(1)
        return score, losses.double().numpy()

    score, loss = read()
    with SurgicalTheater(patient.model, patient.targets) as theater:
        env.operator.apply(theater, SOME)
        operated_score, operated_loss = read()
    np.testing.assert_allclose(gains.kl_ref_gain, operated_score - score, atol=1e-12)
    np.testing.assert_allclose(gains.heldout_loss_fall, loss - operated_loss, atol=1e-6)


def test_a_harmful_operation_is_seen_to_harm_a_model_that_knows_its_text() -> None:
    env = small_env(taught_patient())
    (gains,) = measure(env, np.array([1.0, 1.0, 1.0, 1.0]), n_each=24)
    assert interval(gains.kl_ref_gain).high < 0
    assert interval(gains.heldout_loss_fall).high < 0


def test_windows_may_be_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_env()
    (whole,) = measure(env, SOME, n_each=7)
    monkeypatch.setattr(judgement, "_ROWS_PER_BATCH", 3)
    (parts,) = measure(env, SOME, n_each=7)
    np.testing.assert_allclose(parts.heldout_loss_fall, whole.heldout_loss_fall, atol=1e-6)
    assert parts.kl_ref_gain.tolist() == whole.kl_ref_gain.tolist()


def test_the_split_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_env()
    asked: list[tuple[str, int, int]] = []
    windows = Patient.windows

    def spy(self: Patient, split: str, n: int, length: int, rng: np.random.Generator) -> Any:
        asked.append((split, n, length))
        return windows(self, split, n, length, rng)

    monkeypatch.setattr(Patient, "windows", spy)
    measure(env, SOME, split="validation", n_each=5)
    rng = np.random.default_rng(0)
    judge(env.patient, env.operator, SOME, env.config, n_prompts=3, rng=rng)
    # Prompts, then windows of a context and its last target.
    assert asked == [
        ("validation", 5, 8),
        ("validation", 5, 65),
        ("surgeon", 3, 8),
        ("surgeon", 3, 65),
    ]


def test_the_weights_are_the_same_afterwards() -> None:
    env = small_env()
    before, randomness = fingerprint(env.patient.model), global_random_states()
    measure(env, SOME, OTHER)
    assert fingerprint(env.patient.model) == before
    assert global_random_states() == randomness


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_weights_are_the_same_after_a_failure_too(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    env = small_env()
    model = env.patient.model
    before = fingerprint(model)
    evaluate, calls = env.patient.evaluate, []

    def fail_under_operation(prompts: Any) -> Any:
        calls.append(fingerprint(model) == before)
        if not calls[-1]:
            raise error
        return evaluate(prompts)

    monkeypatch.setattr(env.patient, "evaluate", fail_under_operation)
    with pytest.raises(error):
        measure(env, SOME)
    assert calls == [True, False]  # it did happen while the model was operated
    assert fingerprint(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(training: bool) -> None:
    env = small_env()
    env.patient.model.train(training)
    measure(env, SOME)
    assert env.patient.model.training is training


def test_the_compute_is_counted() -> None:
    env = small_env()
    measure(env, SOME, OTHER)
    # Three models read 6 prompts of 8, write 8 each, the last of which they do not read again,
    # and read 6 windows of 64.
    assert env.patient.forward_tokens == 3 * 6 * (8 + 7 + 64)


def bounds(kl_ref_gain: float, heldout_loss_fall: float) -> Judgement:
    return Judgement(
        *(
            Interval(mean=0.5, low=bound - 0.1, high=1.0, lower_bound=bound, n=9)
            for bound in (kl_ref_gain, heldout_loss_fall)
        )
    )


@pytest.mark.parametrize(
    ("kl_ref_gain", "heldout_loss_fall", "expected"),
    [
        (0.01, 0.01, True),
        (0.01, -0.01, False),  # sharpening
        (-0.01, 0.01, False),
        (-0.01, -0.01, False),
        (0.01, 0.0, False),
        (0.0, 0.01, False),
    ],
)
def test_an_improvement_needs_both_lower_bounds_above_zero(
    kl_ref_gain: float, heldout_loss_fall: float, expected: bool
) -> None:
    assert bounds(kl_ref_gain, heldout_loss_fall).is_improvement is expected


def test_a_judgement_is_of_the_intervals_of_the_gains() -> None:
    env = small_env()
    rng = np.random.default_rng(0)
    judged = judge(env.patient, env.operator, SOME, env.config, n_prompts=6, rng=rng)
    (gains,) = measure(env, SOME)
    assert judged == Judgement(interval(gains.kl_ref_gain), interval(gains.heldout_loss_fall))
    assert judged.kl_ref_gain.n == 6


def test_doing_nothing_is_no_improvement() -> None:
    env = small_env()
    rng = np.random.default_rng(0)
    judged = judge(env.patient, env.operator, np.zeros(4), env.config, n_prompts=4, rng=rng)
    assert judged.kl_ref_gain == Interval(0.0, 0.0, 0.0, 0.0, 4)
    assert not judged.is_improvement
