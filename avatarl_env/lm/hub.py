"""Causal language models of transformers, as this package reads and samples them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HubCache:
    """A transformers cache, with the length and reset that sampling goes by."""

    def __init__(self, config: Any) -> None:
        """Start empty; ``config`` is the model's."""
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

    The model is shared, not copied; its parameters are found under ``model.``.
    """

    def __init__(self, model: PreTrainedModel, context: int | None = None) -> None:
        """Wrap a model; train/eval mode is the model's.

        Args:
            model: any with ``input_ids``, ``past_key_values`` and logits.
            context: longest window, tokens; default what its configuration says.

        Raises:
            ValueError: if the configuration does not say and ``context`` is not given, or it is
                not positive.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        if context is None:
            context = getattr(model.config, "max_position_embeddings", None)
        if context is None:
            raise ValueError(f"context must be given, {type(model).__name__} does not say its own")
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self._context = int(context)

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
        return output.logits  # type: ignore[no-any-return]

    @property
    def context(self) -> int:
        """Longest window the model can read, tokens."""
        return self._context

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> HubCache:
        """Return an empty cache; it takes as many rows and positions as come."""
        return HubCache(self.model.config)

    def get_output_embeddings(self) -> nn.Module:
        """Return the module that turns the final hidden state into logits."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head
