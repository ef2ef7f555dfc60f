"""Tests of avatarl_env/lm/generation.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatarl_env.lm.generation import generate, inverse_cdf, tempered
from tests.fakes import UniformLM, tiny_gpt

BY_CONTEXT = [tiny_gpt(context=context) for context in range(1, 10)]
BELOW_ONE = 1 - 2**-53  # the largest float64 below 1; in float32 it rounds to 1
ALL: dict[str, bool] = {"return_distributions": True, "return_entropies": True}


def noise(n_rows: int, n_new: int, seed: int = 0) -> Tensor:
    return torch.rand(n_rows, n_new, generator=torch.Generator().manual_seed(seed))


def some_tokens(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(16, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def stratified(n: int) -> Tensor:
    """The midpoints of n equal intervals of [0, 1), float64."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


# --- inverse_cdf ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "uniforms", "tokens"),
    [
        # intervals [0, .25), [.25, .5), [.5, 1)
        ([0.25, 0.25, 0.5], [0.0, 0.2499, 0.25, 0.4999, 0.5, BELOW_ONE], [0, 0, 1, 1, 2, 2]),
        # empty intervals, at both ends and between
        ([0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.5, BELOW_ONE], [1, 3, 3]),
        ([0.0, 0.0, 1.0], [0.0, BELOW_ONE], [2, 2]),
        ([1.0, 0.0, 0.0], [0.0, BELOW_ONE], [0, 0]),
        ([1.0], [0.0, BELOW_ONE], [0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_whose_interval_contains_the_uniform(
    probs: list[float], uniforms: list[float], tokens: list[int], dtype: torch.dtype
) -> None:
    log_probs = torch.tensor(probs, dtype=dtype).log()
    picked = inverse_cdf(log_probs, torch.tensor(uniforms, dtype=torch.float64))
    assert picked.dtype == torch.int64
    assert picked.tolist() == tokens


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    logits=st.lists(
        st.one_of(st.just(-math.inf), st.floats(-200, 50, width=32)), min_size=1, max_size=40
    ).filter(lambda logits: max(logits) > -math.inf),
    uniform=st.one_of(
        st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, BELOW_ONE, 1 - 2**-24, 2**-149])
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_token_of_probability_zero_is_never_picked(
    logits: list[float], uniform: float, dtype: torch.dtype
) -> None:
    log_probs = torch.log_softmax(torch.tensor(logits).to(dtype), dim=0)
    (token,) = inverse_cdf(log_probs, torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert 0 <= token < len(logits)
    assert log_probs[token] > -math.inf
    probs = log_probs.double().exp() / log_probs.double().exp().sum()
    assert probs[:token].sum() - 1e-5 <= uniform <= probs[: token + 1].sum() + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_evenly_spread_uniforms_draw_every_token_in_proportion(dtype: torch.dtype) -> None:
    """A running sum kept in bfloat16 would give these 65 equal tokens from 81 to 135 percent."""
    log_probs = torch.full((66,), 1 / 65).log().to(dtype)
    log_probs[3] = -torch.inf
    counts = inverse_cdf(log_probs, stratified(6500)).bincount(minlength=66)
    assert counts[3] == 0
    assert (counts[torch.arange(66) != 3] - 100).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_parallel_sum_picks_no_token_of_probability_zero() -> None:
    probs = torch.rand(256, 4096, generator=torch.Generator().manual_seed(0))
    probs[:, 1::2] = 0
    log_probs = (probs / probs.sum(-1, keepdim=True)).log().cuda()
    # Uniforms on the boundaries themselves, where the rounding of the sum decides.
    uniforms = log_probs.exp().cumsum(-1).clamp(max=1 - 2**-24)
    picked = inverse_cdf(log_probs, uniforms)
    assert log_probs.gather(-1, picked).min() > -math.inf


# --- what generate returns -----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.25, 1.0, 1.2])
@pytest.mark.parametrize("use_cache", [True, False])
def test_results_equal_one_forward_over_the_text(temperature: float, use_cache: bool) -> None:
    model, prompts, uniforms = tiny_gpt(), some_tokens(4, 5), noise(4, 11)
    written = generate(
        model, prompts, uniforms, temperature=temperature, use_cache=use_cache, **ALL
    )
    assert written.tokens.shape == (4, 16)
    assert written.tokens.dtype == torch.int64
    assert torch.equal(written.tokens[:, :5], prompts)
    log_p = written.distributions
    assert log_p is not None
    assert not log_p.requires_grad
    expected = torch.log_softmax(model(written.tokens)[:, 4:-1] / temperature, dim=-1)
    torch.testing.assert_close(log_p, expected, atol=1e-4 + 1e-6 / temperature, rtol=1e-4)
    assert torch.equal(written.log_probs, log_p.gather(-1, written.tokens[:, 5:, None])[..., 0])
    assert torch.equal(written.tokens[:, 5:], inverse_cdf(log_p, uniforms[..., None])[..., 0])
    p = log_p.double().exp()  # mostly zero at the lowest temperature
    entropies = -(p * log_p.double().clamp_min(-1e9)).sum(-1)
    assert written.entropies is not None
    torch.testing.assert_close(written.entropies.double(), entropies, atol=1e-5, rtol=1e-5)


# --- the cache, and texts longer than the context ------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(context=st.integers(1, 9), n_prompt=st.integers(1, 12), n_new=st.integers(1, 20))
def test_cache_changes_no_token_in_the_tiniest_contexts(
    context: int, n_prompt: int, n_new: int
) -> None:
    assert_cache_changes_nothing(BY_CONTEXT[context - 1], n_prompt, n_new)


def assert_cache_changes_nothing(
    model: torch.nn.Module, n_prompt: int, n_new: int, seed: int = 0
) -> None:
    prompts, uniforms = some_tokens(3, n_prompt, seed), noise(3, n_new, seed)
    fast, slow = (
        generate(model, prompts, uniforms, return_distributions=True, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(fast.tokens, slow.tokens)
    torch.testing.assert_close(fast.log_probs, slow.log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.distributions, slow.distributions, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("n_prompt", "n_new", "windows"),
    # (start, stop) of every window read. The context is 4, so a restart keeps 2.
    [
        # a prompt of 3 grows to 4; the 5th makes it start again with the last two, and so on
        (3, 6, [(0, 3), (0, 4), (3, 5), (3, 6), (3, 7), (6, 8)]),
        (4, 3, [(0, 4), (3, 5), (3, 6)]),  # a prompt of exactly the context
        (7, 4, [(5, 7), (5, 8), (5, 9), (8, 10)]),  # a longer prompt: its last two
        (5, 1, [(3, 5)]),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_windows_by_hand(
    n_prompt: int, n_new: int, windows: list[tuple[int, int]], use_cache: bool
) -> None:
    model = UniformLM(64, context=4)
    prompts = torch.arange(2 * n_prompt).view(2, n_prompt)
    tokens = generate(model, prompts, noise(2, n_new), use_cache=use_cache).tokens
    expected, read = [], (-1, -1)
    for start, stop in windows:
        again = not use_cache or start != read[0]
        expected.append(tokens[:, (start if again else stop - 1) : stop].tolist())
        read = (start, stop)
    assert [seen.tolist() for seen in model.seen] == expected


@pytest.mark.parametrize(
    ("prompts", "uniforms", "options", "message"),
    [
        ((3,), (2, 4), {}, r"prompts .* \(3,\)"),
        ((2, 0), (2, 4), {}, r"prompts .* \(2, 0\)"),
        ((2, 3, 1), (2, 4), {}, r"prompts .* \(2, 3, 1\)"),
        ((2, 3), (4,), {}, r"uniforms .*\(2, N\).* \(4,\)"),
        ((2, 3), (2, 0), {}, r"uniforms .* \(2, 0\)"),
        ((2, 3), (3, 4), {}, r"uniforms .* \(3, 4\)"),
        *[
            ((2, 3), (2, 4), {"temperature": value}, f"temperature .* {value}")
            for value in (0.0, -1.0, math.nan, math.inf)
        ],
        *[((2, 3), (2, 4), {"top_k": value}, f"top_k .* {value}") for value in (0, -3)],
    ],
)
def test_bad_arguments_are_refused(
    prompts: tuple[int, ...], uniforms: tuple[int, ...], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(
            tiny_gpt(), torch.zeros(prompts, dtype=torch.long), torch.zeros(uniforms), **options
        )


# --- temperature and top_k -----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 5e-324])
def test_a_low_temperature_takes_the_most_probable_token(temperature: float) -> None:
    model, prompts = tiny_gpt(), some_tokens(2, 3)
    cold = generate(model, prompts, noise(2, 4), temperature=temperature)
    tokens = prompts
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cold.tokens, tokens)
    assert torch.isfinite(cold.log_probs).all()


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_a_high_temperature_is_uniform_over_the_possible_tokens(temperature: float) -> None:
    logits = torch.tensor([[3.0, -2.0, 0.0, -math.inf]])
    policy = tempered(logits, temperature)
    assert policy.exp()[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])
    assert torch.equal(tempered(logits, 1.0), torch.log_softmax(logits, -1))


@pytest.mark.parametrize("top_k", [1, 3, 16, 1000])
def test_only_the_most_probable_tokens_are_drawn(top_k: int) -> None:
    model, prompts, uniforms = tiny_gpt(context=8), some_tokens(4, 3), noise(4, 30)
    cut = generate(model, prompts, uniforms, top_k=top_k, temperature=0.7, **ALL)
    slow = generate(model, prompts, uniforms, top_k=top_k, temperature=0.7, use_cache=False)
    whole = generate(model, prompts, uniforms, temperature=0.7, **ALL)
    assert torch.equal(cut.tokens, slow.tokens)
    assert cut.distributions is not None
    kept = cut.distributions.isfinite()
    assert (kept.sum(-1) == min(top_k, 16)).all()
    torch.testing.assert_close(cut.distributions.exp().sum(-1), torch.ones(4, 30))
    assert kept.gather(2, cut.tokens[:, 3:, None]).all()
    assert cut.entropies is not None
    assert cut.entropies.isfinite().all()
    assert torch.equal(cut.tokens, whole.tokens) == (top_k >= 16)
    assert bool((cut.log_probs == 0).all()) == (top_k == 1)
