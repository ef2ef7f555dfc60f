from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.evaluation.paired import Gains, PairedEvaluation, PairedResult, compare_pairs
from avatarl_env.patient import Patient
from avatarl_env.scoring import Interval, interval, kl_ref
from avatarl_env.surgery import SurgicalTheater
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import (
    small_env,
    taught_patient,
)

SOME = np.array([0.4, -0.8, 0.6, -0.2])
OTHER = np.array([-1.0, 0.0, 0.3, 1.0])


def sit(env: AttentionSurgeryVectorEnv, n: int, seed: int = 0, **keywords: Any) -> PairedEvaluation:
    """Draw an evaluation environment for `n` operations."""
    options = {"split": "surgeon", "n_each": 6, **keywords}
    rng = np.random.default_rng(seed)
    return PairedEvaluation(env.patient, env.config, n_operations=n, rng=rng, **options)


def measure(
    env: AttentionSurgeryVectorEnv, *operations: np.ndarray, seed: int = 0, **keywords: Any
) -> Gains:
    eval_env = sit(env, len(operations), seed, **keywords)
    return eval_env.gains(env.operator, np.stack(operations))


def by_operation(gains: Gains) -> list[Any]:
    """Return each quantity as (N, M), or (N, 1) where an operation has one number."""
    return [quantity.reshape(len(quantity), -1) for quantity in gains]


def as_lists(gains: Gains) -> list[Any]:
    return [quantity.tolist() for quantity in gains]


def test_zero_coefficients_gain_exactly_nothing() -> None:
    gains = measure(small_env(), np.zeros(4), np.zeros(4))
    assert as_lists(gains) == [[[0.0] * 6] * 2, [[0.0] * 6] * 2, [0.0] * 2]


@pytest.mark.parametrize("operator", ["head_gain", "spectral_bands", "output_temperature"])
def test_zero_among_others_gains_exactly_nothing_too(operator: str) -> None:
    env = small_env(operator=operator)
    n_coefficients = len(env.operator.labels)
    zero, some = np.zeros(n_coefficients), np.full(n_coefficients, 0.5)
    some[0] = -0.5
    gains = measure(env, some, zero, some)
    for quantity in by_operation(gains):
        assert not quantity[1].any()
        assert np.abs(quantity[[0, 2]]).max() > 0


def test_an_operation_changes_every_prompt_and_window() -> None:
    gains = measure(small_env(), SOME, OTHER)
    assert all(np.abs(quantity).min() > 0 for quantity in gains)
    assert [quantity.shape for quantity in gains] == [(2, 6), (2, 6), (2,)]


def test_whoever_sits_an_exam_gets_the_same_draws() -> None:
    env = small_env()
    eval_env = sit(env, 2)
    first, zero, second, again = (
        eval_env.gains(env.operator, np.stack(pair))
        for pair in ((SOME, OTHER), (np.zeros(4),) * 2, (OTHER, OTHER), (SOME, OTHER))
    )
    assert as_lists(first) == as_lists(again)
    assert not any(quantity.any() for quantity in zero)
    for one, other in zip(first, second, strict=True):
        assert one[1].tolist() == other[1].tolist()  # the same operation on the same draws
        assert one[0].tolist() != other[0].tolist()


def test_each_operation_has_draws_of_its_own() -> None:
    gains = measure(small_env(), SOME, SOME)
    for quantity in by_operation(gains):
        assert set(quantity[0].tolist()).isdisjoint(quantity[1].tolist())


def test_the_generator_decides_the_draws() -> None:
    env = small_env()
    one, same, another = (measure(env, SOME, seed=seed) for seed in (1, 1, 2))
    assert as_lists(one) == as_lists(same)
    assert as_lists(one) != as_lists(another)


