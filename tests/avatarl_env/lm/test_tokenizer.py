"""Tests of avatarl_env/lm/tokenizer.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from avatarl_env.lm.tokenizer import UNKNOWN, CharTokenizer

# All of Unicode, lone surrogates included: a Python string may hold them.
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()))


@given(ANY_TEXT, ANY_TEXT)
@example("line\nline\r\n\ttab  two blanks\0", "e\u0301 is not \u00e9")
@example("\ufeffbyte order mark, \ufffd, lone surrogate \ud800, last \U0010ffff", "")
def test_known_characters_round_trip_and_others_become_the_unknown_symbol(
    seen: str, text: str
) -> None:
    tokenizer = CharTokenizer.from_text(seen)
    for read in (seen, text):
        ids = tokenizer.encode(read)
        assert (ids.shape, ids.dtype) == ((len(read),), np.int64)
        known = [c in tokenizer.characters for c in read]
        expected = [c if is_known else UNKNOWN for c, is_known in zip(read, known, strict=True)]
        assert tokenizer.decode(ids) == "".join(expected)
        assert tokenizer.n_unknown(read) == known.count(False)
    assert tokenizer.decode(tokenizer.encode(seen)) == seen


@given(ANY_TEXT)
@example("y\udc00x\ud800z")
def test_json_holds_the_whole_tokenizer(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("cab\U0001f600a\n", "\nabc\U0001f600\ufffd"),  # the unknown symbol is last ...
        ("a\ufffd\U0001f600", "a\ufffd\U0001f600"),  # ... unless the text has it
        ("", "\ufffd"),
    ],
)
def test_ids_follow_code_points(text: str, characters: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.characters == characters
    assert tokenizer.vocab_size == len(characters)
    assert tokenizer.unknown_id == characters.index("\ufffd")
    assert tokenizer.encode(characters + "?").tolist() == [
        *range(len(characters)),
        tokenizer.unknown_id,
    ]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, 0], "ba"),
        ((1, 0), "ba"),
        (np.array([1, 0], dtype=np.uint8), "ba"),
        (torch.tensor([1, 0], dtype=torch.int32), "ba"),
        ([], ""),
        (torch.zeros(0), ""),
    ],
)
def test_decode_takes_any_sequence_of_integers(ids: Any, text: str) -> None:
    assert CharTokenizer.from_text("ab").decode(ids) == text


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 3], ValueError, r"ids .*\[0, 3\), .*0 to 3"),
        ([-1, 0], ValueError, r"ids .*\[0, 3\), .*-1 to 0"),
        ([[0, 1]], ValueError, r"ids .*\(1, 2\)"),
        ([0.0, 1.0], TypeError, "ids .*float64"),
        ([True], TypeError, "ids .*bool"),
    ],
)
def test_decode_refuses_invalid_ids(ids: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CharTokenizer.from_text("ab").decode(ids)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, "'type'.*None"),
        ({"type": "bpe"}, ValueError, "'type'.*'bpe'"),
        ({"type": "char"}, TypeError, "'characters'.*None"),
        ({"type": "char", "characters": ["a", 1]}, TypeError, r"'characters'.*\['a', 1\]"),
        ({"type": "char", "characters": "aba\ufffd"}, ValueError, "distinct, got 'a'"),
        ({"type": "char", "characters": "ab"}, ValueError, "unknown symbol.*'ab'"),
    ],
)
def test_from_dict_refuses_an_invalid_state(
    state: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CharTokenizer.from_dict(state)


def test_the_order_of_the_ids_is_part_of_equality() -> None:
    first, second = CharTokenizer("ab\ufffd"), CharTokenizer("ba\ufffd")
    assert first == CharTokenizer.from_text("ba")
    assert hash(first) == hash(CharTokenizer.from_text("ba"))
    assert first not in (second, "ab\ufffd")
    assert repr(second) == "CharTokenizer(vocab_size=3, characters='ba\ufffd')"
