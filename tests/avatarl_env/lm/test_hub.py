"""Tests of the wrappers in avatarl_env/lm/hub.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BloomConfig, LlamaConfig, LlavaConfig

from avatarl_env.lm.generation import generate
from avatarl_env.lm.hub import HubLM
from tests.zoo import CONTEXT, VOCAB, ZOO, assert_same_writing, plain, shared, tokens

HUB = [name for name in ZOO if name != "gpt"]


@pytest.mark.parametrize("name", HUB)
def test_logits_are_the_wrapped_models_with_and_without_a_cache(name: str) -> None:
    """Also with sliding attention (Mistral's window is eight tokens)."""
    model = shared(name)
    read = tokens(3, CONTEXT)
    cache = model.new_cache(3)
    with torch.no_grad():
        whole = model(read)
        assert whole.shape == (3, CONTEXT, VOCAB)
        assert torch.equal(whole, model.model(input_ids=read).logits)
        for pieces in ([1] * 12, [5, 1, 1, 5], [11, 1]):
            logits = [model(piece, cache) for piece in read[:, :12].split(pieces, dim=1)]
            assert cache.length == 12
            torch.testing.assert_close(
                torch.cat(logits, dim=1), whole[:, :12], atol=1e-5, rtol=1e-5
            )
            cache.reset()
            assert cache.length == 0


@pytest.mark.parametrize(
    ("name", "length"), [*((name, 6) for name in HUB), ("gpt2", 30), ("mistral", 30)]
)
def test_generation_exceeds_the_context_with_and_without_a_cache(name: str, length: int) -> None:
    model, prompts = shared(name), tokens(3, length)
    uniforms = torch.rand(3, 22, generator=torch.Generator().manual_seed(2))
    cached = generate(model, prompts, uniforms)
    whole = generate(model, prompts, uniforms, use_cache=False, return_distributions=True)
    assert cached.tokens.shape == (3, length + 22)
    assert_same_writing(cached, whole, uniforms)


class Configured(nn.Module):
    """A model with a configuration only."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config


def test_sizes_come_from_the_configuration_or_the_arguments() -> None:
    inner = shared("gpt2").model
    assert (HubLM(inner).context, HubLM(inner).vocab_size) == (CONTEXT, VOCAB)
    model, read = HubLM(inner, context=5, vocab_size=20), tokens(2, 6)
    assert (model.context, model.vocab_size) == (5, 20)
    cache = model.new_cache(1)
    with torch.no_grad():
        expected = inner(input_ids=read[:, :5]).logits[..., :20]
        assert torch.equal(model(read[:, :5], cache), expected)
    for given in (None, cache):
        with pytest.raises(ValueError, match="tokens must end within context=5, got"):
            model(read, given)
    text = LlamaConfig(vocab_size=20, max_position_embeddings=48)
    with_pictures = HubLM(Configured(LlavaConfig(text_config=text)))  # type: ignore[arg-type]
    assert (with_pictures.vocab_size, with_pictures.context) == (20, 48)


def test_the_context_must_be_known_and_positive() -> None:
    unlimited = Configured(BloomConfig())
    with pytest.raises(ValueError, match=r"context must be given, .* HubLM\(model, context="):
        HubLM(unlimited)  # type: ignore[arg-type]
    assert HubLM(unlimited, context=7).context == 7  # type: ignore[arg-type]
    for context in (0, -1, True, "8"):
        with pytest.raises(ValueError, match=f"context must be an integer .*{context}"):
            HubLM(shared("gpt2").model, context=context)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_and_its_train_mode_are_shared(mode: bool) -> None:
    """Otherwise `model.train(model.training)` could switch on dropout in the wrapped model."""
    inner = plain("gpt2").train(mode)
    model = HubLM(inner)
    assert model.training is mode
    model.train(model.training)
    assert inner.training is mode
    assert model.model is inner
    assert [id(p) for p in model.parameters()] == [id(p) for p in inner.parameters()]
    assert all(name.startswith("model.") for name in model.state_dict())
    assert model.get_output_embeddings() is inner.get_output_embeddings()
