"""Tests of avatarl_env/scoring."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from avatarl_env.lm.generation import Generation
from avatarl_env.scoring import BOUND, TERMS, Generations, Score, Term, measure_many
from avatarl_env.scoring.generations import as_generations
from avatarl_env.scoring.reference import (
    LARGEST_VOCABULARY,
    Array,
    TextReference,
)
from avatarl_env.scoring.terms import (
    collision_l2,
    distinct,
    entropy,
    kl_ref,
    ref_loglik,
)
from tests.patients import tiny_patient

HALF = math.log(0.5)
LN_2 = math.log(2.0)


@pytest.fixture(scope="module")
def coin() -> TextReference:
    """Text 0001, no context: Witten-Bell gives 0 (3 + 2/2) / (4 + 2) = 2/3, and 1 1/3.

    Its trigrams are 000 and 001, each half of them.
    """
    return TextReference(np.array([0, 0, 0, 1]), vocab_size=2, order=1)


@pytest.fixture(scope="module")
def tongue() -> TextReference:
    """The reference of the tests' made-up language."""
    return tiny_patient().reference


def writing(
    new_tokens: object,
    distributions: object = None,
    prompt_loss: object = None,
    vocab_size: int = 2,
) -> Generations:
    """Return generations after prompts of two tokens; distributions are uniform by default."""
    new = np.asarray(new_tokens, dtype=np.int64)
    shape = (*new.shape, vocab_size)
    log_p = np.full(shape, -math.log(vocab_size)) if distributions is None else distributions
    log_p = np.broadcast_to(np.asarray(log_p, dtype=np.float64), shape)
    return Generations(
        tokens=np.concatenate([np.zeros((len(new), 2), dtype=np.int64), new], axis=1),
        n_prompt=2,
        distributions=log_p,
        prompt_loss=np.ones(len(new)) if prompt_loss is None else np.asarray(prompt_loss, float),
    )


def measure_terms(
    generations: Generations, reference: TextReference, terms: dict[str, Term] | None = None
) -> dict[str, float]:
    """Return the terms of one operation."""
    ((_, values),) = measure_many(generations, reference, terms=terms)
    return values


def logs(*probabilities: float) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


# --- kl_ref --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        # q = (2/3, 1/3)
        ((0.5, 0.5), 0.5 * math.log(8 / 9)),  # 1/2 log 4/3 + 1/2 log 2/3 = -0.0589
        ((1.0, 0.0), math.log(2 / 3)),  # -0.4055: nothing comes from where p is zero
        ((0.0, 1.0), math.log(1 / 3)),
        ((2 / 3, 1 / 3), 0.0),
        ((1 / 3, 2 / 3), -LN_2 / 3),  # 1/3 log 2 + 2/3 log 1/2
    ],
)
def test_kl_ref_by_hand(p: tuple[float, float], expected: float, coin: TextReference) -> None:
    value = kl_ref(writing([[0, 1, 1]], logs(*p)), coin)
    assert value.shape == (1,)
    assert value[0] == pytest.approx(expected, abs=1e-7)


# --- the other terms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_tokens", "expected"),
    [
        ([[0, 0, 0, 0, 0, 0]], 1 / 3),  # 0000 three times
        ([[0, 1, 0, 1, 0]], 1.0),  # 0101, 1010
        ([[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]], 0.5),  # the same again: counted over the batch
        ([[0, 0, 0, 0], [1, 1, 1, 1]], 1.0),  # 4-grams do not cross rows
    ],
)
def test_distinct_by_hand(
    new_tokens: list[list[int]], expected: float, coin: TextReference
) -> None:
    assert distinct(writing(new_tokens), coin).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # q(000) = q(001) = 1/2, sum of squares 1/2
        ([[0, 0, 0], [0, 0, 1]], 0 - 1.0 + 0.5),
        ([[0, 0, 0], [0, 0, 0]], 1 - 1.0 + 0.5),
        ([[1, 1, 1], [1, 1, 1]], 1 - 0.0 + 0.5),  # a trigram beyond all that were seen
        ([[0, 1, 0], [0, 1, 0], [0, 0, 1]], 2 / 6 - 2 / 6 + 0.5),  # and one between them
        ([[0, 0, 0, 1]], 0 - 1.0 + 0.5),  # overlapping, in one row
    ],
)
def test_trigram_distance_by_hand(
    rows: list[list[int]], expected: float, coin: TextReference
) -> None:
    assert coin.trigram_distance(np.array(rows)) == pytest.approx(1000 * expected)
    assert collision_l2(writing(rows), coin).tolist() == [coin.trigram_distance(np.array(rows))]


