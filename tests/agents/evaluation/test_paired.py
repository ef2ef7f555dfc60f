from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.evaluation.paired import Gains, PairedEvaluation, PairedResult, compare_pairs
from agents.evaluation.statistics import Interval, interval
from avatarl_env.scoring import kl_ref
from avatarl_env.surgery import SurgicalTheater
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import fingerprint
from tests.training_runs import small_env

SOME = np.array([0.4, -0.8, 0.6, -0.2])
OTHER = np.array([-1.0, 0.0, 0.3, 1.0])
ZERO = np.zeros(4)


def draw(env: AttentionSurgeryVectorEnv, n: int, seed: int = 0, **keywords: Any) -> Any:
    options = {"split": "surgeon", "n_each": 6, **keywords}
    rng = np.random.default_rng(seed)
    return PairedEvaluation(env.patient, env.config, n_operations=n, rng=rng, **options)


def measure(
    env: AttentionSurgeryVectorEnv, *operations: np.ndarray, seed: int = 0, **keywords: Any
) -> Gains:
    found: Gains = draw(env, len(operations), seed, **keywords).gains(
        env.operator, np.stack(operations)
    )
    return found


def as_lists(gains: Gains) -> list[Any]:
    return [quantity.tolist() for quantity in gains]


def test_zero_coefficients_gain_exactly_nothing() -> None:
    gains = measure(small_env(), ZERO, ZERO)
    assert as_lists(gains) == [[[0.0] * 6] * 2, [[0.0] * 6] * 2, [0.0] * 2]


@pytest.mark.parametrize("operator", ["head_gain", "spectral_bands", "output_temperature"])
def test_zero_among_others_gains_exactly_nothing_too(operator: str) -> None:
    env = small_env(operator=operator)
    zero = np.zeros(len(env.operator.labels))
    some = np.linspace(0.7, -0.5, len(zero))
    for quantity in measure(env, some, zero, some):
        assert not quantity[1].any()
        assert np.abs(quantity[[0, 2]]).min() > 0  # every prompt and window changed


def test_draws_are_those_of_the_generator_and_the_same_for_every_operation() -> None:
    env = small_env()
    evaluation = draw(env, 2)
    first, second, again = (
        evaluation.gains(env.operator, np.stack(pair))
        for pair in ((SOME, OTHER), (OTHER, OTHER), (SOME, OTHER))
    )
    assert as_lists(first) == as_lists(again) == as_lists(measure(env, SOME, OTHER))
    assert as_lists(first) != as_lists(measure(env, SOME, OTHER, seed=1))
    for one, other in zip(first, second, strict=True):
        assert one[1].tolist() == other[1].tolist()  # the same operation on the same draws
        assert one[0].tolist() != other[0].tolist()
        assert other[0].tolist() != other[1].tolist()  # each operation has draws of its own


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


def test_an_operator_without_row_edits_gives_the_same_numbers(in_place_gain: str) -> None:
    found = measure(small_env(operator=in_place_gain), SOME, OTHER)
    for one, other in zip(found, measure(small_env(), SOME, OTHER), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_and_its_compute_is_counted(training: bool) -> None:
    env = small_env()
    env.patient.model.train(training)
    before = fingerprint(env.patient.model)
    measure(env, SOME, OTHER)
    assert fingerprint(env.patient.model) == before
    assert env.patient.model.training is training
    # Two models read 6 prompts of 8 each, write 5 each, the last of which they do not read again,
    # and read 6 windows of 64; before and under the operation.
    assert env.patient.forward_tokens == 2 * 2 * 6 * (8 + 4 + 64)


@pytest.mark.parametrize(
    ("kl_ref_bound", "loss_bound", "expected"),
    [
        (0.1, 0.1, True),
        (0.1, -0.1, False),
        (-0.1, 0.1, False),
        (0.1, 0.0, False),
        (0.0, 0.1, False),
    ],
)
def test_an_improvement_needs_both_lower_bounds_above_zero(
    kl_ref_bound: float, loss_bound: float, expected: bool
) -> None:
    bounds = (Interval(0.5, bound - 0.1, 1.0, bound, 9) for bound in (kl_ref_bound, loss_bound))
    assert PairedResult(*bounds).is_improvement is expected


def test_one_operation_is_compared_on_prompts_of_the_surgeons_split() -> None:
    env = small_env()

    def compare(coefficients: np.ndarray) -> PairedResult:
        rng = np.random.default_rng(0)
        return compare_pairs(
            env.patient, env.operator, coefficients, env.config, n_prompts=6, rng=rng
        )

    gains = measure(env, SOME)
    assert compare(SOME) == (interval(gains.kl_ref_gain[0]), interval(gains.heldout_loss_fall[0]))
    assert compare(ZERO) == (Interval(0.0, 0.0, 0.0, 0.0, 6),) * 2
    assert not compare(ZERO).is_improvement
