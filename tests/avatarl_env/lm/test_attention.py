"""Tests of avatarl_env/lm/attention.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from avatarl_env.lm.attention import attention, attention_backend

HAS_FLASH = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def qkv(n_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n_tokens, 4, generator=generator, dtype=dtype) for _ in range(3)]


def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with an explicit mask, the last query on the last key."""
    n_queries, n_keys = q.size(2), k.size(2)
    scores = q @ k.mT / q.size(-1) ** 0.5
    for t in range(n_queries):
        scores[:, :, t, n_keys - n_queries + t + 1 :] = -torch.inf
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 33])
def test_attention_is_causal_softmax(n_tokens: int) -> None:
    q, k, v = qkv(n_tokens)
    expected = oracle(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected)
    torch.testing.assert_close(attention(q[:, :, -1:], k, v), expected[:, :, -1:])


@pytest.mark.parametrize(("n_queries", "n_keys"), [(2, 3), (7, 8), (3, 2), (2, 1), (0, 4)])
def test_some_but_not_all_queries_are_refused(n_queries: int, n_keys: int) -> None:
    q, k = torch.zeros(1, 1, n_queries, 2), torch.zeros(1, 1, n_keys, 2)
    with pytest.raises(ValueError, match=f"q must .* {n_keys}, got {n_queries}"):
        attention(q, k, k)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLASH, reason="needs a CUDA device and flash-attn")
@pytest.mark.parametrize("n_queries", [1, 32])
def test_flash_equals_the_oracle_on_the_gpu(n_queries: int) -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in qkv(32))
    q = q[:, :, -n_queries:]
    assert attention_backend(q.device, q.dtype) == "flash-attn"
    expected = oracle(q.float(), k.float(), v.float())
    torch.testing.assert_close(attention(q, k, v).float(), expected, atol=2e-2, rtol=2e-2)
