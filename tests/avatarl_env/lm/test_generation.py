"""Tests of avatarl_env/lm/generation.py."""

from __future__ import annotations

import math
import random
import re
import unittest.mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avatarl_env.lm.generation import Generation, KVCache, generate, inverse_cdf, tempered
from tests.fakes import UniformLM, fingerprint, tiny_gpt

BY_CONTEXT = [tiny_gpt(context=context) for context in range(1, 10)]
BELOW_ONE = 1 - 2**-53  # the largest float64 below 1; in float32 it rounds to 1


def dice(n_rows: int, n_new: int, seed: int = 0) -> Tensor:
    return torch.rand(n_rows, n_new, generator=torch.Generator().manual_seed(seed))


def some_tokens(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(16, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def stratified(n: int) -> Tensor:
    """The midpoints of n equal slices of [0, 1), float64."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


# --- inverse_cdf ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "uniform", "token"),
    [
        # slices [0, .25), [.25, .5), [.5, 1)
        ([0.25, 0.25, 0.5], 0.0, 0),
        ([0.25, 0.25, 0.5], 0.2499, 0),
        ([0.25, 0.25, 0.5], 0.25, 1),
        ([0.25, 0.25, 0.5], 0.4999, 1),
        ([0.25, 0.25, 0.5], 0.5, 2),
        ([0.25, 0.25, 0.5], BELOW_ONE, 2),
        # empty slices, at both ends and between
        ([0.0, 0.5, 0.0, 0.5, 0.0], 0.0, 1),
        ([0.0, 0.5, 0.0, 0.5, 0.0], 0.5, 3),
        ([0.0, 0.5, 0.0, 0.5, 0.0], BELOW_ONE, 3),
        ([0.0, 0.0, 1.0], 0.0, 2),
        ([1.0, 0.0, 0.0], BELOW_ONE, 0),
        ([1.0], 0.0, 0),
        ([1.0], BELOW_ONE, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_whose_slice_holds_the_uniform(
    probs: list[float], uniform: float, token: int, dtype: torch.dtype
) -> None:
    log_probs = torch.tensor(probs, dtype=dtype).log()
    picked = inverse_cdf(log_probs, torch.tensor([uniform], dtype=torch.float64))
    assert picked.dtype == torch.int64
    assert picked.tolist() == [token]


def test_shapes_are_rows_by_draws() -> None:
    log_probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).log()  # (1, 2, 2)
    uniforms = torch.tensor([[[0.1, 0.6, 0.9], [0.1, 0.6, 0.9]]])  # (1, 2, 3)
    assert inverse_cdf(log_probs, uniforms).tolist() == [[[0, 1, 1], [0, 0, 0]]]


@settings(max_examples=150, deadline=None, derandomize=True)
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
    # Near its slice, too: what lies before it and after it leaves room for the uniform.
    probs = log_probs.double().exp() / log_probs.double().exp().sum()
    tolerance = 1e-5
    assert probs[:token].sum() <= uniform + tolerance
    assert probs[: token + 1].sum() >= uniform - tolerance


@given(n_nan=st.integers(1, 3), position=st.integers(0, 4), uniform=st.floats(0, 0.999))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_row_with_a_nan_gives_token_0_and_leaves_its_neighbours_alone(
    n_nan: int, position: int, uniform: float
) -> None:
    log_probs = torch.full((3, 5), 0.2).log()
    log_probs[1, position : position + n_nan] = math.nan
    picked = inverse_cdf(log_probs, torch.full((3, 1), uniform))[:, 0].tolist()
    assert picked[1] == 0
    assert picked[0] == picked[2] == int(uniform * 5 + 1e-6)


def test_evenly_spread_uniforms_give_every_token_its_share() -> None:
    probs = torch.tensor([0.1, 0.0, 0.35, 0.05, 0.5], dtype=torch.float64)
    counts = inverse_cdf(probs.log(), stratified(10_000)).bincount(minlength=5)
    assert (counts - probs * 10_000).abs().max() <= 1
    assert counts[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shares_are_right_in_half_precision_too(dtype: torch.dtype) -> None:
    """A running sum kept in bfloat16 would give these 65 equal tokens from 81 to 135 percent."""
    log_probs = torch.full((65,), 1 / 65).log().to(dtype)
    counts = inverse_cdf(log_probs, stratified(6500)).bincount(minlength=65)
    assert (counts - 100).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_parallel_sum_picks_no_token_of_probability_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(256, 4096, generator=generator)
    probs[:, 1::2] = 0
    log_probs = (probs / probs.sum(-1, keepdim=True)).log().cuda()
    # Uniforms on the boundaries themselves, where the rounding of the sum decides.
    uniforms = log_probs.exp().cumsum(-1).clamp(max=1 - 2**-24)
    picked = inverse_cdf(log_probs, uniforms)
    assert log_probs.gather(-1, picked).min() > -math.inf


# --- generate: what it returns -------------------------------------------------------------------


def test_shapes_and_kinds() -> None:
    model, prompts = tiny_gpt(), some_tokens(3, 4)
    written = generate(model, prompts, dice(3, 7), return_distributions=True)
    assert isinstance(written, Generation)
    assert written.tokens.shape == (3, 11)
    assert written.tokens.dtype == torch.int64
    assert torch.equal(written.tokens[:, :4], prompts)
    assert written.log_probs.shape == (3, 7)
    assert written.distributions is not None
    assert written.distributions.shape == (3, 7, 16)
    assert not written.log_probs.requires_grad
    assert generate(model, prompts, dice(3, 7)).distributions is None


def test_a_uniform_model_writes_the_dice() -> None:
    uniforms = torch.tensor([[0.0, 0.25, 0.5, 0.9375], [0.999, 0.1, 0.3, 0.06]])
    written = generate(UniformLM(16), torch.zeros(2, 1, dtype=torch.long), uniforms)
    assert written.tokens[:, 1:].tolist() == [[0, 4, 8, 15], [15, 1, 4, 0]]
    torch.testing.assert_close(written.log_probs, torch.full((2, 4), -math.log(16)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("use_cache", [True, False])
def test_log_probs_and_distributions_equal_one_forward_over_the_text(
    temperature: float, use_cache: bool
) -> None:
    model, prompts = tiny_gpt(), some_tokens(4, 5)
    written = generate(
        model,
        prompts,
        dice(4, 11),
        temperature=temperature,
        return_distributions=True,
        use_cache=use_cache,
    )
    logits = model(written.tokens)[:, 4:-1]
    expected = torch.log_softmax(logits / temperature, dim=-1)
    assert written.distributions is not None
    torch.testing.assert_close(written.distributions, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        written.distributions.exp().sum(-1), torch.ones(4, 11), atol=1e-5, rtol=0
    )
    chosen = written.distributions.gather(-1, written.tokens[:, 5:, None])[..., 0]
    assert torch.equal(written.log_probs, chosen)
    assert torch.equal(
        written.tokens[:, 5:],
        inverse_cdf(written.distributions, dice(4, 11)[..., None])[..., 0],
    )


@pytest.mark.parametrize("temperature", [1.0, 0.25, 1e-3])
def test_entropies_are_those_of_the_distributions(temperature: float) -> None:
    """Nothing comes from where the probability is zero, as most are at the lowest temperature."""
    model, prompts = tiny_gpt(), some_tokens(4, 5)
    options = {"temperature": temperature, "return_distributions": True}
    assert generate(model, prompts, dice(4, 11), **options).entropies is None
    written = generate(model, prompts, dice(4, 11), return_entropies=True, **options)
    assert written.distributions is not None
    assert written.entropies is not None
    log_p = written.distributions.double()
    expected = -(log_p.exp() * log_p.clamp_min(-1e9)).sum(-1)
    torch.testing.assert_close(written.entropies.double(), expected, atol=1e-5, rtol=1e-5)
    alone = generate(model, prompts, dice(4, 11), temperature=temperature, return_entropies=True)
    assert alone.distributions is None
    assert torch.equal(alone.entropies, written.entropies)
    assert torch.equal(alone.tokens, written.tokens)


def test_tokens_follow_the_models_frequencies() -> None:
    """Evenly spread dice for the first new token give each token its share, to one draw."""
    model = tiny_gpt()
    prompt = torch.tensor([[3, 1, 2]])
    probs = model(prompt)[0, -1].softmax(-1).double()
    written = generate(model, prompt.expand(2000, 3), stratified(2000)[:, None])
    counts = written.tokens[:, 3].bincount(minlength=16)
    assert (counts - 2000 * probs).abs().max() <= 1.1
    assert probs.max() > 0.2  # so that it is not the uniform model over again


def test_a_low_temperature_takes_the_likeliest_and_a_high_one_all_alike() -> None:
    model, prompts = tiny_gpt(), some_tokens(8, 4)
    best = model(prompts)[:, -1].argmax(-1)
    cold = generate(model, prompts, dice(8, 1), temperature=1e-3)
    assert torch.equal(cold.tokens[:, 4], best)
    hot = generate(model, prompts, dice(8, 1), temperature=1e6, return_distributions=True)
    assert hot.distributions is not None
    torch.testing.assert_close(
        hot.distributions, torch.full((8, 1, 16), -math.log(16)), atol=1e-4, rtol=0
    )


def test_half_precision_model_gives_full_precision_policy() -> None:
    model, prompts = tiny_gpt().bfloat16(), some_tokens(4, 5)
    written = generate(model, prompts, dice(4, 11), return_distributions=True)
    assert written.distributions is not None
    assert written.log_probs.dtype == torch.float32
    torch.testing.assert_close(
        written.distributions.exp().sum(-1), torch.ones(4, 11), atol=1e-5, rtol=0
    )


def test_broken_weights_write_token_0_and_say_nan() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    written = generate(model, some_tokens(2, 3), dice(2, 20))
    assert written.tokens[:, 3:].eq(0).all()
    assert written.log_probs.isnan().all()


# --- generate: the cache, and texts longer than the context --------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("context", "n_prompt", "n_new"),
    [
        (16, 1, 15),  # just fits
        (16, 16, 1),  # prompt of exactly the context, nothing more to read
        (16, 16, 40),
        (16, 5, 60),  # several restarts
        (16, 17, 30),  # prompt one longer than the context
        (16, 50, 30),
        (5, 3, 30),  # odd context
        (3, 7, 20),
        (2, 1, 12),
        (2, 2, 12),
        (2, 5, 12),
        (1, 1, 12),
        (1, 4, 12),
    ],
)
def test_cache_changes_no_token(context: int, n_prompt: int, n_new: int, seed: int) -> None:
    model = tiny_gpt(seed, context=context)
    prompts, uniforms = some_tokens(3, n_prompt, seed), dice(3, n_new, seed)
    fast = generate(model, prompts, uniforms, return_distributions=True)
    slow = generate(model, prompts, uniforms, return_distributions=True, use_cache=False)
    assert torch.equal(fast.tokens, slow.tokens)
    torch.testing.assert_close(fast.log_probs, slow.log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.distributions, slow.distributions, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(context=st.integers(1, 9), n_prompt=st.integers(1, 12), n_new=st.integers(1, 20))
def test_a_cache_no_wider_than_needed_changes_no_token(
    context: int, n_prompt: int, n_new: int
) -> None:
    """Whatever fits, just fits, or has to start again."""
    model = BY_CONTEXT[context - 1]
    prompts, uniforms = some_tokens(2, n_prompt), dice(2, n_new)
    asked: list[tuple[int, int | None]] = []
    new_cache = model.new_cache

    def noted(n_rows: int, n_positions: int | None = None) -> KVCache:
        asked.append((n_rows, n_positions))
        return new_cache(n_rows, n_positions)

    with unittest.mock.patch.object(model, "new_cache", noted):
        fast = generate(model, prompts, uniforms, return_distributions=True)
    slow = generate(model, prompts, uniforms, return_distributions=True, use_cache=False)
    assert asked == [(2, n_prompt + n_new - 1)]  # the last token is not read
    assert torch.equal(fast.tokens, slow.tokens)
    torch.testing.assert_close(fast.distributions, slow.distributions, atol=1e-4, rtol=1e-4)


# (start, stop) of every window read. The context is 4, so a restart keeps 2.
WINDOWS = {
    # prompt of 3: grows to 4; the 5th makes it start again with the last two, and so on
    (3, 6): [(0, 3), (0, 4), (3, 5), (3, 6), (3, 7), (6, 8)],
    # prompt of exactly the context
    (4, 3): [(0, 4), (3, 5), (3, 6)],
    # prompt longer than the context: its last two
    (7, 4): [(5, 7), (5, 8), (5, 9), (8, 10)],
    (5, 1): [(3, 5)],
}


@pytest.mark.parametrize(("lengths", "windows"), WINDOWS.items())
@pytest.mark.parametrize("use_cache", [True, False])
def test_windows_by_hand(
    lengths: tuple[int, int], windows: list[tuple[int, int]], use_cache: bool
) -> None:
    n_prompt, n_new = lengths
    model = UniformLM(64, context=4)
    prompts = torch.arange(2 * n_prompt).view(2, n_prompt)
    tokens = generate(model, prompts, dice(2, n_new), use_cache=use_cache).tokens
    expected, read = [], (-1, -1)
    for start, stop in windows:
        again = not use_cache or start != read[0]
        expected.append(tokens[:, (start if again else stop - 1) : stop].tolist())
        read = (start, stop)
    assert [seen.tolist() for seen in model.seen] == expected


@pytest.mark.parametrize(("context", "n_windows"), [(1, 6), (2, 6)])
def test_tiniest_contexts_read_the_newest_token(context: int, n_windows: int) -> None:
    """With a context of 1 or 2 a restart keeps one token; at 2 it then grows to two again."""
    model = UniformLM(16, context=context)
    tokens = generate(model, torch.tensor([[1, 2, 3]]), dice(1, 6), use_cache=False).tokens[0]
    assert len(model.seen) == n_windows
    lengths = [1] * 6 if context == 1 else [1, 2, 1, 2, 1, 2]
    for i, (seen, length) in enumerate(zip(model.seen, lengths, strict=True)):
        assert seen[0].tolist() == tokens[3 + i - length : 3 + i].tolist()


def test_rows_do_not_mix() -> None:
    model, prompts, uniforms = tiny_gpt(), some_tokens(3, 6), dice(3, 30)
    together = generate(model, prompts, uniforms)
    for row in range(3):
        alone = generate(model, prompts[row, None], uniforms[row, None])
        assert torch.equal(alone.tokens[0], together.tokens[row])


def test_a_longer_generation_begins_with_the_shorter_one() -> None:
    model, prompts, uniforms = tiny_gpt(), some_tokens(2, 6), dice(2, 30)
    long, short = generate(model, prompts, uniforms), generate(model, prompts, uniforms[:, :9])
    assert torch.equal(long.tokens[:, :15], short.tokens)
    torch.testing.assert_close(long.log_probs[:, :9], short.log_probs)


# --- generate: what it leaves alone, what it refuses ---------------------------------------------


def test_model_prompts_dice_and_generators_are_left_alone() -> None:
    model, prompts, uniforms = tiny_gpt(), some_tokens(2, 6), dice(2, 30)
    model.train()
    weights, given_prompts, given_dice = fingerprint(model), prompts.clone(), uniforms.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = generate(model, prompts, uniforms)
    second = generate(model, prompts, uniforms)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.log_probs, second.log_probs)
    assert model.training
    assert fingerprint(model) == weights
    assert torch.equal(prompts, given_prompts)
    assert torch.equal(uniforms, given_dice)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_mode_of_the_caller_does_not_matter(mode: type) -> None:
    model, prompts, uniforms = tiny_gpt(), some_tokens(2, 6), dice(2, 30)
    expected = generate(model, prompts, uniforms)
    with mode():
        written = generate(model, prompts, uniforms)
    assert torch.equal(written.tokens, expected.tokens)
    assert torch.equal(written.log_probs, expected.log_probs)


def test_no_rows_are_no_error() -> None:
    written = generate(tiny_gpt(), some_tokens(0, 3), dice(0, 4))
    assert written.tokens.shape == (0, 7)
    assert written.log_probs.shape == (0, 4)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (2, 3, 1), ()])
def test_prompts_must_be_rows_of_tokens(shape: tuple[int, ...]) -> None:
    message = re.escape(f"prompts must be (B, P) with P >= 1, got {shape}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(tiny_gpt(), torch.zeros(shape, dtype=torch.long), dice(2, 4))


@pytest.mark.parametrize("shape", [(4,), (2, 0), (3, 4), (1, 4), (2, 4, 1)])
def test_uniforms_must_be_a_row_for_each_prompt(shape: tuple[int, ...]) -> None:
    message = re.escape(f"uniforms must be (2, N) with N >= 1, got {shape}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(tiny_gpt(), some_tokens(2, 3), torch.zeros(shape))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-40, 5e-324])
def test_the_colder_the_surer_down_to_the_smallest_number(temperature: float) -> None:
    model, prompts = tiny_gpt(), some_tokens(2, 3)
    cold = generate(model, prompts, dice(2, 4), temperature=temperature)
    tokens = prompts
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cold.tokens, tokens)
    assert torch.isfinite(cold.log_probs).all()


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_the_hotter_the_more_uniform_up_to_the_largest_number(temperature: float) -> None:
    logits = torch.tensor([[3.0, -2.0, 0.0, -math.inf]])
    policy = tempered(logits, temperature)
    assert policy.exp()[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_at_temperature_one_the_log_probabilities_are_those_of_the_logits() -> None:
    logits = 10 * torch.randn(50, 65, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tempered(logits, 1.0), torch.log_softmax(logits, -1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive_and_finite(temperature: float) -> None:
    message = f"^temperature must be positive and finite, got {temperature}$"
    with pytest.raises(ValueError, match=message):
        generate(tiny_gpt(), some_tokens(2, 3), dice(2, 4), temperature=temperature)


# --- the most probable tokens --------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 16, 1000])
def test_only_the_most_probable_tokens_are_drawn(top_k: int, use_cache: bool) -> None:
    model, prompts, uniforms = tiny_gpt(context=8), some_tokens(4, 3), dice(4, 30)
    options = {"use_cache": use_cache, "return_distributions": True, "return_entropies": True}
    written = generate(model, prompts, uniforms, top_k=top_k, temperature=0.7, **options)
    whole = generate(model, prompts, uniforms, temperature=0.7, **options)
    assert written.distributions is not None
    assert written.entropies is not None
    kept = written.distributions.isfinite()
    assert (kept.sum(-1) == min(top_k, 16)).all()
    torch.testing.assert_close(written.distributions.exp().sum(-1), torch.ones(4, 30))
    assert kept.gather(2, written.tokens[:, 3:, None]).all()
    assert written.entropies.isfinite().all()
    if top_k >= 16:
        assert torch.equal(written.tokens, whole.tokens)
        assert torch.equal(written.distributions, whole.distributions)
    if top_k == 1:
        assert (written.log_probs == 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_is_the_same_with_and_without_a_cache(top_k: int) -> None:
    model, prompts, uniforms = tiny_gpt(context=8), some_tokens(6, 5), dice(6, 40)
    cached, naive = (
        generate(model, prompts, uniforms, top_k=top_k, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached.tokens, naive.tokens)
    torch.testing.assert_close(cached.log_probs, naive.log_probs, atol=1e-5, rtol=0)


def test_tokens_as_probable_as_the_last_one_kept_are_kept() -> None:
    written = generate(UniformLM(8), some_tokens(1, 1) % 8, dice(1, 4), top_k=2)
    torch.testing.assert_close(written.log_probs, torch.full((1, 4), -math.log(8)))


@pytest.mark.parametrize("top_k", [0, -3])
def test_top_k_keeps_something(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        generate(tiny_gpt(), some_tokens(1, 1), dice(1, 1), top_k=top_k)
