"""The arithmetic of each operator against values by hand or a second computation."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarl_env.surgery import (
    HeadGain,
    LayerTruncation,
    LowRankSeed,
    OutputTemperature,
    Overlay,
    SeedRankOne,
    SpectralBands,
    SurgicalTheater,
    Targets,
    find_targets,
)
from tests.avatarl_env.surgery.operators.squares import diagonal, noise, squares
from tests.fakes import reference_logits, tiny_gpt
from tests.zoo import ZOO, build, plain, shared, tokens

LN2 = math.log(2)


def operated(operator: Any, targets: Targets, c: list[float], part: str = "output") -> Tensor:
    """Return the first layer's matrix of one projection under an operation."""
    with SurgicalTheater(targets.model, [operator]) as theater:
        operator.apply(theater, c)
        return getattr(targets[0], part).weight.detach().clone()  # type: ignore[no-any-return]


# --- HeadGain ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gains_scale_attention_logits_and_what_the_heads_read(tied: bool) -> None:
    """In place and in an overlay, against an independent reference."""
    model = tiny_gpt(1)
    read = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(1))
    targets = find_targets(model)
    operator = HeadGain(targets, tied=tied, scale=0.7)
    c = np.random.default_rng(1).uniform(-1, 1, len(operator.labels))
    gains = torch.from_numpy(np.exp(0.7 * c)).view(-1, 2, 4).expand(2, 2, 4)  # (L, kind, H)
    expected = reference_logits(model, read, gains[:, 0], gains[:, 1])
    unoperated = reference_logits(model, read)
    assert (expected - unoperated).abs().max() > 0.05
    with SurgicalTheater(model, targets) as theater, torch.no_grad():
        operator.apply(theater, c)
        found = model(read).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with Overlay(operator, [c, 0 * c]), torch.no_grad():
        found, unchanged = model(torch.cat([read, read])).double().chunk(2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(unchanged, unoperated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_each_gain_changes_only_what_its_label_names(tied: bool) -> None:
    model = tiny_gpt(n_layers=3)
    targets = find_targets(model, [1, 2])
    operator = HeadGain(targets, tied=tied)
    old = [(t.query.weight.detach().clone(), t.output.weight.detach().clone()) for t in targets]
    for index, label in enumerate(operator.labels):
        match = re.fullmatch(r"(log-sharpness|log-value-gain) layer (all|\d) head (\d)", label)
        assert match, label
        kind, layer, head = match.groups()
        with SurgicalTheater(model, targets) as theater:
            operator.apply(theater, np.eye(len(operator.labels))[index] / 2)
            for target, (query, output) in zip(targets, old, strict=True):
                moved = [
                    (target.query.weight != query).any(1).nonzero()[:, 0].tolist(),
                    (target.output.weight != output).any(0).nonzero()[:, 0].tolist(),
                ]
                here = layer in ("all", str(target.layer))
                channels = list(range(8 * int(head), 8 * int(head) + 8)) if here else []
                is_query = kind == "log-sharpness"
                assert moved == ([channels, []] if is_query else [[], channels])


def test_targets_that_head_gain_refuses() -> None:
    (wide,), (narrow,) = (find_targets(tiny_gpt(n_layers=1, n_heads=n)) for n in (4, 2))
    with pytest.raises(ValueError, match=r"number of heads, got \[2, 4\]"):
        HeadGain([wide, narrow])
    assert len(HeadGain([wide, narrow], tied=False).labels) == 2 * (4 + 2)
    with pytest.raises(ValueError, match=r"number of heads, got \[\]"):
        HeadGain([])
    with pytest.raises(ValueError, match=r"not normalise .*layers.1.self_attn"):
        HeadGain(find_targets(shared("qwen3"), -1))


# --- SpectralBands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "n_bands", "c", "expected"),
    [
        # 4 3 | 2 1 times 2 | 1/2 is 8 6 | 1 1/2, of mass 15.5, brought back to 10
        ([2, 4, 1, 3], 2, [1, -1], [1 / 1.55, 8 / 1.55, 0.5 / 1.55, 6 / 1.55]),
        # five values in three bands: 0 0 1 1 2
        ([5, 4, 3, 2, 1], 3, [1, 0, 0], [x * 15 / 24 for x in (10, 8, 3, 2, 1)]),
        ([5, 4, 3, 2, 1], 3, [0, 0, 1], [x * 15 / 16 for x in (5, 4, 3, 2, 2)]),
        ([0, 0, 0], 2, [1, -1], [0, 0, 0]),
    ],
)
def test_spectral_bands_by_hand(
    values: list[float], n_bands: int, c: list[float], expected: list[float]
) -> None:
    targets = squares(diagonal(*map(float, values)))
    operator = SpectralBands(targets, projections="output", n_bands=n_bands, scale=LN2)
    assert operator.labels[0] == "log-gain band 0 output layer all"
    torch.testing.assert_close(operated(operator, targets, c), diagonal(*map(float, expected)))


@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9)])
def test_spectral_bands_keep_mass_and_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = noise(*shape).double()
    targets = squares(matrix)
    operator = SpectralBands(targets, projections=["output"], n_bands=5)
    found = operated(operator, targets, [0.1, -0.9, 0.5, 0.3, -0.2])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ found @ right.mT
    torch.testing.assert_close(core, torch.diag(core.diagonal()), atol=1e-13, rtol=0)
    torch.testing.assert_close(core.trace(), values.sum(), atol=1e-12, rtol=0)
    found = operated(operator, targets, [0.7] * 5)  # equal bands
    torch.testing.assert_close(found, matrix, atol=1e-12, rtol=0)


