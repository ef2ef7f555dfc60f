"""What may be a patient: the interfaces of models and tokenizers, and how others are brought in.

A model is ours, a causal language model of transformers (of a kind whose attention is known, see
`avatarl_env.surgery.targets.LAYOUTS`), or anything that satisfies `CausalLM`; a
tokenizer is a `CharTokenizer`, one of transformers, or anything that satisfies
`Tokenizer`.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from avatarl_env.lm.generation import LanguageModel
from avatarl_env.lm.hub import HubLM, HubTokenizer, is_hub_model, is_hub_tokenizer
from avatarl_env.lm.tokenizer import CharTokenizer

PADDING_MULTIPLE, PADDING_SHARE = 128, 0.02
"""How far a transformers model's vocabulary may be padded beyond its tokenizer's tokens: to the
next multiple of the one, or by the other as a share of the tokens, whichever is more."""
LEAST_PADDED = 1024
"""Tokens below which there is no padding: there, other sizes mean another tokenizer."""


class Tokenizer(Protocol):
    """What a patient needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to `vocab_size - 1`."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of a text's tokens, (T,), without special tokens around them."""

    def decode(self, ids: NDArray[np.int64]) -> str:
        """Return the text of tokens (T,); the length of real text is what nats are divided by."""


class CausalLM(LanguageModel, Protocol):
    """What a patient needs of a model, which has to be an `nn.Module` too.

    That is what generation needs (`context`, `new_cache`, logits of tokens), and these.
    """

    @property
    def vocab_size(self) -> int:
        """Logits that the model makes at every position, one for each token."""

    def get_output_embeddings(self) -> nn.Module:
        """Return the module that turns the final hidden states (B, T, C) into the logits.

        The model returns what it makes and nothing else. For more than
        `WHOLE_UP_TO` tokens, the first of a text's forwards calls
        it again and again for a few of the positions, and then lets only the last one go on: the
        model has to return (B, 1, V) then.
        """


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer, one of transformers wrapped.

    Raises:
        ValueError: if it lacks something that `Tokenizer` has.
    """
    if is_hub_tokenizer(tokenizer):
        return HubTokenizer(tokenizer)
    _check_has("tokenizer", tokenizer, Tokenizer)
    checked: Tokenizer = tokenizer
    return checked


def as_causal_lm(model: nn.Module, n_tokens: int) -> Any:
    """Return the model, one of transformers wrapped; types cannot say that it is also a module.

    A transformers model often has more logits than its tokenizer has tokens, since a round number
    of rows is faster. The rest, which no text ever trained, is cut off: the model's probabilities
    are those among the tokens that there are. Every other model must have one logit per token.

    Args:
        model: it is shared, not copied. What is padded by more than `most_padded` can be
            wrapped by hand, `HubLM(model, vocab_size=...)`.
        n_tokens: the tokenizer's.

    Raises:
        ValueError: if it lacks something that `CausalLM` has, or an output head, has no
            token to be decoded for some of its logits (beyond padding), or fewer logits than there
            are tokens.
    """
    wrapped = HubLM(model) if is_hub_model(model) else model
    if not isinstance(wrapped, nn.Module):
        raise ValueError(  # noqa: TRY004 - like all that is wrong with a model
            f"model must be a torch module, got {type(model).__name__}"
        )
    _check_has("model", wrapped, CausalLM)
    if wrapped.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"model must have an output head (AutoModelForCausalLM), got {type(model).__name__}"
        )
    n_logits = int(wrapped.vocab_size)  # type: ignore[arg-type]
    if n_logits == n_tokens:
        return wrapped
    if isinstance(wrapped, HubLM) and n_tokens < n_logits <= most_padded(n_tokens):
        return HubLM(wrapped.model, wrapped.context, vocab_size=n_tokens)
    raise ValueError(f"tokenizer must have the model's {n_logits} tokens, got {n_tokens}")


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Return the tokens of a text, (T,), checked.

    Raises:
        ValueError: if the tokenizer's answer is not one row of ids within its vocabulary.
    """
    tokens = np.asarray(tokenizer.encode(text))
    size = tokenizer.vocab_size
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokenizer must encode a text as one row of integers, got {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
        raise ValueError(
            f"tokenizer must encode a text in its {size} tokens, "
            f"got ids from {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int64, copy=False)


def count_characters(tokenizer: Tokenizer, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how many characters each row of tokens (B, T) decodes to, (B,)."""
    if type(tokenizer) is CharTokenizer:  # one for each token: nothing to decode
        return np.full(len(rows), float(rows.shape[1]))
    return np.array([len(tokenizer.decode(row)) for row in rows], dtype=np.float64)


def most_padded(n_tokens: int) -> int:
    """Return how many logits a model of transformers may have for so many tokens."""
    if n_tokens < LEAST_PADDED:
        return n_tokens
    multiple = -(-n_tokens // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return max(multiple, int(n_tokens * (1 + PADDING_SHARE)))


def _check_has(argument: str, value: object, protocol: type) -> None:
    """Raise a ValueError unless `value` has everything that the protocol names."""
    names = {
        name
        for kind in protocol.__mro__
        for name in vars(kind)
        if not name.startswith("_") and getattr(kind, "_is_protocol", False)
    }
    missing = sorted(name for name in names if not hasattr(value, name))
    for name in missing:
        found = inspect.getattr_static(value, name, None)
        if isinstance(found, property) and found.fget is not None:  # it is there, and fails
            try:
                found.fget(value)
            except AttributeError as error:
                raise ValueError(
                    f"{argument} must have {name}, that of {type(value).__name__} fails: {error}"
                ) from error
    if missing:
        raise ValueError(
            f"{argument} must have {', '.join(sorted(names))}, "
            f"got {type(value).__name__} without {', '.join(missing)}"
        )