def test_gains_are_operated_minus_unoperated_and_positive_where_it_got_better() -> None:
    env = small_env()
    patient, config = env.patient, env.config
    gains = measure(env, SOME, OTHER)
    rng = np.random.default_rng(0)
    sizes = (6, config.prompt_length, config.n_new)
    prompts = [patient.prompts("surgeon", *sizes, rng) for _ in range(2)]
    windows = patient.windows("surgeon", 12, patient.model.context + 1, rng).reshape(2, 6, -1)

    def read(i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = torch.from_numpy(windows[i])
        score = kl_ref(patient.evaluate(prompts[i]).generations, patient.reference)
        with torch.no_grad():
            log_probs = patient.model(tokens[:, :-1]).log_softmax(-1)
        losses = -log_probs.gather(2, tokens[:, 1:, None])[:, :, 0].mean(1)
        return score, losses.double().numpy()

    for i, coefficients in enumerate((SOME, OTHER)):
        score, loss = read(i)
        with SurgicalTheater(patient.model, [env.operator]) as theater:
            env.operator.apply(theater, coefficients)
            operated_score, operated_loss = read(i)
        np.testing.assert_allclose(gains.kl_ref_gain[i], operated_score - score, atol=1e-5)
        np.testing.assert_allclose(gains.heldout_loss_fall[i], loss - operated_loss, atol=1e-5)


def test_a_harmful_operation_is_seen_to_harm_a_model_that_knows_its_text() -> None:
    env = small_env(taught_patient())
    gains = measure(env, np.array([1.0, 1.0, 1.0, 1.0]), n_each=24)
    assert interval(gains.kl_ref_gain[0]).high < 0
    assert interval(gains.heldout_loss_fall[0]).high < 0


def test_operations_may_be_measured_in_parts() -> None:
    env = small_env()
    operations = (SOME, OTHER, np.zeros(4))
    whole = measure(env, *operations)
    env.patient.rows_per_forward = 12
    parts = measure(env, *operations)
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert not one[2].any()


def test_an_operator_without_row_edits_gives_the_same_numbers(in_place_gain: str) -> None:
    found = measure(small_env(operator=in_place_gain), SOME, OTHER)
    expected = measure(small_env(), SOME, OTHER)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_split_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_env()
    asked: list[tuple[str, int, int]] = []
    windows = Patient.windows

    def spy(self: Patient, split: str, n: int, length: int, rng: np.random.Generator) -> Any:
        asked.append((split, n, length))
        return windows(self, split, n, length, rng)

    monkeypatch.setattr(Patient, "windows", spy)
    measure(env, SOME, OTHER, split="validation", n_each=5)
    rng = np.random.default_rng(0)
    compare_pairs(env.patient, env.operator, SOME, env.config, n_prompts=3, rng=rng)
    # Prompts, then windows of a context and its last target.
    assert asked == [
        ("validation", 5, 8),
        ("validation", 5, 8),
        ("validation", 10, 65),
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
@pytest.mark.parametrize("operator", ["head_gain", "in_place_gain"])
@pytest.mark.usefixtures("in_place_gain")
def test_the_weights_are_the_same_after_a_failure_too(
    monkeypatch: pytest.MonkeyPatch, operator: str, error: type[BaseException]
) -> None:
    env = small_env(operator=operator)
    model, eval_env = env.patient.model, sit(env, 2)
    before, writes = fingerprint(model), []
    evaluate = env.patient._evaluate

    def fail(*arguments: Any) -> Any:
        evaluate(*arguments)
        writes.append(fingerprint(model) != before)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(env.patient, "_evaluate", fail)
        with pytest.raises(error):
            eval_env.gains(env.operator, np.stack([SOME, OTHER]))
    assert writes == [operator == "in_place_gain"]  # only that one writes into the weights at all
    assert fingerprint(model) == before
    again = eval_env.gains(env.operator, np.zeros((2, 4)))  # and no hook is left behind
    assert not any(quantity.any() for quantity in again)
    assert as_lists(eval_env.gains(env.operator, np.stack([SOME, OTHER]))) == as_lists(
        measure(env, SOME, OTHER)
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(training: bool) -> None:
    env = small_env()
    env.patient.model.train(training)
    measure(env, SOME)
    assert env.patient.model.training is training


def test_the_compute_is_counted() -> None:
    env = small_env()
    measure(env, SOME, OTHER)
    # Two models read 6 prompts of 8 each, write 5 each, the last of which they do not read again,
    # and read 6 windows of 64; before and under the operation.
    assert env.patient.forward_tokens == 2 * 2 * 6 * (8 + 4 + 64)


def bounds(kl_ref_gain: float, heldout_loss_fall: float) -> PairedResult:
    return PairedResult(
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
    judged = compare_pairs(env.patient, env.operator, SOME, env.config, n_prompts=6, rng=rng)
    gains = measure(env, SOME)
    expected = PairedResult(interval(gains.kl_ref_gain[0]), interval(gains.heldout_loss_fall[0]))
    assert judged == expected
    assert judged.kl_ref_gain.n == 6


def test_doing_nothing_is_no_improvement() -> None:
    env = small_env()
    rng = np.random.default_rng(0)
    judged = compare_pairs(env.patient, env.operator, np.zeros(4), env.config, n_prompts=4, rng=rng)
    assert judged.kl_ref_gain == Interval(0.0, 0.0, 0.0, 0.0, 4)
    assert not judged.is_improvement
