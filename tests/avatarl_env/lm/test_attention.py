"""Tests of avatarl_env/lm/attention.py."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from avatarl_env.lm import attention as module
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


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """The package is looked up once, and the backend logged once, in each process."""
    caches = module._flash_attn_func, module._log_once
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


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


@pytest.mark.usefixtures("fresh_caches")
def test_flash_attention_is_used_for_half_precision_on_cuda_where_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    halves, fulls = (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
    installed = types.ModuleType("flash_attn")
    installed.flash_attn_func = oracle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    assert [attention_backend(cuda, dtype) for dtype in halves] == ["flash-attn"] * 2
    assert [attention_backend(cuda, dtype) for dtype in fulls] == ["sdpa"] * 2
    assert [attention_backend(cpu, dtype) for dtype in (*halves, *fulls)] == ["sdpa"] * 4


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize("package", [None, types.ModuleType("flash_attn")])
def test_a_missing_or_broken_flash_package_is_not_used(
    package: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert attention_backend(torch.device("cuda"), torch.bfloat16) == "sdpa"


@pytest.mark.usefixtures("fresh_caches")
@pytest.mark.parametrize("n_queries", [1, 6])
def test_flash_attention_gets_its_own_layout(
    n_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in takes and returns (B, T, H, D)."""

    def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        assert causal
        return oracle(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(module, "attention_backend", lambda *_: "flash-attn")
    q, k, v = qkv(6)
    q = q[:, :, -n_queries:]
    torch.testing.assert_close(attention(q, k, v), oracle(q, k, v))


@pytest.mark.usefixtures("fresh_caches")
def test_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=module.__name__):
        attention(*qkv(2))
        attention(*qkv(3))
    assert caplog.messages == ["attention backend: sdpa"]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLASH, reason="needs a CUDA device and flash-attn")
@pytest.mark.parametrize("n_queries", [1, 32])
def test_flash_equals_the_oracle_on_the_gpu(n_queries: int) -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in qkv(32))
    q = q[:, :, -n_queries:]
    assert attention_backend(q.device, q.dtype) == "flash-attn"
    expected = oracle(q.float(), k.float(), v.float())
    torch.testing.assert_close(attention(q, k, v).float(), expected, atol=2e-2, rtol=2e-2)
