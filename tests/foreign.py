"""Models and tokenizers of transformers, and minimal ones as a user might write them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from avatarl_env.lm.generation import KVCache
from avatarl_env.lm.gpt import GPT
from tests.fakes import tiny_gpt
from tests.patients import tiny_text
from tests.zoo import plain

UNKNOWN = "\ufffd"


def character_tokenizer(text: str | None = None) -> Any:
    """Return a transformers tokenizer of characters; the unknown token is the last."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set(tiny_text() if text is None else text))
    vocabulary = {character: i for i, character in enumerate([*characters, UNKNOWN])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def bpe_tokenizer(vocab_size: int = 60) -> Any:
    """Return a transformers tokenizer of merged characters, trained on the tests' language."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator([tiny_text()], trainer)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def byte_tokenizer(vocab_size: int = 320) -> Any:
    """Return a byte-level tokenizer as GPT-2's, with an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|end|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "characters": functools.cache(character_tokenizer),
    "bpe": functools.cache(bpe_tokenizer),
    "bytes": functools.cache(byte_tokenizer),
}


def hub_model(kind: str, n_tokens: int) -> nn.Module:
    """Return a tiny model of transformers with random weights and 64 tokens of context."""
    longest = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    return plain(kind, vocab_size=n_tokens, **{longest: 64})


class Homemade(nn.Module):
    """A user's own language model, with the required attributes only."""

    def __init__(self, vocab_size: int = 14, **sizes: int) -> None:
        super().__init__()
        self._inner: GPT = tiny_gpt(vocab_size=vocab_size, context=64, n_heads=2, **sizes)
        self.vocab_size = vocab_size
        self.context = 64

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> KVCache:
        return self._inner.new_cache(n_rows, n_positions)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        return self._inner(tokens, cache)

    def get_output_embeddings(self) -> nn.Module:
        return self._inner.lm_head


class Pairs:
    """A user's own tokenizer: one token for two characters."""

    def __init__(self, text: str | None = None) -> None:
        text = tiny_text() if text is None else text
        singles = sorted(set(text))
        self._words = [a + b for a in singles for b in singles]
        self._ids = {word: i for i, word in enumerate(self._words)}

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._ids[text[i : i + 2]] for i in range(0, len(text) - 1, 2)])

    def decode(self, ids: np.ndarray) -> str:
        return "".join(self._words[i] for i in ids)
