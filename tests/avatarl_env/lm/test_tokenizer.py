"""Tests of avatarl_env/lm/tokenizer.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from avatarl_env.lm.tokenizer import UNKNOWN, CharTokenizer

# All of Unicode, lone surrogates included: a Python string may hold them.
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()))


@given(ANY_TEXT)
@example("")
@example("line\nline\r\n\ttab  two blanks\0")
@example("e\u0301 is not \u00e9, \U0001f469\u200d\U0001f680 is three code points")
@example("\ufeffbyte order mark, replacement \ufffd, lone surrogate \ud800, last \U0010ffff")
def test_a_text_of_known_characters_comes_back_unchanged(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.shape == (len(text),)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.n_unknown(text) == 0


@given(ANY_TEXT, ANY_TEXT)
def test_each_unknown_character_becomes_the_unknown_symbol(seen: str, text: str) -> None:
    tokenizer = CharTokenizer.from_text(seen)
    expected = "".join(c if c in tokenizer.characters else UNKNOWN for c in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.n_unknown(text) == sum(c not in tokenizer.characters for c in text)


@given(ANY_TEXT)
def test_json_holds_the_whole_tokenizer(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_ids_follow_code_points_and_the_unknown_symbol_is_last() -> None:
    tokenizer = CharTokenizer.from_text("cab\U0001f600a\n")
    assert tokenizer.characters == "\nabc\U0001f600\ufffd"
    assert tokenizer.vocab_size == 6
    assert tokenizer.unknown_id == 5
    assert tokenizer.encode("ab?\U0001f600\n").tolist() == [1, 2, 5, 4, 0]


def test_an_unknown_symbol_in_the_text_keeps_its_own_place() -> None:
    tokenizer = CharTokenizer.from_text("a\ufffd\U0001f600")
    assert tokenizer.characters == "a\ufffd\U0001f600"
    assert tokenizer.unknown_id == 1
    assert tokenizer.encode("\ufffd?").tolist() == [1, 1]
    assert tokenizer.n_unknown("\ufffd?") == 1


def test_an_empty_text_leaves_the_unknown_symbol_only() -> None:
    tokenizer = CharTokenizer.from_text("")
    assert tokenizer.characters == UNKNOWN
    assert tokenizer.decode(tokenizer.encode("xyz")) == UNKNOWN * 3


@pytest.mark.parametrize(
    "ids",
    [
        [1, 0],
        (1, 0),
        np.array([1, 0], dtype=np.uint8),
        torch.tensor([1, 0]),
        torch.tensor([1, 0], dtype=torch.int32),
    ],
    ids=["list", "tuple", "numpy", "torch", "torch int32"],
)
def test_decode_takes_any_sequence_of_integers(ids: object) -> None:
    assert CharTokenizer.from_text("ab").decode(ids) == "ba"  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[], np.zeros(0, np.int64), torch.zeros(0)])
def test_nothing_decodes_to_the_empty_text(ids: object) -> None:
    assert CharTokenizer.from_text("ab").decode(ids) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 3], ValueError, r"ids must lie in \[0, 3\), got values from 0 to 3"),
        ([-1, 0], ValueError, r"ids must lie in \[0, 3\), got values from -1 to 0"),
        ([[0, 1]], ValueError, r"ids must be one-dimensional, got shape \(1, 2\)"),
        ([0.0, 1.0], TypeError, "ids must be integers, got dtype float64"),
        ([True], TypeError, "ids must be integers, got dtype bool"),
    ],
)
def test_decode_refuses_what_is_no_token_id(
    ids: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CharTokenizer.from_text("ab").decode(ids)


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("aba\ufffd", "characters must be distinct, got 'a' more than once"),
        ("ab", "characters must hold the unknown symbol"),
        ("", "characters must hold the unknown symbol"),
    ],
)
def test_a_vocabulary_must_be_distinct_and_hold_the_unknown_symbol(
    characters: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CharTokenizer(characters)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, r"state\['type'\] must be 'char', got None"),
        ({"type": "bpe"}, ValueError, r"state\['type'\] must be 'char', got 'bpe'"),
        ({"type": "char"}, TypeError, r"state\['characters'\] must be a string, got None"),
    ],
)
def test_from_dict_refuses_another_description(
    state: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CharTokenizer.from_dict(state)


def test_the_order_of_the_ids_is_part_of_equality() -> None:
    first, second = CharTokenizer("ab\ufffd"), CharTokenizer("ba\ufffd")
    assert first == CharTokenizer.from_text("ba")
    assert hash(first) == hash(CharTokenizer.from_text("ba"))
    assert first != second
    assert first != "ab\ufffd"
    assert second.encode("ab").tolist() == [1, 0]
    assert repr(second) == "CharTokenizer(vocab_size=3, characters='ba\ufffd')"


def test_lone_surrogates_that_follow_one_another_survive_json() -> None:
    tokenizer = CharTokenizer.from_text("x\udc00y\ud800z")
    assert "\ud800\udc00" in tokenizer.characters
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    with pytest.raises(TypeError, match="must be a string"):
        CharTokenizer.from_dict({"type": "char", "characters": ["a", 1]})
