"""Tests of avatarl_env/lm/gpt.py."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from avatarl_env.lm.gpt import GPT, GPTConfig, parameter_shapes, rotary_table, rotate
from tests.fakes import fingerprint, reference_logits, tiny_gpt


def some_tokens(n_rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(16, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vocab_size", "context", "n_layers", "n_heads", "width"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
        GPTConfig(**{"vocab_size": 16, name: value})


@pytest.mark.parametrize(
    ("width", "n_heads"),
    [(32, 3), (32, 5), (4, 8), (12, 4), (5, 5), (1, 1)],  # 12 / 4, 5 / 5 and 1 / 1 are odd
)
def test_heads_must_divide_the_width_into_even_head_dims(width: int, n_heads: int) -> None:
    message = (
        f"^n_heads must divide width into even head dims, got width={width} and n_heads={n_heads}$"
    )
    with pytest.raises(ValueError, match=message):
        GPTConfig(vocab_size=16, width=width, n_heads=n_heads)


def test_head_dim_is_width_over_heads() -> None:
    assert GPTConfig(vocab_size=16, width=48, n_heads=6).head_dim == 8


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 1},
        {"context": 1},
        {"n_layers": 1},
        {"width": 2, "n_heads": 1},
        {"width": 64, "n_heads": 32},
    ],
)
def test_smallest_and_oddest_sizes_work(sizes: dict[str, int]) -> None:
    model = tiny_gpt(**sizes)
    tokens = torch.zeros(2, model.context, dtype=torch.long)
    logits = model(tokens)
    assert logits.shape == (2, model.context, model.config.vocab_size)
    torch.testing.assert_close(
        logits.double(), reference_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_equals_a_second_implementation(seed: int) -> None:
    model, tokens = tiny_gpt(seed), some_tokens(3, 16, seed)
    torch.testing.assert_close(
        model(tokens).double(), reference_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("position", [1, 7, 15])
def test_a_token_cannot_move_earlier_logits(position: int) -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    changed = tokens.clone()
    changed[:, position] = (tokens[:, position] + 1) % 16
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :position], after[:, :position], atol=1e-6, rtol=0)
    moved = (before[:, position:] - after[:, position:]).abs().amax(-1)
    assert (moved > 1e-4).all()


def test_a_prefix_gives_the_same_logits_alone() -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    torch.testing.assert_close(model(tokens[:, :6]), model(tokens)[:, :6])


def test_rows_of_a_batch_do_not_mix() -> None:
    model, tokens = tiny_gpt(), some_tokens(3, 9)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone)


def test_window_longer_than_the_context_is_refused() -> None:
    model = tiny_gpt(context=8)
    assert model(some_tokens(1, 8)).shape == (1, 8, 16)
    with pytest.raises(ValueError, match=r"^tokens must end within context=8, got 9$"):
        model(some_tokens(1, 9))


@pytest.mark.parametrize("n_prompt", [1, 2, 7, 15, 16])
def test_reading_through_a_cache_gives_the_logits_of_the_whole_window(n_prompt: int) -> None:
    model, tokens = tiny_gpt(), some_tokens(3, 16)
    cache = model.new_cache(3)
    pieces = [model(tokens[:, :n_prompt], cache)]
    pieces += [model(tokens[:, t : t + 1], cache) for t in range(n_prompt, 16)]
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))


def test_cache_is_used_again_after_a_reset() -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 12)
    cache = model.new_cache(2)
    model(tokens, cache)
    cache.reset()
    assert cache.length == 0
    torch.testing.assert_close(model(tokens[:, 5:], cache), model(tokens[:, 5:]))


def test_a_backward_through_a_cache_is_refused() -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    logits = model(tokens, model.new_cache(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_full_cache_refuses_another_token_and_a_cached_prompt_a_second_one() -> None:
    model, tokens = tiny_gpt(context=8), some_tokens(1, 8)
    cache = model.new_cache(1)
    model(tokens, cache)
    with pytest.raises(ValueError, match=r"^tokens must end within context=8, got 9$"):
        model(tokens[:, :1], cache)
    cache.reset()
    model(tokens[:, :3], cache)
    with pytest.raises(ValueError, match=r"^q must hold one position or all 5, got 2$"):
        model(tokens[:, 3:5], cache)
    torch.testing.assert_close(model(tokens[:, 3:4], cache)[:, 0], model(tokens)[:, 3])


@pytest.mark.parametrize(("asked", "room"), [(None, 16), (1, 1), (9, 9), (16, 16), (99, 16)])
def test_a_cache_holds_what_was_asked_for_and_never_more_than_the_context(
    asked: int | None, room: int
) -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    cache = model.new_cache(2, asked)
    assert cache._buffer.nbytes == model.kv_bytes_per_token * 2 * room
    pieces = [model(tokens[:, t : t + 1], cache) for t in range(room)]
    assert cache.length == room
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens[:, :room]))


@pytest.mark.parametrize("room", [1, 4])
def test_a_full_cache_loses_no_token_silently(room: int) -> None:
    """Writing one position past the end of a tensor is no error of torch's: it writes nothing."""
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    cache = model.new_cache(2, room)
    model(tokens[:, :room], cache)
    message = f"^cache must have room for {room + 1} positions, got one of {room}$"
    with pytest.raises(ValueError, match=message):
        model(tokens[:, room : room + 1], cache)
    with pytest.raises(ValueError, match=f"^cache must have room for {room + 1} positions"):
        model(tokens[:, : room + 1], model.new_cache(2, room))
    cache.reset()
    torch.testing.assert_close(
        model(tokens[:, 2 : 2 + room], cache), model(tokens[:, 2 : 2 + room])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_run_and_keep_their_cache_in_kind(dtype: torch.dtype) -> None:
    model, tokens = tiny_gpt().to(dtype), some_tokens(2, 16)
    cache = model.new_cache(2)
    k, v = cache.append(0, torch.ones(2, 4, 3, 8, dtype=dtype), torch.ones(2, 4, 3, 8))
    assert k.dtype == v.dtype == dtype
    logits = model(tokens)
    assert logits.dtype == dtype
    tolerance = {torch.bfloat16: 0.5, torch.float64: 1e-6}[dtype]
    error = (logits.double() - reference_logits(model, tokens)).abs().max()
    assert error < tolerance


# --- rotary positions ----------------------------------------------------------------------------


def test_rotation_by_hand() -> None:
    """With D = 4 the pair (0, 2) turns by t radians and the pair (1, 3) by t / 100."""
    cos, sin = rotary_table(GPTConfig(vocab_size=1, context=4, n_heads=1, width=4))
    assert cos.shape == sin.shape == (4, 1, 1, 4)
    x = torch.tensor([1.0, 10.0, 0.0, 0.0]).expand(1, 4, 1, 1, 4)
    turned = rotate(x, cos, sin)[0, :, 0, 0]
    expected = [
        [math.cos(t), 10 * math.cos(t / 100), math.sin(t), 10 * math.sin(t / 100)] for t in range(4)
    ]
    torch.testing.assert_close(turned, torch.tensor(expected))
    assert torch.equal(turned[0], x[0, 0, 0, 0])  # position 0 is not turned at all


def test_rotation_keeps_lengths_and_makes_scores_depend_on_the_distance_only() -> None:
    cos, sin = rotary_table(GPTConfig(vocab_size=1, context=64, n_heads=1, width=8))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned_q = rotate(q.expand(1, 64, 1, 1, 8), cos, sin)[0, :, 0, 0]
    turned_k = rotate(k.expand(1, 64, 1, 1, 8), cos, sin)[0, :, 0, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(64))
    scores = turned_q @ turned_k.T  # (64, 64)
    for distance in (-30, -1, 0, 1, 5, 40):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert (scores[0, :8] - scores[0, 0]).abs()[1:].min() > 1e-3


def test_order_of_the_earlier_tokens_matters() -> None:
    model = tiny_gpt()
    assert not torch.allclose(
        model(torch.tensor([[1, 2, 3]]))[:, -1], model(torch.tensor([[2, 1, 3]]))[:, -1], atol=1e-3
    )


# --- weights -------------------------------------------------------------------------------------


def test_embedding_and_head_are_one_parameter() -> None:
    model = tiny_gpt()
    assert model.lm_head.weight is model.embed.weight
    assert model.get_output_embeddings() is model.lm_head
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names
    assert "lm_head.weight" not in names
    assert copy.deepcopy(model).lm_head.weight is not model.embed.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embed.weight


def test_tied_gradient_is_the_sum_of_both_uses() -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    for network in (model, untied):
        network(tokens).log_softmax(-1)[..., 3].sum().backward()
    assert untied.embed.weight.grad.abs().max() > 0
    assert untied.lm_head.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        model.embed.weight.grad, untied.embed.weight.grad + untied.lm_head.weight.grad
    )


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny_gpt()
    model(some_tokens(2, 16)).log_softmax(-1)[..., 3].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_there_are_no_biases_and_the_tables_are_not_saved() -> None:
    names = list(tiny_gpt(n_layers=1).state_dict())
    assert names == [
        "embed.weight",
        "blocks.0.norm_1.weight",
        "blocks.0.attn.c_attn.weight",
        "blocks.0.attn.c_proj.weight",
        "blocks.0.norm_2.weight",
        "blocks.0.mlp.c_fc.weight",
        "blocks.0.mlp.c_proj.weight",
        "norm.weight",
        "lm_head.weight",
    ]


