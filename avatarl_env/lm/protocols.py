"""The interfaces of models and tokenizers, and which ones are accepted.

A model is a `GPT`, a causal language model from transformers, or anything that satisfies
`CausalLM`; a tokenizer is a `CharTokenizer`, one from transformers, or anything that satisfies
`Tokenizer`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from avatarl_env.lm.generation import LanguageModel
from avatarl_env.lm.hub import HubLM, HubTokenizer, is_hub_model, is_hub_tokenizer
from avatarl_env.lm.tokenizer import CharTokenizer

PADDING_MULTIPLE, PADDING_SHARE = 128, 0.02
"""A transformers model may have more logits than its tokenizer has tokens: up to the next multiple,
or by this fraction of the tokens, whichever is more."""
MIN_PADDED = 1024
"""Smaller vocabularies are not padded: another size means another tokenizer."""


class Tokenizer(Protocol):
    """A tokenizer, as a patient needs it."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to `vocab_size - 1`."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text, (T,), without special tokens around them."""

    def decode(self, ids: NDArray[np.int64]) -> str:
        """Return the text of tokens (T,); scores per character divide by its length."""


class CausalLM(LanguageModel, Protocol):
    """A model, as a patient needs it; it must be an `nn.Module` too."""

    @property
    def vocab_size(self) -> int:
        """Number of logits at every position, one for each token."""

    def get_output_embeddings(self) -> nn.Module:
        """Return the module that turns the final hidden states (B, T, C) into the logits.

        The model must return its output unchanged. With more than `WHOLE_UP_TO` tokens, the first
        forward over a text calls the module several times, for a few positions each, and then for
        the last position alone, for which the model must return (B, 1, V).
        """


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer; one from transformers is wrapped.

    Raises:
        ValueError: if it lacks a member of `Tokenizer`.
    """
    if is_hub_tokenizer(tokenizer):
        return HubTokenizer(tokenizer)
    _check_has("tokenizer", tokenizer, Tokenizer)
    checked: Tokenizer = tokenizer
    return checked


def as_causal_lm(model: nn.Module, n_tokens: int) -> Any:
    """Return the model, a `CausalLM` and `nn.Module`; one from transformers is wrapped.

    A transformers model often has more logits than its tokenizer has tokens, since a round number
    is faster. The padding, which was never trained, is cut off. Every other model must have one
    logit per token.

    Args:
        model: shared, not copied. Wrap a model with more padding than `most_padded` yourself, as
            `HubLM(model, vocab_size=...)`.
        n_tokens: size of the tokenizer's vocabulary.

    Raises:
        ValueError: if it cannot be operated on (see `check_operable`), lacks a member of `CausalLM`
            or an output head, or does not have `n_tokens` logits.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(  # noqa: TRY004 - as for every bad argument
            f"model must be a torch module, got {type(model).__name__}"
        )
    check_operable(model)
    wrapped = HubLM(model) if is_hub_model(model) else model
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


def check_operable(model: nn.Module) -> None:
    """Raise a ValueError if a module of the model hides its weights or its hooks.

    A compiled or scripted module skips hooks, an offloaded one swaps its weights, those of a
    quantised or sharded one are not plain numbers, and editing a base weight misses its adapters.
    """
    for name, module in model.named_modules():
        for is_there, rule, found in _obstacles(module):
            if is_there:
                raise ValueError(f"model must {rule}, got {found} at {name or 'its root'!r}")


def _obstacles(module: nn.Module) -> list[tuple[bool, str, str]]:
    """Return what may be wrong with a module: whether it is, what to do instead, what was found."""
    kind = type(module).__name__
    parameters = [p for p in module._parameters.values() if p is not None]
    buffers = [b for b in module._buffers.values() if b is not None]
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    odd = [p for p in parameters if not p.is_floating_point() or is_traceable_wrapper_subclass(p)]
    return [
        (
            isinstance(module, torch.jit.ScriptModule),
            "be a plain module, not TorchScript: pass the module given to torch.jit",
            "TorchScript",
        ),
        (
            "_orig_mod" in module._modules or module._compiled_call_impl is not None,
            "not be compiled: pass the module given to torch.compile (its _orig_mod)",
            f"a compiled {kind}",
        ),
        (
            any(t.is_meta for t in (*parameters, *buffers))
            or getattr(hook, "offload", False)
            or type(hook).__name__ == "CpuOffload",
            "have its weights in memory on one device: load it without offloading and without "
            "device_map, and give parameters on the meta device their values",
            "offloaded weights or weights on the meta device",
        ),
        (
            bool(odd)
            or "qweight" in module._buffers
            or type(module).__module__.startswith("torch.ao.nn.quantized"),
            "have plain floating-point weights: load it without quantisation (dtype='bfloat16' "
            "takes half the memory) and without sharding",
            ", ".join(f"a {type(p).__name__} of {p.dtype}" for p in odd) or f"a quantised {kind}",
        ),
        (
            "base_layer" in module._modules and hasattr(module, "merge"),
            "have its adapters merged: pass what model.merge_and_unload() returns",
            f"an adapter ({kind})",
        ),
    ]


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Return the tokens of a text, (T,), checked.

    Raises:
        ValueError: if the tokenizer does not return one row of ids within its vocabulary.
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
    """Return the number of characters that each row of tokens (B, T) decodes to, (B,)."""
    if type(tokenizer) is CharTokenizer:  # one for each token
        return np.full(len(rows), float(rows.shape[1]))
    return np.array([len(tokenizer.decode(row)) for row in rows], dtype=np.float64)


def most_padded(n_tokens: int) -> int:
    """Return the most logits that a transformers model may have for a number of tokens."""
    if n_tokens < MIN_PADDED:
        return n_tokens
    multiple = -(-n_tokens // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return max(multiple, int(n_tokens * (1 + PADDING_SHARE)))


def _check_has(argument: str, value: object, protocol: type) -> None:
    """Raise a ValueError unless `value` has every member of a protocol."""
    kinds = [kind for kind in protocol.__mro__ if getattr(kind, "_is_protocol", False)]
    names = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    for name in sorted(names):
        try:
            getattr(value, name)
        except AttributeError as error:  # also one that a property raises
            raise ValueError(
                f"{argument} must have {', '.join(sorted(names))}, got {type(value).__name__}: "
                f"{error}"
            ) from error
