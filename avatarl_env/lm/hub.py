"""Causal language models and tokenizers of transformers, as this package uses them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_hub_model(model: object) -> TypeGuard[PreTrainedModel]:
    """Whether it is a model of transformers, found out without importing that."""
    return _is_a(model, "transformers.modeling_utils", "PreTrainedModel")


def is_hub_tokenizer(tokenizer: object) -> TypeGuard[PreTrainedTokenizerBase]:
    """Whether it is a tokenizer of transformers, found out without importing that."""
    return _is_a(tokenizer, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase")


def _is_a(value: object, module: str, name: str) -> bool:
    """Whether `value` is of a class; if its module was never imported, nothing is."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))


class HubCache:
    """A transformers cache, with the length and reset that sampling goes by."""

    def __init__(self, config: Any) -> None:
        """Start empty; `config` is the model's."""
        self._config = config
        self.reset()

    @property
    def length(self) -> int:
        """Positions seen."""
        return int(self.past.get_seq_length())

    def reset(self) -> None:
        """Forget every position."""
        from transformers import DynamicCache

        self.past = DynamicCache(config=self._config)


class HubLM(nn.Module):
    """A causal language model of transformers: tokens in, logits out.

    ::

        model = HubLM(AutoModelForCausalLM.from_pretrained(folder))
        generation = generate(model, prompts, uniforms)

    The model is shared, not copied; its parameters are found under `model.`.
    """

    def __init__(
        self, model: PreTrainedModel, context: int | None = None, *, vocab_size: int | None = None
    ) -> None:
        """Wrap a model; train/eval mode is the model's.

        Args:
            model: any with `input_ids`, `past_key_values` and logits.
            context: longest window, tokens; default what its configuration says.
            vocab_size: V, if the model has more logits than there are tokens: those beyond are cut
                off. Default all that its configuration says.

        Raises:
            ValueError: if the configuration does not say and `context` is not given, or it is
                not positive.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        if context is None:
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            raise ValueError(
                f"context must be given, {type(model).__name__} does not say its own: wrap it, "
                "HubLM(model, context=...)"
            )
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self._context = int(context)
        self._vocab_size = vocab_size

    def forward(self, tokens: Tensor, cache: HubCache | None = None) -> Tensor:
        """Return the next-token logits after every position.

        Args:
            tokens: (B, T) int64; with a cache they follow what it already holds.
            cache: keys and values of the earlier positions, extended in place.

        Returns:
            (B, T, V) logits.

        Raises:
            ValueError: if the positions pass the context.
        """
        stop = tokens.size(1) + (0 if cache is None else cache.length)
        if stop > self._context:
            raise ValueError(f"tokens must end within context={self._context}, got {stop}")
        output = self.model(
            input_ids=tokens,
            past_key_values=None if cache is None else cache.past,
            use_cache=cache is not None,
        )
        logits: Tensor = output.logits
        return logits if self._vocab_size is None else logits[..., : self._vocab_size]

    @property
    def context(self) -> int:
        """Longest window the model can read, tokens."""
        return self._context

    @property
    def vocab_size(self) -> int:
        """Logits at every position, V."""
        if self._vocab_size is not None:
            return self._vocab_size
        return int(self.model.config.get_text_config().vocab_size)

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> HubCache:
        """Return an empty cache; it takes as many rows and positions as come."""
        return HubCache(self.model.config)

    def get_output_embeddings(self) -> nn.Module:
        """Return the module that turns the final hidden state into logits; None without one."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head


class HubTokenizer:
    """A tokenizer of transformers: text in, ids out, and no special tokens around them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a tokenizer; it is shared, not copied."""
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids, those of added tokens included."""
        return len(self.tokenizer)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of a text's own tokens, (T,)."""
        # Not verbose: a corpus is longer than the context, which is no reason to warn.
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]] | Tensor) -> str:
        """Return the text of tokens (T,); special tokens are none of it."""
        text = self.tokenizer.decode(
            [int(token) for token in ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)  # it would be a list for a list of rows
        return text
