"""Tests of avatarl_env/lm/gpt.py."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from avatarl_env.lm.gpt import GPT, GPTConfig
from tests.fakes import reference_logits, tiny_gpt


def some_tokens(n_rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(16, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        *[
            ({name: value}, f"^{name} must be .*{value}")
            for name in ("vocab_size", "context", "n_layers", "n_heads", "width")
            for value in (0, -1, True, 2.0, "2")
        ],
        ({"n_layers": 10_001}, "n_layers must be at most 10000, got 10001"),
        *[
            (
                {"width": width, "n_heads": n_heads},
                f"n_heads .* width={width} and n_heads={n_heads}",
            )
            for width, n_heads in ((32, 3), (4, 8), (12, 4), (1, 1))  # 12 / 4 and 1 / 1 are odd
        ],
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"vocab_size": 16, **sizes})


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"vocab_size": 1},
        {"context": 1},
        {"n_layers": 1},
        {"width": 2, "n_heads": 1},
        {"width": 64, "n_heads": 32},
    ],
)
def test_forward_equals_a_second_implementation(sizes: dict[str, int]) -> None:
    model = tiny_gpt(**sizes)
    tokens = some_tokens(3, model.context) % model.vocab_size
    logits = model(tokens)
    assert logits.shape == (3, model.context, model.vocab_size)
    torch.testing.assert_close(
        logits.double(), reference_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


def test_the_configuration_knows_its_counts() -> None:
    """Per block two norms 2 C, attention 4 C^2, feed-forward 8 C^2; one norm and V C outside."""
    model = tiny_gpt()
    assert model.n_parameters == 16 * 32 + 2 * (2 * 32 + 12 * 32 * 32) + 32 == 25_248
    assert model.config.n_parameters == model.n_parameters
    assert model.config.head_dim == 8
    assert model.config.building_bytes > 4 * model.n_parameters
    thin = GPTConfig(vocab_size=16, context=2, n_layers=10_000, n_heads=1, width=2)
    assert thin.building_bytes > 10_000 * 50_000  # of Python objects
    # 2 per weight; per past position, layer and channel 2 for the score and 2 for the value.
    assert model.flops_per_token(10) == 2 * 25_248 + 10 * 2 * 32 * 4


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_prompt", [1, 7, 15, 16])
def test_reading_through_a_cache_gives_the_logits_of_the_whole_window(n_prompt: int) -> None:
    model, tokens = tiny_gpt(), some_tokens(3, 16)
    cache = model.new_cache(3)
    for _ in range(2):  # the second time after a reset
        pieces = [model(tokens[:, :n_prompt], cache)]
        pieces += [model(tokens[:, t : t + 1], cache) for t in range(n_prompt, 16)]
        assert cache.length == 16
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))
        cache.reset()
        assert cache.length == 0


def test_positions_beyond_the_context_are_refused() -> None:
    model, tokens = tiny_gpt(context=8), some_tokens(1, 9)
    with pytest.raises(ValueError, match="tokens must end within context=8, got 9"):
        model(tokens)
    cache = model.new_cache(1)
    model(tokens[:, :8], cache)
    with pytest.raises(ValueError, match="tokens must end within context=8, got 9"):
        model(tokens[:, 8:], cache)
    cache.reset()
    model(tokens[:, :3], cache)
    with pytest.raises(ValueError, match="q must hold one position or all 5, got 2"):
        model(tokens[:, 3:5], cache)


@pytest.mark.parametrize(("asked", "room"), [(None, 16), (1, 1), (9, 9), (99, 16)])
def test_a_cache_has_the_requested_room_and_refuses_more(asked: int | None, room: int) -> None:
    """Writing past the end of a tensor is not an error in torch: nothing is written."""
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    cache = model.new_cache(2, asked)
    pieces = [model(tokens[:, t : t + 1], cache) for t in range(room)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens[:, :room]))
    with pytest.raises(ValueError, match=rf"room for {room + 1} .*{room}|context=16, got 17"):
        model(tokens[:, :1], cache)


# --- weights -------------------------------------------------------------------------------------


def test_embedding_and_head_share_one_parameter_and_its_gradient() -> None:
    model, tokens = tiny_gpt(), some_tokens(2, 16)
    assert model.lm_head.weight is model.embed.weight
    assert model.get_output_embeddings() is model.lm_head
    twin, untied = copy.deepcopy(model), copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embed.weight is not model.embed.weight
    untied.lm_head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    for network in (model, untied):
        network(tokens).log_softmax(-1)[..., 3].sum().backward()
    for name, parameter in untied.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    torch.testing.assert_close(
        model.embed.weight.grad, untied.embed.weight.grad + untied.lm_head.weight.grad
    )


def test_there_are_no_biases_and_the_tables_are_not_saved() -> None:
    model, other, tokens = tiny_gpt(0, n_layers=1), tiny_gpt(1, n_layers=1), some_tokens(2, 16)
    assert list(model.state_dict()) == [
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
    assert not torch.allclose(model(tokens), other(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.train()(tokens), other.eval()(tokens))


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
