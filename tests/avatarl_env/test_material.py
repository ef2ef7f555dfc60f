"""Tests of avatarl_env/material.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avatarl_env.lm.generation import Generation
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.material import as_generations, encode_corpus, pooled_characters
from avatarl_env.scoring import entropy
from tests.foreign import Pairs
from tests.patients import tiny_corpus


class Words:
    """Token i decodes to i letters."""

    vocab_size = 10

    def encode(self, text: str) -> np.ndarray:
        return np.zeros(len(text), dtype=np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return "".join("x" * int(i) for i in ids)


def test_characters_are_pooled_over_each_operation() -> None:
    tokens = np.array([[1, 2], [3, 4], [0, 0], [5, 0]])
    assert pooled_characters(Words(), tokens, 2).tolist() == [5.0, 5.0, 2.5, 2.5]
    assert pooled_characters(Words(), tokens, 1).tolist() == [3.75] * 4
    assert pooled_characters(Words(), tokens, 4).tolist() == [3.0, 7.0, 1.0, 5.0]  # 1, not 0


def test_texts_of_no_characters_count_as_one_together() -> None:
    assert pooled_characters(Words(), np.zeros((4, 3), dtype=np.int64), 2).tolist() == [0.5] * 4


def test_a_writing_by_hand() -> None:
    """Two operations of one prompt; prompts 1 2 and 1 4, of which the second token counts."""
    tokens = torch.tensor([[1, 2, 3, 1], [1, 4, 0, 0]])
    log_probs = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]])
    entropies = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    generation = Generation(tokens, log_probs, None, entropies)
    generations = as_generations(Words(), generation, torch.tensor([[3.0], [2.0]]), 2)
    assert generations.n_prompt == 2
    assert generations.prompt_loss.tolist() == [1.5, 0.5]
    assert generations.prompt_characters.tolist() == [2.0, 4.0]
    assert generations.distributions is None
    first, second = generations.split(2)
    assert first.new_tokens.tolist() == [[3, 1]]
    assert second.prompt_loss.tolist() == [0.5]
    assert second.prompt_characters.tolist() == [4.0]
    assert second.entropies.tolist() == [[0.5, 0.0]]
    assert second.n_prompt == 2


def test_a_short_prompt_among_long_ones_does_not_blow_up() -> None:
    """Total nats over total characters: (4 + 4) / (1 + 15), whatever row they are in."""
    tokens = torch.tensor([[9, 0, 1, 9], [9, 9, 6, 9]])
    generation = Generation(tokens, torch.ones(2, 1), None, torch.ones(2, 1))
    generations = as_generations(Words(), generation, torch.full((2, 2), 2.0))
    assert generations.prompt_loss.tolist() == [0.5, 0.5]
    assert generations.prompt_loss.mean() == 8 / 16


def test_the_tokens_that_are_written_do_not_change_what_nats_are_divided_by() -> None:
    """Else an operation would be paid for writing long ones."""
    corpus = tiny_corpus()
    _, reference = encode_corpus(corpus, Pairs())
    assert reference.characters_per_token == 2.0
    tokenizer = CharTokenizer.from_text(corpus.text)
    assert encode_corpus(corpus, tokenizer)[1].characters_per_token == 1.0
    words = Words()
    words.encode = lambda text: np.arange(len(text) // 4) % 10  # type: ignore[method-assign]
    _, reference = encode_corpus(corpus, words)
    assert reference.characters_per_token == 4.0
    found = []
    for token in (1, 9):
        tokens = torch.full((2, 4), token)
        generation = Generation(tokens, torch.full((2, 2), -2.0), None, torch.ones(2, 2))
        generations = as_generations(words, generation, torch.ones(2, 1))
        found.append(entropy(generations, reference).tolist())
    assert found == [[0.25, 0.25]] * 2


def test_our_own_tokenizers_corpus_is_counted_once_per_process() -> None:
    corpus = tiny_corpus()
    tokenizer = CharTokenizer.from_text(corpus.text)
    splits, reference = encode_corpus(corpus, tokenizer)
    again = encode_corpus(corpus, CharTokenizer(tokenizer.characters))
    assert again[0] is splits
    assert again[1] is reference


def test_a_tokenizer_derived_from_ours_is_its_own() -> None:
    """It may encode in another way and still be equal."""

    class Lazy(CharTokenizer):
        def encode(self, text: str) -> np.ndarray:
            return super().encode(text)[::2]

    corpus = tiny_corpus()
    tokenizer = CharTokenizer.from_text(corpus.text)
    whole, _ = encode_corpus(corpus, tokenizer)
    half, _ = encode_corpus(corpus, Lazy(tokenizer.characters))
    assert half["train"].tolist() == whole["train"][::2].tolist()


def test_splits_are_of_the_text_not_of_the_tokens() -> None:
    corpus = tiny_corpus()
    tokenizer = Pairs()
    splits, reference = encode_corpus(corpus, tokenizer)
    for name, text in corpus.splits.items():
        assert tokenizer.decode(splits[name]) == text
    assert reference.vocab_size == tokenizer.vocab_size


def test_a_text_of_no_tokens_is_refused() -> None:
    class Mute(Words):
        def encode(self, text: str) -> np.ndarray:
            return np.zeros(0, dtype=np.int64)

    with pytest.raises(ValueError, match="tokens must be at least 5 to count, got 0"):
        encode_corpus(tiny_corpus(), Mute())
