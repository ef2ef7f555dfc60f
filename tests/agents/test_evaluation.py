from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agents import evaluation
from agents.evaluation import TextMetrics, evaluate_text
from avatarl_env.lm.gpt import GPT
from tests.fakes import tiny_gpt
from tests.patients import global_random_states

TOKENS = np.random.default_rng(3).integers(0, 16, 300)


def one_at_a_time(model: GPT, tokens: NDArray[np.int64]) -> TextMetrics:
    """Predict each token alone, from the first window that ends behind it."""
    n, context = len(tokens) - 1, model.context
    length = min(context, n)
    starts = [*range(0, n - length + 1, max(1, length // 2)), n - length]
    losses, hits, entropies = [], [], []
    for i in range(1, n + 1):
        start = next(start for start in starts if start < i <= start + length)
        history = torch.from_numpy(tokens[start:i])
        assert start == 0 or 2 * len(history) >= context
        with torch.no_grad():
            log_probs = model(history[None])[0, -1].double().log_softmax(-1)
        losses.append(-float(log_probs[tokens[i]]))
        hits.append(int(log_probs.argmax()) == tokens[i])
        entropies.append(-float((log_probs.exp() * log_probs).sum()))
    loss = float(np.mean(losses))
    return TextMetrics(loss, loss / math.log(2), float(np.mean(hits)), float(np.mean(entropies)))


@pytest.mark.parametrize("length", [2, 3, 9, 16, 17, 18, 24, 25, 26, 33, 40, 41, 64, 65, 71])
@pytest.mark.parametrize("context", [1, 7, 16])
def test_every_character_is_predicted_once_with_half_a_context_of_history(
    length: int, context: int
) -> None:
    model = tiny_gpt(gain=20.0, context=context)
    expected = one_at_a_time(model, TOKENS[:length])
    np.testing.assert_allclose(evaluate_text(model, TOKENS[:length]), expected, atol=2e-5)


def test_history_matters_to_the_model_under_test() -> None:
    # Else the test above would not notice whose history a character is given.
    short, long = tiny_gpt(gain=20.0, context=2), tiny_gpt(gain=20.0, context=16)
    assert abs(evaluate_text(short, TOKENS).loss - evaluate_text(long, TOKENS).loss) > 0.01


@pytest.mark.parametrize("tokens_per_batch", [1, 16, 17, 48, 100])
def test_how_windows_are_batched_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch, tokens_per_batch: int
) -> None:
    model = tiny_gpt(gain=20.0)
    expected = evaluate_text(model, TOKENS[:150])
    monkeypatch.setattr(evaluation, "_TOKENS_PER_BATCH", tokens_per_batch)
    np.testing.assert_allclose(evaluate_text(model, TOKENS[:150]), expected, atol=1e-6)


def test_a_model_that_knows_nothing_is_as_good_as_chance() -> None:
    metrics = evaluate_text(tiny_gpt(gain=0.0), TOKENS)
    assert metrics.loss == pytest.approx(math.log(16), rel=1e-6)
    assert metrics.bits_per_char == pytest.approx(4.0, rel=1e-6)
    assert metrics.entropy == pytest.approx(math.log(16), rel=1e-6)
    assert metrics.accuracy == pytest.approx(np.mean(TOKENS[1:] == 0))  # all equal: the first wins


@pytest.mark.parametrize("training", [True, False])
def test_the_model_reads_in_eval_mode_and_gets_its_mode_back(training: bool) -> None:
    model = tiny_gpt().train(training)
    modes: list[bool] = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    evaluate_text(model, TOKENS[:40])
    assert set(modes) == {False}
    assert all(module.training is training for module in model.modules())


def test_the_mode_comes_back_after_a_failure_too() -> None:
    model = tiny_gpt().train()
    with pytest.raises(IndexError):
        evaluate_text(model, np.full(40, 99))
    assert model.training


def test_nothing_is_learned_and_no_dice_are_thrown() -> None:
    model = tiny_gpt()
    before = global_random_states()
    first = evaluate_text(model, TOKENS)
    assert evaluate_text(model, TOKENS) == first
    assert global_random_states() == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_without_anything_to_predict_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"^tokens must be at least two, got {length}$"):
        evaluate_text(tiny_gpt(), TOKENS[:length])