# --- LayerTruncation, SeedRankOne ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "c", "rank"),
    [(1.0, 0.25, 3), (1.0, -0.5, 2), (1.0, 1.0, 0), (0.5, 1.0, 2), (0.5, 0.1, 4), (1.0, 1.7, 0)],
)
def test_truncation_leaves_the_largest_values(scale: float, c: float, rank: int) -> None:
    """Of four values; beyond four there is nothing left to remove."""
    targets = squares(diagonal(2.0, 4.0, 1.0, 3.0))
    operator = LayerTruncation(targets, scale=scale)
    kept = [value if value > 4 - rank else 0.0 for value in (2.0, 4.0, 1.0, 3.0)]
    torch.testing.assert_close(operated(operator, targets, [c]), diagonal(*kept), atol=1e-6, rtol=0)


def test_rank_one_by_hand() -> None:
    """Half of the way from diag(4, 2) to diag(1 + 0.5 * 0.5, 0)."""
    targets = squares(diagonal(4.0, 2.0))
    operator = SeedRankOne(targets, projections="output", scale=0.5)
    torch.testing.assert_close(operated(operator, targets, [0.5]), diagonal(2 + 0.625, 1.0))


# --- LowRankSeed ---------------------------------------------------------------------------------


def step(targets: Targets, c: list[float], part: str = "output", **options: Any) -> Tensor:
    """Return the change of the first layer's projection."""
    before = getattr(targets[0], part).weight.detach().clone()
    return operated(LowRankSeed(targets, **options), targets, c, part) - before


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("part", ["query", "output"])
def test_a_low_rank_step_has_the_given_length_and_rank(rank: int, part: str) -> None:
    """The length is relative to the matrix's Frobenius norm."""
    targets = squares(5 * noise(9, 7).double())
    change = step(targets, [0.0, -0.5], part, n_directions=2, rank=rank, scale=0.3)
    expected = 0.15 * getattr(targets[0], part).weight.norm()
    torch.testing.assert_close(change.norm(), expected, atol=0, rtol=1e-10)
    assert torch.linalg.matrix_rank(change, rtol=1e-9) == rank