def test_state_dict_round_trip_gives_equal_logits() -> None:
    model, other, tokens = tiny_gpt(0), tiny_gpt(1), some_tokens(2, 16)
    assert not torch.allclose(model(tokens), other(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))


def test_initial_weights_have_the_documented_spread() -> None:
    model = GPT(GPTConfig(vocab_size=512, n_layers=8, n_heads=4, width=128))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(128)), name
            continue
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        # Standard error of a standard deviation: std / sqrt(2 n), n >= 16,384.
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_fresh_model_is_nearly_uniform() -> None:
    model = GPT(GPTConfig(vocab_size=65))
    entropy = torch.distributions.Categorical(logits=model(some_tokens(4, 64))).entropy()
    assert entropy.min() > 0.98 * math.log(65)


def test_weights_are_a_function_of_the_generator_alone() -> None:
    config = GPTConfig(vocab_size=16, n_layers=1, n_heads=2, width=8)
    torch.manual_seed(1)
    default = fingerprint(GPT(config))
    torch.manual_seed(2)
    assert fingerprint(GPT(config)) == default
    assert fingerprint(GPT(config, torch.Generator().manual_seed(0))) == default
    assert fingerprint(GPT(config, torch.Generator().manual_seed(1))) != default


def test_init_weights_draws_the_model_anew() -> None:
    model = tiny_gpt(gain=1.0)
    fresh = fingerprint(model)
    model.init_weights(torch.Generator().manual_seed(5))
    assert fingerprint(model) != fresh
    model.init_weights(torch.Generator().manual_seed(0))
    assert fingerprint(model) == fresh


