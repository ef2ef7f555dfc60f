"""Tests of avatarl_env/lm/hub.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import BloomConfig, LlamaConfig, LlavaConfig

from avatarl_env.lm.generation import generate
from avatarl_env.lm.hub import HubLM, HubTokenizer, is_hub_model, is_hub_tokenizer
from tests.avatarl_env.surgery.edits import refused
from tests.foreign import TOKENIZERS
from tests.zoo import CONTEXT, VOCAB, ZOO, assert_same_writing, plain, shared, tokens

HUB = [name for name in ZOO if name != "gpt"]


@pytest.mark.parametrize("name", HUB)
def test_logits_are_the_wrapped_models(name: str) -> None:
    model = shared(name)
    read = tokens(3, CONTEXT)
    with torch.no_grad():
        found, expected = model(read), model.model(input_ids=read).logits
    assert found.shape == (3, CONTEXT, VOCAB)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [11, 1]])
@pytest.mark.parametrize("name", HUB)
def test_reading_in_pieces_with_a_cache_is_reading_at_once(name: str, pieces: list[int]) -> None:
    """Also where attention slides over fewer positions than there are (Mistral's, over eight)."""
    model = shared(name)
    read = tokens(3, 12)
    cache = model.new_cache(3)
    logits, position = [], 0
    with torch.no_grad():
        expected = model(read)
        for piece in pieces:
            assert cache.length == position
            logits.append(model(read[:, position : position + piece], cache))
            position += piece
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_sliding_attention_slides() -> None:
    """Else the test before shows nothing of it: a token ten positions ago is out of sight."""
    model, read = shared("mistral"), tokens(1, 24)
    other = read.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    with torch.no_grad():
        same = (model(read) == model(other)).all(-1)[0]
    assert not same[:8].any()
    assert same[20:].all()  # two layers see 2 * 7 positions back


@pytest.mark.parametrize("name", HUB)
def test_a_reset_cache_is_a_new_one(name: str) -> None:
    model = shared(name)
    cache = model.new_cache(2)
    with torch.no_grad():
        model(tokens(2, 9), cache)
        cache.reset()
        assert cache.length == 0
        found = model(tokens(2, 5, seed=1), cache)
        expected = model(tokens(2, 5, seed=1), model.new_cache(2))
    assert cache.length == 5
    assert torch.equal(found, expected)


def test_without_a_cache_none_is_kept() -> None:
    """The model's own configuration says that it would."""
    model = shared("llama")
    assert model.model.config.use_cache
    outputs = []
    handle = model.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(tokens(1, 4))
        cache = model.new_cache(1)
        model(tokens(1, 4), cache)
    handle.remove()
    assert outputs[0].past_key_values is None
    assert outputs[1].past_key_values is cache.past


@pytest.mark.parametrize(
    ("name", "length"), [*((name, 6) for name in HUB), ("gpt2", 30), ("mistral", 30)]
)
def test_generation_passes_the_context_with_and_without_a_cache(name: str, length: int) -> None:
    model = shared(name)
    prompts = tokens(3, length)
    uniforms = torch.rand(3, 22, generator=torch.Generator().manual_seed(2))
    cached = generate(model, prompts, uniforms)
    whole = generate(model, prompts, uniforms, use_cache=False, return_distributions=True)
    assert cached.tokens.shape == (3, length + 22)
    assert_same_writing(cached, whole, uniforms)


def test_context_is_the_configurations_or_as_given() -> None:
    inner = shared("gpt2").model
    assert HubLM(inner).context == CONTEXT
    assert HubLM(inner, context=5).context == 5
    with refused(ValueError, "tokens must end within context=5, got 6"):
        HubLM(inner, context=5)(tokens(1, 6))
    model = HubLM(inner, context=5)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(tokens(1, 5), cache)
    with refused(ValueError, "tokens must end within context=5, got 6"):
        model(tokens(1, 1), cache)


@pytest.mark.parametrize("context", [0, -1])
def test_context_must_be_positive(context: int) -> None:
    with refused(ValueError, f"context must be at least 1, got {context}"):
        HubLM(shared("gpt2").model, context=context)


class Silent(nn.Module):
    """A model whose configuration does not say how far it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BloomConfig()  # reads as far as one likes


def test_an_unknown_context_must_be_given() -> None:
    with refused(
        ValueError,
        "context must be given, Silent does not say its own: wrap it, HubLM(model, context=...)",
    ):
        HubLM(Silent())  # type: ignore[arg-type]
    assert HubLM(Silent(), context=7).context == 7  # type: ignore[arg-type]


class Seeing(nn.Module):
    """A model of texts and pictures, whose configuration has one for texts inside."""

    def __init__(self) -> None:
        super().__init__()
        text = LlamaConfig(vocab_size=20, max_position_embeddings=48)
        self.config = LlavaConfig(text_config=text)


def test_sizes_are_those_of_the_text_in_a_model_of_pictures_too() -> None:
    model = HubLM(Seeing())  # type: ignore[arg-type]
    assert (model.vocab_size, model.context) == (20, 48)


@pytest.mark.parametrize("mode", [True, False])
def test_train_or_eval_mode_is_the_models(mode: bool) -> None:
    """Else `model.train(model.training)` would switch the wrapped model's dropout on."""
    inner = plain("gpt2").train(mode)
    model = HubLM(inner)
    assert model.training is mode
    model.train(model.training)
    assert inner.training is mode


def test_the_model_is_shared_not_copied() -> None:
    inner = plain("neox")
    model = HubLM(inner)
    assert model.model is inner
    assert [id(p) for p in model.parameters()] == [id(p) for p in inner.parameters()]
    assert all(name.startswith("model.") for name in model.state_dict())
    assert model.get_output_embeddings() is inner.get_output_embeddings()


def test_logits_beyond_the_vocabulary_are_cut_off() -> None:
    inner = shared("gpt2").model
    assert HubLM(inner).vocab_size == VOCAB
    model, read = HubLM(inner, vocab_size=20), tokens(2, 6)
    assert model.vocab_size == 20
    with torch.no_grad():
        assert torch.equal(model(read), inner(input_ids=read).logits[..., :20])


def test_models_and_tokenizers_of_transformers_are_known_by_their_class() -> None:
    inner, tokenizer = shared("llama").model, TOKENIZERS["bpe"]()
    assert is_hub_model(inner)
    assert is_hub_tokenizer(tokenizer)
    for other in (shared("gpt"), HubLM(inner), HubTokenizer(tokenizer), tokenizer, "llama"):
        assert not is_hub_model(other)
    for other in (inner, HubTokenizer(tokenizer), tokenizer.backend_tokenizer, "llama"):
        assert not is_hub_tokenizer(other)


def test_asking_does_not_import_transformers() -> None:
    program = (
        "import sys; from avatarl_env.lm.hub import is_hub_model, is_hub_tokenizer; "
        "assert not is_hub_model(1) and not is_hub_tokenizer(1); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_long_text_is_encoded_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    inner = TOKENIZERS["bpe"]()
    inner.model_max_length = 8
    assert len(HubTokenizer(inner).encode("aeio " * 40)) > 8
    assert not caplog.messages
