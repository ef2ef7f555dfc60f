"""Tests of avatarl_env/surgery/operators/temperature.py."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.surgery import OutputTemperature, Overlay, SurgicalTheater, find_targets
from tests.avatarl_env.surgery.edits import refused
from tests.fakes import tiny_gpt
from tests.zoo import ZOO, build, plain, shared, tokens

TIED = ("gpt", "gpt2", "qwen2")


def sharpened(model: nn.Module, operator: OutputTemperature, c: float) -> Tensor:
    with SurgicalTheater(model, [operator]) as theater, torch.no_grad():
        operator.apply(theater, [c])
        return model(tokens(2, 8))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ZOO)
def test_all_logits_are_multiplied(name: str) -> None:
    model = shared(name)
    operator = OutputTemperature(find_targets(model), scale=2.0)
    with torch.no_grad():
        expected = model(tokens(2, 8)) * math.exp(-1)
    torch.testing.assert_close(sharpened(model, operator, -0.5), expected, atol=1e-5, rtol=1e-5)
    with Overlay(operator, [[-0.5]]), torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 8)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_a_tied_head_is_left_alone_and_the_normalisation_before_it_is_written(name: str) -> None:
    """A tied head is the embedding too."""
    model = shared(name)
    head = model.get_output_embeddings()
    found = list(OutputTemperature(find_targets(model)).parameters())
    if name in TIED:
        assert all(p.dim() == 1 for p in found)
        assert len(found) == (2 if name == "gpt2" else 1)
    else:
        assert [id(p) for p in found] == [id(head.weight)]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_half_precision_rounds_and_no_more(name: str) -> None:
    model = copy.deepcopy(shared(name)).to(torch.bfloat16)
    operator = OutputTemperature(find_targets(model))
    with torch.no_grad():
        before = model(tokens(2, 8))
    expected = before.float() * math.e
    found = sharpened(model, operator, 1.0)
    with Overlay(operator, [[1.0]]), torch.no_grad():
        overlaid = model(tokens(2, 8))
    for logits in (found, overlaid):
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.02)


def test_it_is_decoding_at_another_temperature() -> None:
    model = shared("llama")
    operator = OutputTemperature(find_targets(model))
    uniforms = torch.rand(3, 10, generator=torch.Generator().manual_seed(1))
    prompts = tokens(3, 4)
    expected = generate(model, prompts, uniforms, temperature=math.exp(-0.6))
    with Overlay(operator, [[0.6]] * 3):
        found = generate(model, prompts, uniforms)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bias_of_the_head_is_multiplied_too(tied: bool) -> None:
    model = tiny_gpt(vocab_size=24)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 24))
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    operator = OutputTemperature(find_targets(model))
    assert len(list(operator.parameters())) == 2
    with torch.no_grad():
        expected = model(tokens(2, 8)) * math.exp(0.5)
    torch.testing.assert_close(sharpened(model, operator, 0.5), expected, atol=1e-5, rtol=1e-5)
    with Overlay(operator, [[0.5]]), torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 8)), expected, atol=1e-5, rtol=1e-5)


def test_other_layers_make_no_difference() -> None:
    model = shared("gpt2")
    first, last = (list(OutputTemperature(find_targets(model, i)).parameters()) for i in (0, -1))
    assert [id(p) for p in first] == [id(p) for p in last]


def test_there_is_one_coefficient() -> None:
    operator = OutputTemperature(find_targets(shared("gpt")))
    assert operator.labels == ("log-sharpness of the output",)
    with refused(ValueError, "coefficients must have shape (N, 1), got (1, 2)"):
        operator.row_edits(np.zeros((1, 2)))


# --- where the normalisation is ------------------------------------------------------------------


def renamed() -> GPT:
    """A tied GPT that calls its last normalisation something else."""
    model = tiny_gpt(vocab_size=24)
    model.last = model.norm
    del model._modules["norm"]
    model.__dict__["norm"] = model.last
    return model


def test_a_normalisation_of_another_name_can_be_named() -> None:
    model = renamed()
    targets = find_targets(model)
    with refused(
        ValueError,
        "final_norm must name the normalisation that the model's tied output head reads, got None, "
        "and none of ['norm', 'transformer.ln_f', 'model.norm', 'gpt_neox.final_layer_norm'] "
        "is there",
    ):
        OutputTemperature(targets)
    with refused(
        ValueError,
        "final_norm must name the normalisation that the model's tied output head reads, "
        "got 'lats', did you mean 'last'?",
    ):
        OutputTemperature(targets, final_norm="lats")
    operator = OutputTemperature(targets, final_norm="last")
    assert [id(p) for p in operator.parameters()] == [id(model.last.weight)]
    with torch.no_grad():
        expected = model(tokens(2, 8)) * math.e
    torch.testing.assert_close(sharpened(model, operator, 1.0), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_wrapped_model_is_searched_under_both_names(wrapped: bool) -> None:
    model = build("qwen2") if wrapped else plain("qwen2")
    for path in (None, "model.norm"):
        (found,) = OutputTemperature(find_targets(model), final_norm=path).parameters()
        inner = model.model.model if wrapped else model.model
        assert found is inner.norm.weight


class PlusOne(nn.Module):
    """Its gain is one more than its parameter, as in some models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((32,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (PlusOne(), "PlusOne"),
        (nn.Identity(), "Identity"),
        (nn.RMSNorm(32, elementwise_affine=False), "RMSNorm"),
        (nn.Linear(32, 32), "Linear"),
    ],
)
def test_what_is_not_proportional_to_its_parameters_is_refused(norm: nn.Module, kind: str) -> None:
    model = tiny_gpt()
    model.norm = norm  # type: ignore[assignment]
    with refused(
        ValueError,
        f"final_norm must make something proportional to its parameters, got 'norm', a {kind}",
    ):
        OutputTemperature(find_targets(model))
    for path in ("blocks", "blocks.0", "embed"):
        with pytest.raises(ValueError, match=r"^final_norm must make something proportional"):
            OutputTemperature(find_targets(model), final_norm=path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_proportional_in_any_precision(dtype: torch.dtype) -> None:
    for name in ("gpt", "gpt2"):
        model = copy.deepcopy(shared(name)).to(dtype)
        assert list(OutputTemperature(find_targets(model)).parameters())


def test_a_model_without_an_output_head_is_refused() -> None:
    message = "targets must be of a model whose get_output_embeddings() is a linear module, "
    with refused(TypeError, message + "got NoneType from ModuleDict"):
        OutputTemperature(find_targets(nn.ModuleDict({"inside": tiny_gpt()})))
    with refused(TypeError, message + "got NoneType from GPT2Model"):
        OutputTemperature(find_targets(plain("gpt2").transformer))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    with refused(ValueError, f"scale must be positive and finite, got {scale}"):
        OutputTemperature(find_targets(shared("gpt")), scale=scale)
