from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.evaluation.language_model import (
    REFERENCE_NAMES,
    TextMetrics,
    evaluate_references,
    evaluate_text,
)
from avatarl_env.lm.gpt import GPT
from avatarl_env.text.ngram import NGramReference
from tests.fakes import tiny_gpt
from tests.patients import tiny_patient

TOKENS = np.random.default_rng(3).integers(0, 16, 300)


def one_at_a_time(model: GPT, tokens: NDArray[np.int64]) -> TextMetrics:
    """Predict each token alone, from the first window that ends behind it."""
    n, context = len(tokens) - 1, model.context
    length = min(context, n)
    starts = [*range(0, n - length + 1, max(1, length // 2)), n - length]
    losses, hits, entropies, confidences = [], [], [], []
    for i in range(1, n + 1):
        start = next(start for start in starts if start < i <= start + length)
        history = torch.from_numpy(tokens[start:i])
        assert start == 0 or 2 * len(history) >= context
        with torch.no_grad():
            log_probs = model(history[None])[0, -1].double().log_softmax(-1)
        losses.append(-float(log_probs[tokens[i]]))
        hits.append(int(log_probs.argmax()) == tokens[i])
        entropies.append(-float((log_probs.exp() * log_probs).sum()))
        confidences.append(float(log_probs.max().exp()))
    loss = float(np.mean(losses))
    error = calibration_error(np.array(confidences), np.array(hits))
    means = float(np.mean(hits)), float(np.mean(entropies))
    return TextMetrics(loss, loss / math.log(2), *means, error)


def calibration_error(confidences: NDArray[np.float64], hits: NDArray[np.bool_]) -> float:
    """Go through the bins one by one."""
    total = 0.0
    for m in range(1, 16):
        inside = (confidences > (m - 1) / 15) & (confidences <= m / 15)
        if inside.any():
            gap = abs(hits[inside].mean() - confidences[inside].mean())
            total += inside.sum() / len(hits) * gap
    return total


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 25, 33, 40, 41, 71])
@pytest.mark.parametrize("context", [1, 7, 16])
def test_every_character_is_predicted_once_with_half_a_context_of_history(
    length: int, context: int
) -> None:
    model = tiny_gpt(gain=20.0, context=context)
    expected = one_at_a_time(model, TOKENS[:length])
    np.testing.assert_allclose(evaluate_text(model, TOKENS[:length]), expected, atol=2e-5)


def test_a_model_that_knows_nothing_is_as_good_as_chance() -> None:
    metrics = evaluate_text(tiny_gpt(gain=0.0), TOKENS)
    assert metrics.loss == pytest.approx(math.log(16), rel=1e-6)
    assert metrics.bits_per_char == pytest.approx(4.0, rel=1e-6)
    assert metrics.entropy == pytest.approx(math.log(16), rel=1e-6)
    assert metrics.accuracy == pytest.approx(np.mean(TOKENS[1:] == 0))  # all equal: the first wins


class Told(nn.Module):
    """Says in every row what it was told to, whatever it reads: a window of three positions."""

    context = 3

    def __init__(self, probs: list[list[float]]) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 1)  # where the device is looked up
        self.logits = torch.tensor(probs).log()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(len(tokens), -1, -1)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        # Confidences 0.9, 0.7 and 0.62, each in a bin of its own; right, right and wrong.
        ([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.62, 0.3, 0.08]], (0.1 + 0.3 + 0.62) / 3),
        # 0.62 and 0.65 are in (9/15, 10/15], one right and one wrong: 2/3 |1/2 - 0.635|; and 0.9.
        ([[0.62, 0.2, 0.18], [0.65, 0.3, 0.05], [0.05, 0.05, 0.9]], (2 * 0.135 + 0.1) / 3),
        # Sure, and always right.
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], 0.0),
    ],
)
def test_calibration_by_hand(probs: list[list[float]], expected: float) -> None:
    metrics = evaluate_text(Told(probs), np.array([1, 0, 1, 2]))  # type: ignore[arg-type]
    assert metrics.calibration_error == pytest.approx(expected, abs=1e-6)


def test_a_model_without_numbers_has_no_calibration() -> None:
    told = Told([[math.nan] * 3, [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]])
    metrics = evaluate_text(told, np.array([1, 0, 1, 2]))  # type: ignore[arg-type]
    assert math.isnan(metrics.loss)
    assert math.isnan(metrics.calibration_error)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_reads_in_eval_mode_and_is_left_as_it_was(training: bool) -> None:
    model = tiny_gpt().train(training)
    modes: list[bool] = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    first = evaluate_text(model, TOKENS[:40])
    with pytest.raises(IndexError):
        evaluate_text(model, np.full(40, 99))
    assert set(modes) == {False}
    assert all(module.training is training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert evaluate_text(model, TOKENS[:40]) == first


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_without_anything_to_predict_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"tokens .*{length}"):
        evaluate_text(tiny_gpt(), TOKENS[:length])


def test_references_are_fitted_to_the_training_text_and_scored_on_the_validation_text() -> None:
    patient = tiny_patient()
    rows = evaluate_references(patient)
    assert tuple(row["name"] for row in rows) == REFERENCE_NAMES
    assert [row["bits_per_char"] * math.log(2) for row in rows] == pytest.approx(
        [row["loss"] for row in rows]
    )
    train, validation = (patient.splits[name] for name in ("train", "validation"))
    size = patient.tokenizer.vocab_size
    expected = NGramReference.fit(train, size, 3).evaluate(validation)
    assert rows[1]["loss"] == expected.loss
    assert rows[1]["accuracy"] == expected.accuracy > 1 / size
