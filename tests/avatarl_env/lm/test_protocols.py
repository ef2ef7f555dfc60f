"""Tests of avatarl_env/lm/interface.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from avatarl_env.lm.hub import HubLM, HubTokenizer
from avatarl_env.lm.protocols import as_causal_lm, as_tokenizer, count_characters, encode
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.avatarl_env.surgery.edits import refused
from tests.fakes import tiny_gpt
from tests.foreign import TOKENIZERS, Homemade, Pairs, hub_model


def test_what_fits_is_taken_as_it_is() -> None:
    for tokenizer in (CharTokenizer.from_text("ab"), Pairs(), HubTokenizer(TOKENIZERS["bpe"]())):
        assert as_tokenizer(tokenizer) is tokenizer
    for model in (tiny_gpt(vocab_size=14), Homemade(14), HubLM(hub_model("gpt2", 14))):
        assert as_causal_lm(model, 14) is model


def test_what_transformers_makes_is_wrapped_and_shared() -> None:
    tokenizer, model = TOKENIZERS["bpe"](), hub_model("llama", 60)
    assert as_tokenizer(tokenizer).tokenizer is tokenizer
    wrapped = as_causal_lm(model, 60)
    assert wrapped.model is model
    assert (wrapped.vocab_size, wrapped.context) == (60, 64)


@pytest.mark.parametrize(
    ("n_logits", "n_tokens", "fits"),
    [
        (128, 14, False),  # another tokenizer's
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
        assert found.model is model.model
        assert found.context == model.context
    else:
        with refused(
            ValueError, f"tokenizer must have the model's {n_logits} tokens, got {n_tokens}"
        ):
            as_causal_lm(model, n_tokens)


@pytest.mark.parametrize("make", [tiny_gpt, Homemade])
def test_only_models_of_transformers_may_be_padded(make: Any) -> None:
    with refused(ValueError, "tokenizer must have the model's 16 tokens, got 15"):
        as_causal_lm(make(vocab_size=16), 15)


def test_a_padded_small_vocabulary_may_be_cut_by_hand() -> None:
    model = HubLM(hub_model("gpt2", 20), vocab_size=14)
    assert as_causal_lm(model, 14) is model


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2ForSequenceClassification"])
def test_a_model_without_an_output_head_is_refused(kind: str) -> None:
    import transformers

    config = hub_model("gpt2", 14).config
    config.pad_token_id = 0
    model = getattr(transformers, kind)(config)
    with refused(ValueError, f"model must have an output head (AutoModelForCausalLM), got {kind}"):
        as_causal_lm(model, 14)


class Broken(Homemade):
    """A model with a mistake in a property."""

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        """Ignore it."""


def test_a_property_that_fails_is_not_called_missing() -> None:
    with refused(
        ValueError,
        "model must have vocab_size, that of Broken fails: 'Broken' object has no attribute "
        "'config'",
    ):
        as_causal_lm(Broken(), 14)


def test_what_is_missing_is_named() -> None:
    with refused(
        ValueError,
        "model must have context, get_output_embeddings, new_cache, vocab_size, "
        "got Linear without context, get_output_embeddings, new_cache, vocab_size",
    ):
        as_causal_lm(nn.Linear(2, 2), 2)
    with refused(ValueError, "model must be a torch module, got str"):
        as_causal_lm("gpt2", 2)  # type: ignore[arg-type]
    with refused(
        ValueError,
        "tokenizer must have decode, encode, vocab_size, got str without decode, vocab_size",
    ):
        as_tokenizer("abc")


class Odd(Pairs):
    """A tokenizer that gives some answer."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer = answer

    def encode(self, text: str) -> Any:
        return self._answer


def test_tokens_are_checked() -> None:
    assert encode(Odd([3, 0, 168]), "x").tolist() == [3, 0, 168]
    assert encode(Odd(np.array([3], dtype=np.uint8)), "x").dtype == np.int64
    with refused(
        ValueError, "tokenizer must encode a text in its 169 tokens, got ids from 1 to 169"
    ):
        encode(Odd([1, 169]), "x")
    with refused(
        ValueError, "tokenizer must encode a text in its 169 tokens, got ids from -1 to 5"
    ):
        encode(Odd([5, -1]), "x")
    with refused(
        ValueError,
        "tokenizer must encode a text as one row of integers, got int64 of shape (1, 2)",
    ):
        encode(Odd([[1, 2]]), "x")
    with refused(
        ValueError,
        "tokenizer must encode a text as one row of integers, got float64 of shape (2,)",
    ):
        encode(Odd([0.5, 1.0]), "x")


def test_characters_are_counted_where_they_are_decoded() -> None:
    rows = np.zeros((3, 5), dtype=np.int64)
    assert count_characters(CharTokenizer.from_text("ab"), rows).tolist() == [5.0] * 3
    assert count_characters(Pairs(), rows).tolist() == [10.0] * 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_comes_back(name: str) -> None:
    tokenizer = as_tokenizer(TOKENIZERS[name]())
    text = "aeio mnr\nstu  lo"
    tokens = encode(tokenizer, text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) <= len(text)
    assert tokenizer.vocab_size == len(TOKENIZERS[name]())


def test_special_tokens_are_neither_added_nor_counted() -> None:
    inner = TOKENIZERS["bytes"]()
    tokenizer = HubTokenizer(inner)
    assert inner.eos_token_id not in tokenizer.encode("aeio")
    end = np.array([[inner.eos_token_id] * 3])
    assert tokenizer.decode(end[0]) == ""
    assert count_characters(tokenizer, end).tolist() == [0.0]
