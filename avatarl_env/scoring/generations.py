"""Texts that a model wrote, in the form that is scored.

Shapes: N operations of M prompts each, B = N * M, P prompt tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avatarl_env.lm.generation import Generation
from avatarl_env.lm.protocols import Tokenizer, count_characters
from avatarl_env.scoring.reference import Array


@dataclass(frozen=True, eq=False)
class Generations:
    """B prompts with their continuations, and the model's loss on the prompts."""

    tokens: NDArray[np.int64]
    """(B, P + new) prompts and new tokens."""
    n_prompt: int
    """P."""
    distributions: Array | None
    """(B, new, V) log-probabilities at each new token, nats; None for vocabularies of more than
    `WHOLE_UP_TO` tokens."""
    prompt_loss: Array
    """(B,) teacher-forced loss on the prompt's tokens from the second on, nats per character."""
    log_probs: Array | None = None
    """(B, new) log-probability of each new token, nats, if distributions are not kept."""
    entropies: Array | None = None
    """(B, new) entropies of the distributions, nats, if distributions are not kept."""

    @property
    def new_tokens(self) -> NDArray[np.int64]:
        """(B, new) the new tokens alone."""
        return self.tokens[:, self.n_prompt :]

    @property
    def has_nan(self) -> bool:
        """Whether a probability or a loss is NaN (an infinite loss is not)."""
        kept = (self.distributions, self.log_probs, self.entropies, self.prompt_loss)
        return any(np.isnan(array).any() for array in kept if array is not None)

    def split(self, n: int) -> list[Generations]:
        """Return the generations of n operations with equal numbers of rows; they share memory."""
        columns = []
        for field in fields(self):
            value = getattr(self, field.name)
            columns.append(np.split(value, n) if isinstance(value, np.ndarray) else [value] * n)
        return [Generations(*values) for values in zip(*columns, strict=True)]


def as_generations(
    tokenizer: Tokenizer, generation: Generation, prompt_losses: Tensor, n: int = 1
) -> Generations:
    """Convert a sampler's output and the losses on its prompts to `Generations`.

    Args:
        tokenizer: decodes the prompts, whose characters are counted.
        generation: of B rows, with distributions or else with entropies.
        prompt_losses: (B, P - 1) teacher-forced loss of the prompts' tokens from the second on.
        n: N, operations that the rows belong to, with equal numbers of rows.
    """
    tokens = generation.tokens.cpu().numpy()
    n_prompt = prompt_losses.size(1) + 1
    characters = pooled_characters(tokenizer, tokens[:, 1:n_prompt], n)
    is_whole = generation.distributions is not None
    return Generations(
        tokens,
        n_prompt,
        _as_array(generation.distributions),
        prompt_losses.double().sum(1).cpu().numpy() / characters,
        None if is_whole else _as_array(generation.log_probs),
        None if is_whole else _as_array(generation.entropies),
    )


def pooled_characters(tokenizer: Tokenizer, tokens: NDArray[np.int64], n: int) -> Array:
    """Return the characters per row of real text, averaged over each operation's rows.

    Averaging gives a row that decodes to few characters no more weight than another.

    Args:
        tokenizer: decodes the tokens.
        tokens: (B, T), M rows of the first operation, then M of the second, ...
        n: N, operations.

    Returns:
        (B,), at least 1 / M, so that a division by it is finite.
    """
    characters = count_characters(tokenizer, tokens).reshape(n, -1)  # (N, M)
    n_rows = characters.shape[1]
    return np.repeat(characters.mean(1).clip(min=1 / n_rows), n_rows)


def _as_array(values: Tensor | None) -> Array | None:
    return None if values is None else np.asarray(values.double().cpu().numpy())