@pytest.mark.parametrize("n", [2, 5])
def test_trigram_distance_is_unbiased_by_enumeration(n: int, coin: TextReference) -> None:
    """All 2^n samples of n trigrams, each as probable as any other."""
    trigrams = ([0, 0, 0], [0, 0, 1])
    samples = [coin.trigram_distance(np.array(s)) for s in itertools.product(trigrams, repeat=n)]
    assert np.mean(samples) == pytest.approx(0, abs=1e-9)
    assert np.std(samples) > 100


# --- measure_terms -------------------------------------------------------------------------------


def test_terms_are_means_of_every_measure(coin: TextReference) -> None:
    text = writing([[0, 0, 0, 1], [0, 1, 0, 0]], logs(0.25, 0.75), [1.0, 2.0])
    terms = measure_terms(text, coin)
    assert terms == {
        "kl_ref": pytest.approx(0.25 * math.log(8 / 3) + 0.75 * math.log(4 / 9)),
        "heldout_loss": 1.5,
        "distinct": 1.0,
        # 000, 001, 010, 100 once each: no collision, cross 1/4 + ... = (1/2 + 1/2) / 4
        "collision_l2": pytest.approx(1000 * (0 - 0.5 + 0.5)),
        "ref_loglik": pytest.approx((6 * math.log(2 / 3) + 2 * math.log(1 / 3)) / 8),
        "entropy": pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3)),
    }
    assert all(type(value) is float for value in terms.values())
    assert not text.has_nan


@pytest.mark.parametrize("where", ["everywhere", "once"])
def test_nan_becomes_the_worst_value(where: str, coin: TextReference) -> None:
    log_p = np.full((2, 4, 2), math.nan if where == "everywhere" else HALF)
    log_p[1, 2, 0] = math.nan
    text = writing([[0, 0, 0, 1], [0, 1, 0, 0]], log_p, [math.nan, 1.0])
    assert text.has_nan
    terms = measure_terms(text, coin)
    assert terms["kl_ref"] == -BOUND
    assert terms["entropy"] == -BOUND
    assert terms["heldout_loss"] == BOUND  # less is better
    assert all(math.isfinite(value) for value in terms.values())


