"""Small models of every architecture that surgery knows, and a comparison of generated texts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from avatarl_env.lm.generation import Generation
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.hub import HubLM
from tests.fakes import tiny_gpt

VOCAB, CONTEXT, WIDTH, N_LAYERS, N_HEADS = 24, 24, 16, 2, 4

ZOO = ("gpt", "gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3", "neox")
"""Ours and those of transformers; qwen2 and gpt2 have tied heads, qwen3 normalises queries."""


def fill(model: nn.Module, seed: int = 0) -> None:
    """Redraw all parameters, none of them zero, so that every one affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.dim() > 1:
                p.copy_(0.3 * noise)
            else:
                p.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise)


def plain(name: str, **sizes: object) -> nn.Module:
    """Build a transformers model with filled weights, in eval mode; the global RNG stays."""
    config_of, model_of = _classes()[name]
    state = torch.get_rng_state()
    try:
        model = model_of(config_of(**{**_sizes(name), **sizes}))
    finally:
        torch.set_rng_state(state)
    fill(model)
    return model.eval()


def build(name: str, **sizes: object) -> GPT | HubLM:
    """Build a model of the zoo: 2 layers, 4 heads, width 16, 24 tokens of context."""
    if name == "gpt":
        model = tiny_gpt(vocab_size=VOCAB, context=CONTEXT, width=WIDTH, n_layers=N_LAYERS)
        fill(model)
        return model
    return HubLM(plain(name, **sizes))  # type: ignore[arg-type]


@functools.cache
def shared(name: str) -> GPT | HubLM:
    """Return one model of this name for all tests, which must not change it."""
    return build(name)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Draw (rows, length) tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (rows, length), generator=generator)


def assert_same_writing(
    found: Generation, expected: Generation, uniforms: Tensor, tolerance: float = 1e-5
) -> int:
    """Check that two runs on the same noise differ by rounding alone; return how many rows do.

    Up to a row's first difference the log-probabilities must agree; there, every boundary between
    the two tokens must lie within `tolerance` of the uniform. The rest of the row is not compared.

    Args:
        found: one generation.
        expected: the other one, with distributions.
        uniforms: (B, N) the sampling noise of both.
        tolerance: of log-probabilities and of cumulative probabilities.
    """
    assert expected.distributions is not None
    n_rows, n_new = uniforms.shape
    start = expected.tokens.size(1) - n_new
    assert torch.equal(found.tokens[:, :start], expected.tokens[:, :start])
    n_differing = 0
    for row in range(n_rows):
        new, old = found.tokens[row, start:], expected.tokens[row, start:]
        differs = (new != old).nonzero()[:, 0]
        stop = int(differs[0]) if len(differs) else n_new
        torch.testing.assert_close(
            found.log_probs[row, :stop], expected.log_probs[row, :stop], rtol=0, atol=tolerance
        )
        if stop < n_new:
            n_differing += 1
            low, high = sorted((int(new[stop]), int(old[stop])))
            boundaries = expected.distributions[row, stop].double().exp().cumsum(0)[low:high]
            margin = (boundaries - uniforms[row, stop].double()).abs().max()
            assert margin <= tolerance, f"row {row}, token {stop}: {float(margin)} off a boundary"
    return n_differing


def _sizes(name: str) -> dict[str, object]:
    if name == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": CONTEXT}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": None, **sizes, **drop}
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "intermediate_size": 24,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    if name != "neox":
        sizes["num_key_value_heads"] = 2
    special: dict[str, dict[str, object]] = {
        "llama": {"attention_bias": True, "tie_word_embeddings": False},
        "mistral": {"tie_word_embeddings": False, "sliding_window": 8},
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    }
    return {**sizes, **special.get(name, {})}


@functools.cache
def _classes() -> dict[str, tuple[Callable[..., object], Callable[..., nn.Module]]]:
    import transformers as t

    return {
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel),
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "mistral": (t.MistralConfig, t.MistralForCausalLM),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
        "phi3": (t.Phi3Config, t.Phi3ForCausalLM),
        "neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM),
    }
