"""Tests of avatarl_env/text/ngram.py and ngram_counts.py."""

from __future__ import annotations

import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.text.corpus import load_corpus
from avatarl_env.text.ngram import NGramReference

V = 3
TEXT = [0, 1, 0, 0]
# Order 1: c = (3, 1, 0), 2 distinct of 4, so p = (c + 2/3) / 6.
UNIGRAM = [Fraction(11, 18), Fraction(5, 18), Fraction(2, 18)]
# After 0 came 1 and 0, once each: p = (c + 2 * unigram) / 4.
AFTER_0 = [Fraction(5, 9), Fraction(7, 18), Fraction(1, 18)]
# After 1 came 0, once: p = (c + unigram) / 2.
AFTER_1 = [Fraction(29, 36), Fraction(5, 36), Fraction(2, 36)]
# After 1 0 came 0, once: p = (c + after 0) / 2.
AFTER_1_0 = [Fraction(14, 18), Fraction(7, 36), Fraction(1, 36)]
Case = tuple[list[int], int, int, list[list[int]], int]


def logs(distributions: list[list[Fraction]]) -> np.ndarray:
    return np.log(np.array(distributions, dtype=np.float64))


def by_hand(text: list[int], vocab_size: int, order: int, history: list[int]) -> list[Fraction]:
    """Compute the formula exactly, with a dictionary and a scan of the whole text."""
    probs = [Fraction(1, vocab_size)] * vocab_size
    for k in range(min(order, len(history) + 1)):
        context = history[len(history) - k :]
        followers = Counter(text[i + k] for i in range(len(text) - k) if text[i : i + k] == context)
        total, distinct = followers.total(), len(followers)
        if total:
            probs = [
                (followers[a] + distinct * probs[a]) / (total + distinct) for a in range(vocab_size)
            ]
    return probs


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A text, its vocabulary, an order, rows to predict and the first position to predict."""
    vocab_size = draw(st.integers(1, 9))
    token = st.integers(0, vocab_size - 1)
    order = draw(st.integers(1, 5))
    text = draw(st.lists(token, min_size=order, max_size=40))
    width = draw(st.integers(1, 8))
    row = st.lists(token, min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    return text, vocab_size, order, rows, draw(st.integers(0, width - 1))


@given(cases(), st.sampled_from([0, 30, 10**6]))
@example(([0, 1, 0, 0, 2], V, 2, [[2, 0]], 1), 0)  # a context that only ends the text
def test_predictions_follow_the_formula(case: Case, ready_cells: int) -> None:
    text, vocab_size, order, rows, first = case
    model = NGramReference.fit(text, vocab_size, order, ready_cells=ready_cells)
    assert (model.order, model.vocab_size) == (order, vocab_size)
    expected = logs(
        [by_hand(text, vocab_size, order, row[:t]) for row in rows for t in range(first, len(row))]
    ).reshape(len(rows), len(rows[0]) - first, vocab_size)
    found = model.next_log_probs(rows, first)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1.0, atol=1e-6)
    targets = np.array(rows)[:, first:, None]
    np.testing.assert_allclose(
        model.target_log_probs(rows, first),
        np.take_along_axis(expected, targets, axis=-1)[:, :, 0],
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (1, [UNIGRAM, UNIGRAM, UNIGRAM, UNIGRAM]),
        (2, [UNIGRAM, AFTER_1, AFTER_0, UNIGRAM]),
        (3, [UNIGRAM, AFTER_1, AFTER_1_0, UNIGRAM]),
    ],
)
def test_distributions_worked_by_hand(order: int, expected: list[list[Fraction]]) -> None:
    """Tensors are accepted and not changed; token 2 and its followers were never seen."""
    rows = torch.tensor([[1, 0, 2, 0]])
    model = NGramReference.fit(torch.tensor(TEXT), V, order)
    np.testing.assert_allclose(model.next_log_probs(rows)[0], logs(expected), rtol=1e-6)
    assert rows.tolist() == [[1, 0, 2, 0]]


def test_evaluate_worked_by_hand() -> None:
    metrics = NGramReference.fit(TEXT, V, order=2).evaluate([1, 0, 1])
    # p(1), p(0 | 1), p(1 | 0); the most probable were 0, 0 and 0.
    loss = -float(np.log([5 / 18, 29 / 36, 7 / 18]).sum()) / 3
    probs = np.array([UNIGRAM, AFTER_1, AFTER_0], dtype=np.float64)
    assert metrics.loss == pytest.approx(loss, rel=1e-12)
    assert metrics.bits_per_token == pytest.approx(loss / np.log(2), rel=1e-12)
    assert metrics.accuracy == pytest.approx(1 / 3)
    assert metrics.entropy == pytest.approx(-(probs * np.log(probs)).sum() / 3, rel=1e-12)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5, 19])
@pytest.mark.parametrize("ready_cells", [12, 13 * 12, 10**7])
def test_precomputation_rows_and_first_change_no_bit(ready_cells: int, first: int) -> None:
    rng = np.random.default_rng(7)
    text = rng.integers(0, 12, 3000) * rng.integers(0, 2, 3000)
    rows = rng.integers(0, 12, (5, 20))
    rows[:3] = text[2000:2060].reshape(3, 20)
    bare = NGramReference.fit(text[:2000], 12, ready_cells=0)
    model = NGramReference.fit(text[:2000], 12, ready_cells=ready_cells)
    found, targets = model.next_log_probs(rows, first), model.target_log_probs(rows, first)
    assert np.array_equal(found, bare.next_log_probs(rows)[:, first:])
    assert np.array_equal(targets, bare.target_log_probs(rows)[:, first:])
    for row in range(5):
        assert np.array_equal(model.next_log_probs(rows[row, None], first)[0], found[row])


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "order", "message"),
    [
        ([0, 1], 2, 0, "order .* 0"),
        ([0, 1], 0, 1, "vocab_size .* 0"),
        ([0, 1], 2, 3, "tokens .* order = 3 tokens, got 2"),
        ([0, 2], 2, 1, r"tokens .*\[0, 2\), .* 0 to 2"),
        ([[0, 1]], 2, 1, r"tokens .* 1 dimension.* \(1, 2\)"),
    ],
)
def test_fit_refuses(tokens: list[int], vocab_size: int, order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NGramReference.fit(tokens, vocab_size, order)


@pytest.mark.parametrize("method", ["next_log_probs", "target_log_probs"])
@pytest.mark.parametrize(
    ("tokens", "first", "error", "message"),
    [
        ([[0, 1]], 2, ValueError, r"first .*\[0, 2\), got 2"),
        ([[0, 1]], -1, ValueError, r"first .*\[0, 2\), got -1"),
        ([0, 1], 0, ValueError, r"tokens .* 2 dimension.* \(2,\)"),
        ([[0, -1]], 0, ValueError, r"tokens .*\[0, 3\), .* -1 to 0"),
        ([[0.5]], 0, TypeError, "tokens .* float64"),
    ],
)
def test_scoring_refuses(
    method: str, tokens: list[list[int]], first: int, error: type[Exception], message: str
) -> None:
    model = NGramReference.fit(TEXT, V, order=2)
    with pytest.raises(error, match=message):
        getattr(model, method)(tokens, first)
    with pytest.raises(ValueError, match=r"tokens .* at least one"):
        model.evaluate([])


DATA_DIR = Path(os.environ.get("AVATARL_DATA_DIR") or "nowhere")


@pytest.mark.skipif(
    not (DATA_DIR / "tinyshakespeare" / "input.txt").is_file(),
    reason="AVATARL_DATA_DIR holds no tinyshakespeare/input.txt",
)
@pytest.mark.parametrize(("order", "loss", "accuracy"), [(2, 2.486, 0.270), (5, 1.669, 0.527)])
def test_reference_figures_of_tinyshakespeare(order: int, loss: float, accuracy: float) -> None:
    text = load_corpus("tinyshakespeare", data_dir=DATA_DIR).text
    ids = CharTokenizer.from_text(text).encode(text)
    counted = len(ids) * 9 // 10
    metrics = NGramReference.fit(ids[:counted], 66, order).evaluate(ids[counted:])
    assert metrics.loss == pytest.approx(loss, abs=0.001)
    assert metrics.accuracy == pytest.approx(accuracy, abs=0.001)
