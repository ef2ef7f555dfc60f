"""Tests of avatarl_env/text/ngram.py."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.text import ngram, ngram_counts
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


def logs(distributions: list[list[Fraction]]) -> np.ndarray:
    return np.log(np.array(distributions, dtype=np.float64))


def by_hand(text: list[int], vocab_size: int, order: int, history: list[int]) -> list[Fraction]:
    """The formula word for word, exact, with a dictionary and a scan of the whole text."""
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
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, list[list[int]], int]:
    """A text, its vocabulary, an order, rows to predict and the first position to predict."""
    vocab_size = draw(st.integers(1, 9))
    token = st.integers(0, vocab_size - 1)
    order = draw(st.integers(1, 5))
    text = draw(st.lists(token, min_size=order, max_size=40))
    width = draw(st.integers(1, 8))
    row = st.lists(token, min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    return text, vocab_size, order, rows, draw(st.integers(0, width - 1))


@given(cases())
def test_agrees_with_the_formula_done_naively(
    case: tuple[list[int], int, int, list[list[int]], int],
) -> None:
    text, vocab_size, order, rows, first = case
    model = NGramReference.fit(text, vocab_size, order)
    expected = logs(
        [by_hand(text, vocab_size, order, row[:t]) for row in rows for t in range(first, len(row))]
    ).reshape(len(rows), len(rows[0]) - first, vocab_size)
    actual = model.next_log_probs(rows, first)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.exp(actual.astype(np.float64)).sum(-1), 1.0, atol=1e-6)
    targets = np.array(rows)[:, first:]
    np.testing.assert_allclose(
        model.target_log_probs(rows, first),
        np.take_along_axis(expected, targets[:, :, None], axis=-1)[:, :, 0],
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
    model = NGramReference.fit(TEXT, V, order)
    assert model.order == order
    assert model.vocab_size == V
    actual = model.next_log_probs([[1, 0, 2, 0]])  # 2 was never seen, nor what follows it
    assert actual.dtype == np.float32
    assert actual.shape == (1, 4, V)
    np.testing.assert_allclose(actual[0], logs(expected), rtol=1e-6)


def test_a_context_that_only_ends_the_text_backs_off() -> None:
    model = NGramReference.fit([0, 1, 0, 0, 2], V, order=2)
    unigram = [Fraction(12, 24), Fraction(6, 24), Fraction(6, 24)]  # (c + 3/3) / 8
    np.testing.assert_allclose(
        model.next_log_probs([[2, 0]], first=1)[0], logs([unigram]), rtol=1e-6
    )


def test_target_log_probs_worked_by_hand() -> None:
    model = NGramReference.fit(TEXT, V, order=2)
    # p(1), p(0 | 1), p(2 | 0), p(0)
    expected = np.log(np.array([5 / 18, 29 / 36, 1 / 18, 11 / 18]))
    actual = model.target_log_probs([[1, 0, 2, 0]])
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual[0], expected, rtol=1e-6)


def test_evaluate_worked_by_hand() -> None:
    metrics = NGramReference.fit(TEXT, V, order=2).evaluate([1, 0, 1])
    # p(1), p(0 | 1), p(1 | 0); the most probable were 0, 0 and 0.
    predicted = [UNIGRAM, AFTER_1, AFTER_0]
    loss = -float(np.log([5 / 18, 29 / 36, 7 / 18]).sum()) / 3
    probs = np.array(predicted, dtype=np.float64)
    assert metrics.loss == pytest.approx(loss, rel=1e-12)
    assert metrics.bits_per_token == pytest.approx(loss / np.log(2), rel=1e-12)
    assert metrics.accuracy == pytest.approx(1 / 3)
    assert metrics.entropy == pytest.approx(-(probs * np.log(probs)).sum() / 3, rel=1e-12)


@pytest.fixture
def model_and_text() -> tuple[NGramReference, np.ndarray]:
    rng = np.random.default_rng(7)
    text = rng.integers(0, 12, 3000) * rng.integers(0, 2, 3000)
    return NGramReference.fit(text[:2000], 12, order=4), text[2000:]


def test_evaluate_does_not_depend_on_its_chunks(
    model_and_text: tuple[NGramReference, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = model_and_text
    whole = model.evaluate(text)
    for positions in (1, 2, 7, 999):
        monkeypatch.setattr(ngram, "_CELLS_PER_CHUNK", positions * 12)
        np.testing.assert_allclose(model.evaluate(text), whole, rtol=1e-12)


def test_evaluate_is_the_mean_of_the_log_probs(
    model_and_text: tuple[NGramReference, np.ndarray],
) -> None:
    model, text = model_and_text
    log_probs = model.next_log_probs(text[None])[0]
    metrics = model.evaluate(text)
    assert metrics.loss == pytest.approx(-float(model.target_log_probs(text[None]).mean()), 1e-5)
    assert metrics.accuracy == np.mean(log_probs.argmax(-1) == text)
    assert metrics.entropy == pytest.approx(-float((np.exp(log_probs) * log_probs).sum(-1).mean()))


@pytest.mark.parametrize("first", [1, 2, 3, 4, 9, 49])
def test_first_only_drops_the_rows_before_it(
    model_and_text: tuple[NGramReference, np.ndarray], first: int
) -> None:
    model, text = model_and_text
    rows = text[:200].reshape(4, 50)
    np.testing.assert_array_equal(
        model.next_log_probs(rows, first), model.next_log_probs(rows)[:, first:]
    )
    np.testing.assert_array_equal(
        model.target_log_probs(rows, first), model.target_log_probs(rows)[:, first:]
    )


def test_a_prediction_sees_the_last_tokens_before_it_and_nothing_else(
    model_and_text: tuple[NGramReference, np.ndarray],
) -> None:
    model, text = model_and_text
    rows = np.repeat(text[None, :20], 2, axis=0)
    rows[1, 10] = (rows[0, 10] + 1) % 12
    first, second = model.next_log_probs(rows)
    changed = np.any(first != second, axis=-1)
    assert not changed[:11].any()  # position 10 is predicted before it is seen
    assert changed[11]
    assert not changed[14:].any()  # order 4 looks back 3 tokens


def test_rows_do_not_touch_each_other(
    model_and_text: tuple[NGramReference, np.ndarray],
) -> None:
    model, text = model_and_text
    rows = text[:60].reshape(3, 20)
    together = model.next_log_probs(rows, 5)
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_array_equal(model.next_log_probs(row[None], 5)[0], expected)


def test_arguments_are_left_alone_and_tensors_are_welcome() -> None:
    rows = torch.tensor([[1, 0, 2, 0]])
    model = NGramReference.fit(torch.tensor(TEXT), V, order=2)
    kept = rows.clone()
    log_probs = model.next_log_probs(rows)
    np.testing.assert_array_equal(log_probs, model.next_log_probs(rows))
    assert torch.equal(rows, kept)


def test_memory_grows_with_the_text_and_not_with_the_vocabulary() -> None:
    vocab_size, order = 100_000, 6
    tokens = np.array([99_999, 0, 99_998] * 4)
    model = NGramReference.fit(tokens, vocab_size, order)
    # The n-grams of one length are at most the 12 positions; V**order would overflow int64.
    assert all(len(level.keys) <= 12 for level in model._levels)
    likely = model.target_log_probs(tokens[None], first=order)
    assert np.all(likely > np.log(0.9))
    assert model.next_log_probs(tokens[None, :7], first=6).argmax() == tokens[6]


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "order", "message"),
    [
        ([0, 1], 2, 0, "order must be at least 1, got 0"),
        ([0, 1], 0, 1, "vocab_size must be at least 1, got 0"),
        ([0, 1], 2, 3, "tokens must hold at least order = 3 tokens, got 2"),
        ([], 2, 1, "tokens must hold at least order = 1 tokens, got 0"),
        ([0, 2], 2, 1, r"tokens must lie in \[0, 2\), got values from 0 to 2"),
        ([[0, 1]], 2, 1, r"tokens must have 1 dimension\(s\), got shape \(1, 2\)"),
    ],
)
def test_fit_refuses(tokens: list[int], vocab_size: int, order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NGramReference.fit(tokens, vocab_size, order)


@pytest.mark.parametrize("method", ["next_log_probs", "target_log_probs"])
@pytest.mark.parametrize(
    ("tokens", "first", "error", "message"),
    [
        ([[0, 1]], 2, ValueError, r"first must lie in \[0, 2\), got 2"),
        ([[0, 1]], -1, ValueError, r"first must lie in \[0, 2\), got -1"),
        ([0, 1], 0, ValueError, r"tokens must have 2 dimension\(s\), got shape \(2,\)"),
        ([[0, -1]], 0, ValueError, r"tokens must lie in \[0, 3\), got values from -1 to 0"),
        ([[0.5]], 0, TypeError, "tokens must be integers, got dtype float64"),
    ],
)
def test_scoring_refuses(
    method: str, tokens: list[list[int]], first: int, error: type[Exception], message: str
) -> None:
    model = NGramReference.fit(TEXT, V, order=2)
    with pytest.raises(error, match=message):
        getattr(model, method)(tokens, first)


def test_evaluate_refuses_an_empty_text() -> None:
    with pytest.raises(ValueError, match="tokens must hold at least one token, got none"):
        NGramReference.fit(TEXT, V, order=2).evaluate([])


DATA_DIR = Path(os.environ.get("AVATARL_DATA_DIR") or "nowhere")


@pytest.mark.skipif(
    not (DATA_DIR / "tinyshakespeare" / "input.txt").is_file(),
    reason="AVATARL_DATA_DIR holds no tinyshakespeare/input.txt",
)
@pytest.mark.parametrize(
    ("order", "loss", "accuracy"),
    [(2, 2.486, 0.270), (3, 2.049, 0.381), (4, 1.774, 0.472), (5, 1.669, 0.527)],
)
def test_reference_figures_of_tinyshakespeare(order: int, loss: float, accuracy: float) -> None:
    text = load_corpus("tinyshakespeare", data_dir=DATA_DIR).text
    ids = CharTokenizer.from_text(text).encode(text)
    counted = len(ids) * 9 // 10
    metrics = NGramReference.fit(ids[:counted], 66, order).evaluate(ids[counted:])
    assert metrics.loss == pytest.approx(loss, abs=0.001)
    assert metrics.accuracy == pytest.approx(accuracy, abs=0.001)


# --- large vocabularies, and what is kept ready --------------------------------------------------


def test_a_vocabulary_as_large_as_gpt2s_takes_little_time_and_memory() -> None:
    """By hand: 9 and 50,256 in turn, 500 times each, so that p(9 | 50256) is known."""
    vocab_size = 50_257
    text = np.tile([9, 50_256], 500)
    tracemalloc.start()
    try:
        model = NGramReference.fit(text, vocab_size, order=2)
        log_q = model.target_log_probs([[50_256, 9, 7]], first=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    unigram = (500 + 2 / vocab_size) / 1002
    unseen = 2 / vocab_size / 1002  # 7 was never seen
    expected = [(499 + unigram) / 500, (0 + unseen) / 501]  # after 50,256 and after 9
    assert log_q[0] == pytest.approx(np.log(expected), rel=1e-6)
    whole = model.next_log_probs([[50_256, 9, 7]], first=1)
    assert whole.shape == (1, 2, vocab_size)
    assert whole[0, [0, 1], [9, 7]] == pytest.approx(log_q[0], rel=1e-6)
    assert np.exp(whole.astype(np.float64)).sum(-1) == pytest.approx(np.ones((1, 2)), abs=1e-5)
    assert model.evaluate(text[:50]).loss == pytest.approx(
        -float(model.target_log_probs(text[None, :50]).mean()), rel=1e-5
    )


@pytest.mark.parametrize("kept", [1, 12, 13 * 12, 80 * 12, 10**7])
def test_what_is_kept_ready_changes_no_bit(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    text = rng.integers(0, 12, 3000) * rng.integers(0, 2, 3000)
    rows = rng.integers(0, 12, (5, 20))
    rows[:3] = text[2000:2060].reshape(3, 20)
    monkeypatch.setattr(ngram_counts, "_CELLS_KEPT", 0)
    bare = NGramReference.fit(text[:2000], 12)
    monkeypatch.setattr(ngram_counts, "_CELLS_KEPT", kept)
    model = NGramReference.fit(text[:2000], 12)
    assert len(model._first_ready) == {1: 1, 12: 1, 13 * 12: 2, 80 * 12: 2}.get(kept, 5)
    for first in (0, 1, 2, 3, 4, 5, 19):
        assert np.array_equal(model.next_log_probs(rows, first), bare.next_log_probs(rows, first))