def test_building_and_running_touch_no_global_generator() -> None:
    def states() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],  # noqa: NPY002
            random.getstate(),
        ]

    before = states()
    model = tiny_gpt()
    model.init_weights(torch.Generator().manual_seed(1))
    model(some_tokens(2, 8)).sum().backward()
    model(some_tokens(2, 8), model.new_cache(2))
    assert states() == before


def test_mode_does_not_matter() -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


# --- accounting ----------------------------------------------------------------------------------


def test_parameters_are_counted_once() -> None:
    """Per block two norms 2 C, attention 4 C^2, feed-forward 8 C^2; one norm and V C outside."""
    expected = 16 * 32 + 2 * (2 * 32 + 12 * 32 * 32) + 32
    assert tiny_gpt().n_parameters == expected == 25_248


def test_flops_grow_with_the_past() -> None:
    """2 per weight; per past position, layer and channel 2 for the score and 2 for the value."""
    model = tiny_gpt()
    assert model.flops_per_token(0) == 2 * 25_248
    assert model.flops_per_token(10) == 2 * 25_248 + 10 * 2 * 32 * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_bytes_are_what_a_cache_takes(dtype: torch.dtype, size: int) -> None:
    model = tiny_gpt().to(dtype)
    assert model.kv_bytes_per_token == 2 * 2 * 32 * size
    assert model.new_cache(3)._buffer.nbytes == model.kv_bytes_per_token * 3 * model.context


def test_shapes_and_numbers_are_known_without_a_model() -> None:
    model = tiny_gpt(n_layers=3)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert dict(parameter_shapes(model.config)) == expected
    assert model.config.n_parameters == model.n_parameters
    assert model.config.building_bytes > 4 * model.n_parameters


def test_layers_take_memory_whatever_their_width_and_are_bounded() -> None:
    thin = GPTConfig(vocab_size=16, context=2, n_layers=10_000, n_heads=1, width=2)
    assert thin.building_bytes > 10_000 * 50_000
    with pytest.raises(ValueError, match=r"^n_layers must be at most 10000, got 10001$"):
        replace(thin, n_layers=10_001)