def test_low_rank_steps_depend_on_seed_direction_and_matrix() -> None:
    targets = squares(noise(6, 6))
    steps = [
        step(targets, c, part, projections=("query", "key"), n_directions=2, seed=seed)
        for seed in (3, 4)
        for part in ("query", "key")
        for c in ([1.0, 0.0], [0.0, 1.0])
    ]
    for i, a in enumerate(steps):
        for b in steps[:i]:
            assert (a * b).sum().abs() < 0.9 * a.norm() * b.norm()
    again = step(
        targets, [1.0, 0.0], projections=("query", "key"), n_directions=2, seed=3, part="query"
    )
    assert torch.equal(again, steps[0])


# --- OutputTemperature ---------------------------------------------------------------------------


def sharpened(model: nn.Module, operator: OutputTemperature, c: float) -> Tensor:
    with SurgicalTheater(model, [operator]) as theater, torch.no_grad():
        operator.apply(theater, [c])
        return model(tokens(2, 8))  # type: ignore[no-any-return]


def check_multiplied(model: nn.Module, operator: OutputTemperature, c: float, gain: float) -> None:
    with torch.no_grad():
        expected = model(tokens(2, 8)) * gain
        torch.testing.assert_close(sharpened(model, operator, c), expected, atol=1e-4, rtol=1e-4)
        with Overlay(operator, [[c]]):
            torch.testing.assert_close(model(tokens(2, 8)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_output_temperature_multiplies_all_logits(name: str) -> None:
    """A tied head is also the embedding, so the norm before it is scaled instead."""
    model = shared(name)
    operator = OutputTemperature(find_targets(model, -1), scale=2.0)
    check_multiplied(model, operator, -0.5, math.exp(-1))
    found = list(operator.parameters())
    if name in ("gpt", "gpt2", "qwen2"):
        assert [p.dim() for p in found] == [1] * (2 if name == "gpt2" else 1)
    else:
        assert [id(p) for p in found] == [id(model.get_output_embeddings().weight)]


def test_the_final_norm_can_be_named() -> None:
    model = tiny_gpt(vocab_size=24)
    model.last = model.norm
    del model._modules["norm"]
    model.__dict__["norm"] = model.last
    targets = find_targets(model)
    with pytest.raises(ValueError, match=r"^final_norm .*None.*'transformer.ln_f'"):
        OutputTemperature(targets)
    with pytest.raises(ValueError, match=r"^final_norm .*'lats', did you mean 'last'"):
        OutputTemperature(targets, final_norm="lats")
    check_multiplied(model, OutputTemperature(targets, final_norm="last"), 1.0, math.e)
    for wrapped in (build("qwen2"), plain("qwen2")):  # a wrapper puts its own name in front
        (norm,) = OutputTemperature(find_targets(wrapped), final_norm="model.norm").parameters()
        assert norm.dim() == 1


class PlusOne(nn.Module):
    """A norm whose gain is one plus its parameter, as in some models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((32,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


def test_a_final_norm_not_proportional_to_its_parameters_is_refused() -> None:
    unfit = [PlusOne(), nn.Identity(), nn.RMSNorm(32, elementwise_affine=False), nn.Linear(32, 32)]
    for norm in unfit:
        model = tiny_gpt()
        model.norm = norm  # type: ignore[assignment]
        with pytest.raises(ValueError, match=rf"^final_norm .*'norm', a {type(norm).__name__}"):
            OutputTemperature(find_targets(model))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for name in ("gpt", "gpt2"):
            half = copy.deepcopy(shared(name)).to(dtype)
            assert list(OutputTemperature(find_targets(half)).parameters())


def test_a_model_without_an_output_head_is_refused() -> None:
    with pytest.raises(TypeError, match=r"get_output_embeddings.*NoneType from ModuleDict"):
        OutputTemperature(find_targets(nn.ModuleDict({"inside": tiny_gpt()})))
    with pytest.raises(TypeError, match=r"get_output_embeddings.*NoneType from GPT2Model"):
        OutputTemperature(find_targets(plain("gpt2").transformer))
