"""The default score of texts that try to exploit it, on real corpora."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from avatarl_env.episode import COLLISION_MARGIN, ENTROPY_RANGE
from avatarl_env.lm.generation import inverse_cdf
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.patient import Patient
from avatarl_env.scoring import Generations, Score, measure_many
from avatarl_env.scoring.reference import Array, TextReference, encode_corpus
from avatarl_env.text.corpus import load_corpus
from avatarl_env.text.ngram import NGramReference

pytestmark = pytest.mark.slow
N_ROWS, N_PROMPT, N_NEW = 32, 32, 48
Writer = Callable[[np.ndarray], Array]
"""From texts (B, T) to the log-probabilities of what comes next, (B, V)."""


class Stage(NamedTuple):
    """A corpus, an honest model of it, prompts and sampling noise."""

    tokenizer: CharTokenizer
    reference: TextReference
    honest: Writer
    prompts: np.ndarray
    uniforms: np.ndarray


def ngram_writer(ngram: NGramReference) -> Writer:
    def write(texts: np.ndarray) -> Array:
        row = np.concatenate([texts[:, -ngram.order :], texts[:, :1]], axis=1)  # the last is unread
        return ngram.next_log_probs(row, ngram.order)[:, 0].astype(np.float64)

    return write


def network_writer(model: nn.Module) -> Writer:
    @torch.no_grad()
    def write(texts: np.ndarray) -> Array:
        return torch.log_softmax(model(torch.from_numpy(texts))[:, -1].double(), -1).numpy()

    return write


def tempered(writer: Writer, temperature: float) -> Writer:
    def write(texts: np.ndarray) -> Array:
        return torch.log_softmax(torch.from_numpy(writer(texts) / temperature), -1).numpy()

    return write


def looping(tokens: np.ndarray, vocab_size: int, slip: float) -> Writer:
    """Repeat the same tokens, with a random error now and then."""

    def write(texts: np.ndarray) -> Array:
        p = np.full((len(texts), vocab_size), slip / (vocab_size - 1))
        p[:, tokens[(texts.shape[1] - N_PROMPT) % len(tokens)]] = 1 - slip
        with np.errstate(divide="ignore"):
            return np.log(p)

    return write


def constant(p: np.ndarray) -> Writer:
    return lambda texts: np.tile(np.log(p / p.sum()), (len(texts), 1))


def terms_of(stage: Stage, writer: Writer) -> dict[str, float]:
    """Let a writer continue the prompts; its held-out loss is that of their second half."""
    texts, distributions = stage.prompts, []
    for column in stage.uniforms.T[:, :, None]:
        distributions.append(writer(texts))
        token = inverse_cdf(torch.from_numpy(distributions[-1]), torch.from_numpy(column))
        texts = np.concatenate([texts, token.numpy()], axis=1)
    rows, losses = np.arange(N_ROWS), np.zeros(N_ROWS)
    for t in range(N_PROMPT // 2, N_PROMPT):
        losses -= writer(stage.prompts[:, :t])[rows, stage.prompts[:, t]] / (N_PROMPT // 2)
    generations = Generations(texts, N_PROMPT, np.stack(distributions, axis=1), losses)
    ((_, terms),) = measure_many(generations, stage.reference)
    return terms


@pytest.fixture(scope="module", params=["playwright", "tinyshakespeare"])
def stage(request: pytest.FixtureRequest) -> Stage:
    """The embedded corpus with the bundled patient; real plays with a trigram model."""
    if request.param == "playwright":
        patient = Patient.load("bundled")
        tokenizer, splits, reference = patient.tokenizer, patient.splits, patient.reference
        honest = network_writer(patient.model)
    else:
        if not Path(os.environ.get("AVATARL_DATA_DIR", ""), request.param, "input.txt").is_file():
            pytest.skip("AVATARL_DATA_DIR holds no tinyshakespeare/input.txt")
        corpus = load_corpus(request.param)
        tokenizer = CharTokenizer.from_text(corpus.split("train"))
        splits, reference = encode_corpus(corpus, tokenizer)
        honest = ngram_writer(NGramReference.fit(splits["train"], tokenizer.vocab_size, order=3))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(splits["surgeon"]) - N_PROMPT, (N_ROWS, 1))
    prompts = splits["surgeon"][starts + np.arange(N_PROMPT)]
    return Stage(tokenizer, reference, honest, prompts, rng.random((N_ROWS, N_NEW)))


HACKS = ("the the the", "the the the, with slips", "gibberish", "common letters", "flattened")
"""Texts that no reader would take for real, and a change that makes the honest model worse."""


def writers(stage: Stage) -> dict[str, Writer]:
    n_tokens = stage.tokenizer.vocab_size
    loop = stage.tokenizer.encode("the ")
    letters = np.bincount(stage.prompts.ravel(), minlength=n_tokens) + 0.1
    own = ngram_writer(stage.reference.ngram)
    return {
        "reference": own,
        "sharpened reference": tempered(own, 0.2),
        "honest": stage.honest,
        "sharpened": tempered(stage.honest, 0.2),
        "mildly sharpened": tempered(stage.honest, 0.7),
        "flattened": tempered(stage.honest, 3.0),
        "the the the": looping(loop, n_tokens, 0.0),
        "the the the, with slips": looping(loop, n_tokens, 0.05),
        "gibberish": constant(np.ones(n_tokens)),
        "common letters": constant(letters),
    }


@pytest.fixture(scope="module")
def terms(stage: Stage) -> dict[str, dict[str, float]]:
    return {name: terms_of(stage, writer) for name, writer in writers(stage).items()}


def survives(found: dict[str, float], healthy: dict[str, float]) -> bool:
    """Whether an operation with these terms would continue."""
    low, high = (share * healthy["entropy"] for share in ENTROPY_RANGE)
    repeats = found["collision_l2"] > healthy["collision_l2"] + COLLISION_MARGIN
    return low <= found["entropy"] <= high and not repeats


def test_all_others_score_below_the_reference_itself(
    terms: dict[str, dict[str, float]],
) -> None:
    score = Score()
    best = score(terms["reference"])
    assert best == pytest.approx(0, abs=1e-6)
    others = [score(found) for name, found in terms.items() if name != "reference"]
    assert len(others) == 9
    assert max(others) < best - 0.3


@pytest.mark.parametrize("name", HACKS)
def test_hacks_score_below_an_honest_model(name: str, terms: dict[str, dict[str, float]]) -> None:
    score = Score()
    assert score(terms[name]) < score(terms["honest"]) - 0.1


def test_extreme_sharpening_flatlines_and_raises_the_held_out_loss(
    terms: dict[str, dict[str, float]],
) -> None:
    """The default score alone would not: a model less certain than its reference gains."""
    honest, sharp = terms["honest"], terms["sharpened"]
    assert survives(honest, honest)
    assert not survives(sharp, honest)
    assert sharp["heldout_loss"] > honest["heldout_loss"] + 1
    both = Score({"kl_ref": 1.0, "heldout_loss": 1.0})
    assert both(sharp) < both(honest)


def test_mild_sharpening_raises_the_default_score_and_the_held_out_loss(
    terms: dict[str, dict[str, float]],
) -> None:
    """The known weakness of the default score: a commit therefore checks both."""
    honest, sharp = terms["honest"], terms["mildly sharpened"]
    assert survives(sharp, honest)
    assert Score()(sharp) > Score()(honest) + 0.1
    assert sharp["heldout_loss"] > honest["heldout_loss"] + 0.05
