"""Causal attention: flash-attn on a CUDA device if it is installed, else torch's SDPA.

Shapes: B batch, H heads, T queries, S keys (S >= T), D head dim.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


@functools.cache
def _flash_attn_func() -> Callable[..., Tensor] | None:
    """Return flash-attn's kernel, or None if the package is missing or broken."""
    try:
        kernel: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError, OSError):
        return None
    return kernel


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name the kernel that `attention` uses: `"flash-attn"` or `"sdpa"`.

    flash-attn is used on a CUDA device in half precision, if it can be imported.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return "flash-attn" if device.type == "cuda" and half and _flash_attn_func() else "sdpa"


@functools.cache
def _log_once(backend: str) -> None:
    logger.info("attention backend: %s", backend)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention; the queries are the last `T` of the `S` positions.

    Either all positions are queries (`T == S`) or only the last one (`T == 1`, a decoding step). So
    SDPA's causal mask, which is aligned to the upper left, is either right or not needed.

    Args:
        q: (B, H, T, D) queries.
        k: (B, H, S, D) keys.
        v: (B, H, S, D) values.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: if `1 < T < S`.
    """
    n_queries, n_keys = q.size(2), k.size(2)
    if n_queries not in (1, n_keys):
        raise ValueError(f"q must hold one position or all {n_keys}, got {n_queries}")
    backend = attention_backend(q.device, q.dtype)
    _log_once(backend)
    if backend == "flash-attn":
        kernel = _flash_attn_func()
        assert kernel is not None
        # flash-attn takes (B, T, H, D) and aligns its causal mask to the lower right.
        return kernel(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=n_queries == n_keys and n_keys > 1)
