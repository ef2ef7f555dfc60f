"""Tests of avatarl_env/lm/attention.py."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

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
    """Softmax attention with the mask written out, the last query on the last key."""
    n_queries, n_keys = q.size(2), k.size(2)
    scores = q @ k.mT / q.size(-1) ** 0.5
    for t in range(n_queries):
        scores[:, :, t, n_keys - n_queries + t + 1 :] = -torch.inf
    return scores.softmax(-1) @ v


def flash_stand_in(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Take and return (B, T, H, D), as flash-attn does."""
    assert causal
    return oracle(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def test_blind_query_averages_what_it_may_see() -> None:
    q, k = torch.zeros(1, 1, 3, 1), torch.randn(1, 1, 3, 1)
    v = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    torch.testing.assert_close(attention(q, k, v).flatten(), torch.tensor([1.0, 1.5, 3.0]))


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 7, 33])
def test_whole_window_equals_softmax_with_the_mask_written_out(n_tokens: int) -> None:
    q, k, v = qkv(n_tokens)
    torch.testing.assert_close(attention(q, k, v), oracle(q, k, v))


@pytest.mark.parametrize("n_keys", [1, 2, 3, 64])
def test_last_query_alone_sees_all_keys_as_in_the_whole_window(n_keys: int) -> None:
    q, k, v = qkv(n_keys)
    torch.testing.assert_close(attention(q[:, :, -1:], k, v), oracle(q, k, v)[:, :, -1:])


def test_later_keys_and_values_do_not_move_earlier_results() -> None:
    q, k, v = qkv(8)
    before = attention(q, k, v)
    k[:, :, 5:] = 100.0
    v[:, :, 5:] = -100.0
    after = attention(q, k, v)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.allclose(before[:, :, 5:], after[:, :, 5:])


@pytest.mark.parametrize(("n_queries", "n_keys"), [(2, 3), (2, 8), (7, 8), (3, 2), (2, 1), (0, 4)])
def test_some_but_not_all_queries_are_refused(n_queries: int, n_keys: int) -> None:
    q, k = torch.zeros(1, 1, n_queries, 2), torch.zeros(1, 1, n_keys, 2)
    message = f"^q must hold one position or all {n_keys}, got {n_queries}$"
    with pytest.raises(ValueError, match=message):
        attention(q, k, k)


def test_backend_is_flash_only_for_half_precision_on_cuda_where_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    halves, fulls = (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
    monkeypatch.setattr(module, "_flash_attn_func", lambda: flash_stand_in)
    assert [attention_backend(cuda, dtype) for dtype in halves] == ["flash-attn"] * 2
    assert [attention_backend(cuda, dtype) for dtype in fulls] == ["sdpa"] * 2
    assert [attention_backend(cpu, dtype) for dtype in (*halves, *fulls)] == ["sdpa"] * 4
    monkeypatch.setattr(module, "_flash_attn_func", lambda: None)
    assert [attention_backend(cuda, dtype) for dtype in halves] == ["sdpa"] * 2


@pytest.mark.parametrize("n_queries", [1, 6])
def test_flash_path_hands_over_its_own_layout_and_turns_the_result_back(
    n_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(6)
    q = q[:, :, -n_queries:]
    monkeypatch.setattr(module, "attention_backend", lambda *_: "flash-attn")
    monkeypatch.setattr(module, "_flash_attn_func", lambda: flash_stand_in)
    torch.testing.assert_close(attention(q, k, v), oracle(q, k, v))


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError])
def test_absent_or_broken_flash_package_means_none(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        assert name == "flash_attn"
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    assert module._flash_attn_func.__wrapped__() is None


def test_installed_flash_package_gives_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(flash_attn_func=flash_stand_in)
    monkeypatch.setattr(importlib, "import_module", lambda _: package)
    assert module._flash_attn_func.__wrapped__() is flash_stand_in


def test_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    module._say_once.cache_clear()
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
