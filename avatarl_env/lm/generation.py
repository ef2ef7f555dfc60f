"""Sampling text from a language model with given noise.

The caller draws the uniforms, so that two models, or one model before and after surgery, can be
compared on the same noise. Nothing here depends on characters, scores or random generators.

Shapes: B rows, P prompt tokens, N new tokens, S positions seen, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

COLD = 1e-3
"""Below this temperature the largest logit is subtracted before the division."""


class KVCache:
    """Keys and values of the positions seen so far, preallocated.

    For sampling only: a backward pass through it raises.
    """

    def __init__(self, buffer: Tensor) -> None:
        """Start empty on a (L, 2, B, H, most positions, D) buffer."""
        self._buffer = buffer
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new (B, H, T, D) keys and values; return all S of that layer.

        Raises:
            ValueError: if the cache has no room for them.
        """
        stop = self.length + k.size(2)
        if stop > self._buffer.size(4):  # a slice would silently be cut short
            raise ValueError(
                f"cache must have room for {stop} positions, got one of {self._buffer.size(4)}"
            )
        self._buffer[layer, 0, :, :, self.length : stop] = k
        self._buffer[layer, 1, :, :, self.length : stop] = v
        return self._buffer[layer, 0, :, :, :stop], self._buffer[layer, 1, :, :, :stop]

    def advance(self, n_tokens: int) -> None:
        """Mark positions as seen, once every layer has appended them."""
        self.length += n_tokens

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0


class Cache(Protocol):
    """A cache, as generation needs it."""

    @property
    def length(self) -> int:
        """Positions seen."""

    def reset(self) -> None:
        """Forget every position."""


class LanguageModel(Protocol):
    """A model, as generation needs it."""

    @property
    def context(self) -> int:
        """Longest window the model can read, tokens."""

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> Cache:
        """Return an empty cache for `n_rows` rows and at least `n_positions`, if given."""

    def __call__(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Map tokens (B, T) to next-token logits (B, T, V)."""


class Generation(NamedTuple):
    """Result of `generate`."""

    tokens: Tensor
    """(B, P + N) int64: prompts and new tokens."""
    log_probs: Tensor
    """(B, N) log-probability of each new token under the sampling policy, nats."""
    distributions: Tensor | None
    """(B, N, V) log-probabilities of all tokens at each new position, or None if not asked for."""
    entropies: Tensor | None = None
    """(B, N) entropy of each new position's distribution, nats, or None if not asked for."""


def inverse_cdf(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token whose interval of [0, 1) contains each uniform.

    Args:
        log_probs: (..., V) normalised log-probabilities.
        uniforms: (..., K) in [0, 1).

    Returns:
        (..., K) int64. A token of probability zero is never returned; a row with a NaN gives
        token 0.
    """
    # Half precision is too coarse for a sum of many small numbers, and for the uniforms.
    probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)).exp()
    cdf = probs.cumsum(-1)
    if cdf.device.type != "cpu":  # a parallel scan rounds each prefix differently
        cdf = cdf.masked_fill(probs == 0, 0).cummax(-1).values
    cdf = cdf.masked_fill(cdf.isnan().any(-1, keepdim=True), 1.0)
    # Relative to the rounded total, a uniform below 1 always falls inside.
    total = cdf[..., -1:]
    points = torch.minimum(uniforms.to(cdf) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, points, right=True)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of logits (..., V) at a temperature, float32.

    Logits of +inf or NaN give NaN.
    """
    logits = logits.float()
    if temperature < COLD:  # the quotient may overflow, which is harmless for differences <= 0
        logits = logits - logits.amax(-1, keepdim=True)
    limits = torch.finfo(torch.float32)  # beyond them, the divisor would be 0 or infinite
    return torch.log_softmax(logits / min(max(temperature, limits.tiny), limits.max), dim=-1)


def keep_top(logits: Tensor, top_k: int | None) -> Tensor:
    """Return the logits (B, V) with all but the `top_k` largest of each row set to -inf.

    Ties with the last one are kept. None keeps all.
    """
    if top_k is None or top_k >= logits.size(-1):
        return logits
    least = logits.topk(top_k).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def _check(prompts: Tensor, uniforms: Tensor, temperature: float, top_k: int | None) -> None:
    if prompts.dim() != 2 or prompts.size(1) < 1:
        raise ValueError(f"prompts must be (B, P) with P >= 1, got {tuple(prompts.shape)}")
    if uniforms.dim() != 2 or uniforms.size(0) != prompts.size(0) or uniforms.size(1) < 1:
        raise ValueError(
            f"uniforms must be ({prompts.size(0)}, N) with N >= 1, got {tuple(uniforms.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


@torch.no_grad()
def generate(  # noqa: PLR0913 - each is one choice, by keyword
    model: LanguageModel,
    prompts: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    return_distributions: bool = False,
    return_entropies: bool = False,
    use_cache: bool = True,
) -> Generation:
    """Continue every prompt by one token per column of uniforms.

    When the text exceeds the context, only its last half-context is kept.

    Args:
        model: the language model; its weights and mode are not changed.
        prompts: (B, P) int64, P >= 1.
        uniforms: (B, N) in [0, 1): the noise, one for each new token.
        temperature: divides the logits, > 0 and finite; the log-probabilities are those of the
            tempered policy.
        top_k: sample from the `top_k` most probable tokens (and ties with the last of them); the
            log-probabilities are those of the truncated policy. Default all.
        return_distributions: also return the full distribution at every new position.
        return_entropies: also return their entropies, which takes much less memory.
        use_cache: False reads the whole window again for every token: slow, to check the cache.

    Returns:
        The tokens, their log-probabilities and, on request, the distributions and entropies.

    Raises:
        ValueError: if a shape, the temperature or `top_k` is out of range.
    """
    _check(prompts, uniforms, temperature, top_k)
    n_rows, n_prompt = prompts.size()
    n_total = n_prompt + uniforms.size(1)
    keep = max(1, model.context // 2)
    tokens = torch.cat([prompts, prompts.new_zeros(n_rows, n_total - n_prompt)], dim=1)
    start = 0 if n_prompt <= model.context else n_prompt - keep  # of the window
    # No wider than needed, so that the keys of all rows lie close together.
    cache = model.new_cache(n_rows, n_total - 1) if use_cache else None
    log_probs, distributions, entropies = [], [], []

    logits = model(tokens[:, start:n_prompt], cache)[:, -1]  # (B, V)
    for position in range(n_prompt, n_total):
        # 1) sample
        policy = tempered(keep_top(logits, top_k), temperature)
        token = inverse_cdf(policy, uniforms[:, position - n_prompt, None])  # (B, 1)
        tokens[:, position] = token[:, 0]
        log_probs.append(policy.gather(1, token)[:, 0])
        if return_distributions:
            distributions.append(policy)
        if return_entropies:
            entropies.append(torch.special.entr(policy.exp()).sum(-1))  # 0 where p is 0
        # 2) read the newest token, or the whole window if nothing of it is cached
        stop = position + 1
        if stop == n_total:
            break
        if stop - start > model.context:
            start = stop - keep
            if cache is not None:
                cache.reset()
        unread = start if cache is None or cache.length == 0 else position
        logits = model(tokens[:, unread:stop], cache)[:, -1]

    return Generation(
        tokens,
        torch.stack(log_probs, dim=1),
        torch.stack(distributions, dim=1) if return_distributions else None,
        torch.stack(entropies, dim=1) if return_entropies else None,
    )
