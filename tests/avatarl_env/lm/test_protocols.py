"""Tests of avatarl_env/lm/protocols.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from torch import nn

from avatarl_env.lm.hub import HubLM, HubTokenizer
from avatarl_env.lm.protocols import as_causal_lm, as_tokenizer, count_characters, encode
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.fakes import tiny_gpt
from tests.foreign import TOKENIZERS, Homemade, Pairs, hub_model


@pytest.mark.parametrize(
    ("n_logits", "n_tokens", "fits"),
    [
        (15, 14, False),
        (13, 14, False),
        (1024, 1023, False),
        (1152, 1025, True),  # the next multiple of 128
        (1153, 1025, False),
        (51_200, 50_295, True),  # within two per cent
        (51_301, 50_295, False),
    ],
)
def test_padding_is_cut_off_within_bounds(n_logits: int, n_tokens: int, fits: bool) -> None:
    model = HubLM(hub_model("gpt2", 14), vocab_size=n_logits)
    if fits:
        found = as_causal_lm(model, n_tokens)
        assert found.vocab_size == n_tokens
        assert (found.model, found.context) == (model.model, model.context)
    else:
        with pytest.raises(ValueError, match=f"tokenizer .* {n_logits} tokens, got {n_tokens}"):
            as_causal_lm(model, n_tokens)


def headless(kind: str) -> nn.Module:
    config = hub_model("gpt2", 14).config
    config.pad_token_id = 0
    model: nn.Module = getattr(transformers, kind)(config)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_gpt(vocab_size=15), "model's 15 tokens, got 14"),
        (lambda: Homemade(13), "model's 13 tokens, got 14"),
        (lambda: headless("GPT2Model"), "output head .* got GPT2Model"),
        (lambda: headless("GPT2ForSequenceClassification"), "output head .* got GPT2ForSequence"),
        (lambda: nn.Linear(2, 2), "must have .*, got Linear: .* no attribute 'context'"),
        (lambda: "gpt2", "model must be a torch module, got str"),
    ],
)
def test_other_models_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_causal_lm(make(), 14)


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer must have .*, got str: .* 'decode'"):
        as_tokenizer("abc")


class Odd(Pairs):
    """A tokenizer that returns a given answer."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer = answer

    def encode(self, text: str) -> Any:
        return self._answer


def test_tokens_are_checked() -> None:
    assert encode(Odd([3, 0, 168]), "x").tolist() == [3, 0, 168]
    assert encode(Odd(np.array([3], dtype=np.uint8)), "x").dtype == np.int64
    for answer, message in (
        ([1, 169], "169 tokens, got ids from 1 to 169"),
        ([5, -1], "got ids from -1 to 5"),
        ([[1, 2]], r"got int64 of shape \(1, 2\)"),
        ([0.5, 1.0], r"got float64 of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"tokenizer must encode .*{message}"):
            encode(Odd(answer), "x")


def test_special_tokens_are_neither_added_nor_counted() -> None:
    inner = TOKENIZERS["bytes"]()
    tokenizer = HubTokenizer(inner)
    assert inner.eos_token_id not in tokenizer.encode("aeio")
    end = np.array([[inner.eos_token_id] * 3])
    assert count_characters(tokenizer, end).tolist() == [0.0]
    rows = np.zeros((2, 5), dtype=np.int64)
    assert count_characters(CharTokenizer.from_text("ab"), rows).tolist() == [5.0] * 2
    assert count_characters(Pairs(), rows).tolist() == [10.0] * 2