def test_terms_of_many_operations_at_once_are_those_of_each_to_the_last_bit(
    tongue: TextReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own term is given the texts of one operation."""
    seen: list[int] = []

    def count(text: Generations, reference: TextReference) -> Array:
        seen.append(len(text.tokens))
        return np.array([float(text.tokens.sum())])

    monkeypatch.setitem(TERMS, "mine", Term(count, 1.0))
    rng = np.random.default_rng(8)
    n_words = tongue.vocab_size
    log_p = np.log(rng.dirichlet(np.full(n_words, 0.3), size=(12, 7)))
    log_p[3, 2] = math.nan
    log_p[5, 1, 4] = -math.inf
    new = rng.integers(0, n_words, (12, 7))
    text = writing(new, log_p, rng.random(12), n_words)
    for i, (part, terms) in enumerate(measure_many(text, tongue, 3)):
        assert part.tokens.tolist() == text.tokens[4 * i : 4 * i + 4].tolist()
        assert terms == measure_terms(part, tongue)
    assert seen == [4] * 6


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ([1.0, 2.0], r"list of shape \(2,\)"),  # one for each operation
        (np.ones((4, 3)), r"ndarray of shape \(4, 3\)"),
        (1.0, r"float of shape \(\)"),
        ([[1.0], [1.0, 2.0]], "list: .*"),
    ],
)
def test_the_result_of_a_term_by_row_is_checked(
    returned: object, found: str, coin: TextReference
) -> None:
    terms = {"mine": Term(lambda text, reference: returned, 1.0, by_row=True)}
    text = writing([[0, 0, 0, 1]] * 4)
    rule = r"^score term 'mine' must return numbers of shape \(4,\), got "
    for n in (1, 2):
        with pytest.raises(ValueError, match=f"{rule}{found}$") as caught:
            measure_many(text, coin, n, terms)
        assert "\n" not in str(caught.value)


# --- large vocabularies --------------------------------------------------------------------------


def frugal(new: object, log_probs: object, entropies: object) -> Generations:
    """Return generations without distributions."""
    return dataclasses.replace(
        writing(new),
        distributions=None,
        log_probs=np.asarray(log_probs, dtype=float),
        entropies=np.asarray(entropies, dtype=float),
    )


def test_kl_ref_is_the_sampled_log_ratio_where_no_distributions_are_kept(
    coin: TextReference,
) -> None:
    """q = (2/3, 1/3)."""
    text = frugal([[0, 1], [1, 1]], [logs(0.5, 0.5), logs(0.9, 0.1)], np.ones((2, 2)))
    expected = [math.log(8 / 9) / 2, math.log(1 / 3 / 0.9 * (1 / 3 / 0.1)) / 2]
    assert kl_ref(text, coin) == pytest.approx(expected, abs=1e-6)


def test_nats_are_divided_by_the_training_texts_characters_per_token() -> None:
    """Two characters a token: two tokens are four of them."""
    coin = TextReference(np.array([0, 0, 0, 1]), 2, order=1, characters_per_token=2.0)
    text = frugal([[0, 1], [1, 1]], np.zeros((2, 2)), [[1.0, 2.0], [0.5, 0.0]])
    assert entropy(text, coin).tolist() == [0.75, 0.125]
    expected = [math.log(2 / 9) / 4, math.log(1 / 9) / 4]
    for measure in (kl_ref, ref_loglik):
        assert measure(text, coin) == pytest.approx(expected, abs=1e-6)
    whole = writing([[0, 1]], logs(0.5, 0.5))
    assert kl_ref(whole, coin) == pytest.approx([0.25 * math.log(8 / 9)], abs=1e-7)
    assert entropy(whole, coin) == pytest.approx([LN_2 / 2])


@pytest.mark.parametrize("vocab_size", [50_257, 152_064, LARGEST_VOCABULARY])
def test_ngrams_of_large_vocabularies_are_distinguished(vocab_size: int) -> None:
    """`V ** 4` is beyond 63 bits from 55,109 tokens on; 2**21 wraps round to zero."""
    reference = TextReference(np.arange(5), vocab_size)
    last = vocab_size - 1
    rows = [[last - 4, 1, 2, 3], [last, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [last, 1, 2, 4]]
    assert distinct(writing(rows), reference).tolist() == [4 / 5]
    rows = [[last - 4, 1, 2, 3], [last, 1, 2, 4], [0, 1, 2, 3], [last, 0, 3, 4], [0, 7, 8, 9]]
    trigrams = Counter(tuple(row[i : i + 3]) for row in rows for i in range(2))
    seen = [trigrams[i, i + 1, i + 2] for i in range(3)]  # 012, 123, 234: a third each
    pairs = sum(n * (n - 1) for n in trigrams.values())
    collision = 1000 * (pairs / 90 - 2 * sum(seen) / 30 + 1 / 3)
    assert reference.trigram_distance(np.array(rows)) == pytest.approx(collision)


def test_a_vocabulary_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at most 2097152, got 2097153"):
        TextReference(np.arange(5), LARGEST_VOCABULARY + 1)


# --- Score ---------------------------------------------------------------------------------------

SOME_TERMS = {
    "kl_ref": -0.5,
    "heldout_loss": 1.5,
    "distinct": 0.75,
    "collision_l2": 2.0,
    "ref_loglik": -2.5,
    "entropy": 1.25,
}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, -0.5),
        ({"kl_ref": 2.0}, -1.0),
        ({"kl_ref": 1, "heldout_loss": 1}, -2.0),  # a loss counts against
        ({"distinct": 1.0, "entropy": -1.0, "ref_loglik": 0.5}, 0.75 - 1.25 - 1.25),
        ({"kl_ref": np.float32(0.5)}, -0.25),
    ],
)
def test_score_is_the_weighted_sum_in_which_more_is_better(
    weights: dict[str, float] | None, expected: float
) -> None:
    value = Score(weights)(SOME_TERMS)
    assert value == expected
    assert type(value) is float


# --- generations and the corpus -------------------------------------------------------------------


class Words:
    """Token i decodes to i letters."""

    vocab_size = 10

    def encode(self, text: str) -> np.ndarray:
        return np.zeros(len(text), dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return "".join("x" * int(i) for i in ids)


def test_generations_by_hand() -> None:
    """Two operations of one prompt; prompts 1 2 and 1 4, of which the second token counts."""
    tokens = torch.tensor([[1, 2, 3, 1], [1, 4, 0, 0]])
    log_probs = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]])
    entropies = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    generation = Generation(tokens, log_probs, None, entropies)
    generations = as_generations(Words(), generation, torch.tensor([[3.0], [2.0]]), 2)
    assert generations.n_prompt == 2
    assert generations.prompt_loss.tolist() == [1.5, 0.5]
    assert generations.distributions is None
    first, second = generations.split(2)
    assert first.new_tokens.tolist() == [[3, 1]]
    assert second.prompt_loss.tolist() == [0.5]
    assert second.entropies.tolist() == [[0.5, 0.0]]
    assert second.n_prompt == 2
