"""Tests of avatarl_env/surgery/operators/head_gain.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarl_env.lm.gpt import GPT
from avatarl_env.surgery import (
    AttentionTarget,
    HeadGain,
    Overlay,
    Projection,
    SurgicalTheater,
    find_targets,
)
from tests.avatarl_env.surgery.edits import refused
from tests.fakes import bits, fingerprint, reference_logits, tiny_gpt
from tests.zoo import shared

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def coefficients(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, count)


def biased_target(dtype: torch.dtype = torch.float32) -> tuple[nn.ModuleDict, AttentionTarget]:
    """Two heads of two channels, a fused projection with a bias; all weights 1, 2, 3, ..."""
    model = nn.ModuleDict({"query": nn.Linear(3, 12), "output": nn.Linear(4, 3)})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(1.0, p.numel() + 1).view_as(p))
    model.to(dtype)
    query, key, value = (Projection(model["query"], 2, 2, start) for start in (0, 4, 8))
    output = Projection(model["output"], 2, 2, reads_heads=True)
    return model, AttentionTarget("attn", 0, query, key, value, output)


def rows_of(tensor: Tensor) -> list[list[int]]:
    return [bits(row) for row in tensor]


def test_gains_by_hand() -> None:
    """Temperatures (e, 1) and value gains (1, 1/e) on two heads of two channels."""
    model, target = biased_target()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    operator = HeadGain([target])
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, [1.0, 0.0, 0.0, -1.0])
        weight, bias = model["query"].weight.detach(), model["query"].bias.detach()
        torch.testing.assert_close(weight[:2], before["query.weight"][:2] * math.e)
        torch.testing.assert_close(bias[:2], torch.tensor([math.e, 2 * math.e]))
        # the second head's queries, all keys and all values
        assert torch.equal(weight[2:], before["query.weight"][2:])
        assert torch.equal(bias[2:], before["query.bias"][2:])
        output = model["output"].weight.detach()
        expected = torch.tensor([1.0, 2.0, 3.0 / math.e, 4.0 / math.e])
        torch.testing.assert_close(output[0], expected)
        assert torch.equal(output[:, :2], before["output.weight"][:, :2])
        assert torch.equal(model["output"].bias, before["output.bias"])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_rows_by_hand() -> None:
    """The same gains, and others, on what the modules make and read."""
    model, target = biased_target()
    x, y = torch.ones(2, 3), torch.ones(2, 4)
    plain_x, plain_y = model["query"](x), model["output"](y)
    with Overlay(HeadGain([target]), [[1.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]):
        made, mixed = model["query"](x), model["output"](y)
    assert torch.equal(made[1], plain_x[1])
    assert torch.equal(mixed[1], plain_y[1])
    torch.testing.assert_close(made[0, :2], plain_x[0, :2] * math.e)
    assert torch.equal(made[0, 2:], plain_x[0, 2:])
    # output rows 1 2 3 4 | 5 6 7 8 | 9 10 11 12, biases 1 2 3
    expected = [3 + 7 / math.e + 1, 11 + 15 / math.e + 2, 19 + 23 / math.e + 3]
    torch.testing.assert_close(mixed[0], torch.tensor(expected))


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_scale_is_nats_of_gain_at_one(scale: float) -> None:
    model, target = biased_target()
    with SurgicalTheater(model, [target]) as theater:
        HeadGain([target], scale=scale).apply(theater, [0.5, 0, 0, 0])
        expected = torch.tensor([1.0, 2.0, 3.0]) * math.exp(scale / 2)
        torch.testing.assert_close(model["query"].weight[0].detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_with_zero_coefficients_keep_every_bit_beside_those_without(
    dtype: torch.dtype,
) -> None:
    """Zeros of both signs, subnormals, infinities, and which NaN it was."""
    model, target = biased_target(dtype)
    tiny, inf = torch.finfo(dtype).smallest_normal / 4, math.inf
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    with torch.no_grad():
        odd = torch.tensor([0.0, -0.0, tiny, inf, -inf, math.nan], dtype=dtype)
        odd.view(integer)[5] += 3  # a NaN with a payload
        model["query"].weight[2:4] = odd.view(2, 3)
        model["query"].bias[2:4] = odd[1:3]
        model["output"].weight[:, 2:] = odd.view(3, 2)
    before = fingerprint(model)
    queries, columns = rows_of(model["query"].weight), rows_of(model["output"].weight.T)
    operator = HeadGain([target])
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, [1.0, 0.0, -1.0, -0.0])
        assert rows_of(model["query"].weight)[2:] == queries[2:]
        assert rows_of(model["query"].weight)[:2] != queries[:2]
        assert rows_of(model["output"].weight.T)[2:] == columns[2:]
        assert rows_of(model["output"].weight.T)[:2] != columns[:2]
        assert bits(model["query"].bias[2:4]) == bits(odd[1:3])
        operator.apply(theater, [0.0, -0.0, 0.0, -0.0])
        assert fingerprint(model) == before


def test_operations_are_relative_to_what_a_commit_kept() -> None:
    model, target = biased_target()
    operator = HeadGain([target], scale=math.log(2))
    with SurgicalTheater(model, [target]) as theater:
        operator.apply(theater, [1, 0, 0, 0])
        theater.commit()
        operator.apply(theater, [1, 0, 0, 0])
        torch.testing.assert_close(
            model["query"].weight[0].detach(), torch.tensor([4.0, 8.0, 12.0])
        )
    torch.testing.assert_close(model["query"].weight[0].detach(), torch.tensor([2.0, 4.0, 6.0]))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_scaling_attention_logits_and_what_the_heads_read(tied: bool, seed: int) -> None:
    """In place and in an overlay, by a reference that knows nothing of either."""
    model = tiny_gpt(seed)
    tokens = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(seed))
    targets = find_targets(model)
    operator = HeadGain(targets, tied=tied, scale=0.7)
    c = coefficients(len(operator.labels), seed)
    gains = torch.from_numpy(np.exp(0.7 * c)).view(-1, 2, 4).expand(2, 2, 4)  # (L, kind, H)
    expected = reference_logits(model, tokens, gains[:, 0], gains[:, 1])
    unoperated = reference_logits(model, tokens)
    assert (expected - unoperated).abs().max() > 0.05
    with SurgicalTheater(model, targets) as theater, torch.no_grad():
        operator.apply(theater, c)
        operated = model(tokens).double()
    torch.testing.assert_close(operated, expected, atol=1e-4, rtol=1e-4)
    with Overlay(operator, [c, 0 * c]), torch.no_grad():
        operated, plain = model(torch.cat([tokens, tokens])).double().chunk(2)
    torch.testing.assert_close(operated, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, unoperated, atol=1e-4, rtol=1e-4)


def moved_rows_and_columns(model: GPT, c: np.ndarray, *, tied: bool) -> Iterator[list[int]]:
    """Yield, layer by layer, which query rows changed, then which output columns did."""
    targets = find_targets(model)
    old = [(t.query.weight.detach().clone(), t.output.weight.detach().clone()) for t in targets]
    with SurgicalTheater(model, targets) as theater:
        HeadGain(targets, tied=tied).apply(theater, c)
        for target, (query, output) in zip(targets, old, strict=True):
            yield (target.query.weight != query).any(1).nonzero()[:, 0].tolist()
            yield (target.output.weight != output).any(0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_each_coefficient_moves_what_its_label_says_and_nothing_else(tied: bool) -> None:
    model = tiny_gpt()
    labels = HeadGain(find_targets(model), tied=tied).labels
    for index, label in enumerate(labels):
        c = np.zeros(len(labels))
        c[index] = 0.5
        moved = list(moved_rows_and_columns(model, c, tied=tied))
        match = re.fullmatch(r"(log-sharpness|log-value-gain) layer (all|\d) head (\d)", label)
        assert match, label
        kind, layer, head = match.groups()
        channels = list(range(8 * int(head), 8 * int(head) + 8))
        for number in range(2):
            here = channels if layer in ("all", str(number)) else []
            assert moved[2 * number] == (here if kind == "log-sharpness" else [])
            assert moved[2 * number + 1] == (here if kind == "log-value-gain" else [])


def test_labels_tied_and_not() -> None:
    """A = 2 H tied, 2 H L not, layer by layer, temperatures before gains; layers keep numbers."""
    targets = find_targets(tiny_gpt(n_heads=2, n_layers=4), [1, 3])
    kinds = ("log-sharpness", "log-value-gain")
    tied = HeadGain(targets).labels
    assert tied == tuple(f"{kind} layer all head {head}" for kind in kinds for head in range(2))
    untied = HeadGain(targets, tied=False).labels
    assert untied == tuple(
        f"{kind} layer {layer} head {head}"
        for layer in (1, 3)
        for kind in kinds
        for head in range(2)
    )


def test_layers_that_differ_in_heads_can_only_be_operated_untied() -> None:
    (wide,), (narrow,) = (
        find_targets(tiny_gpt(n_layers=1)),
        find_targets(tiny_gpt(n_layers=1, n_heads=2)),
    )
    with refused(ValueError, "targets must agree in the number of heads, got [2, 4]"):
        HeadGain([wide, narrow])
    assert len(HeadGain([wide, narrow], tied=False).labels) == 2 * (4 + 2)


@pytest.mark.parametrize("tied", [True, False])
def test_no_targets_are_refused(tied: bool) -> None:
    with refused(ValueError, "targets must agree in the number of heads, got []"):
        HeadGain([], tied=tied)


def test_queries_that_are_normalised_later_are_refused() -> None:
    with refused(
        ValueError,
        "targets must not normalise their queries after the projection: a gain there would do "
        "nothing, got ['model.model.layers.1.self_attn']",
    ):
        HeadGain(find_targets(shared("qwen3"), -1))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    """An infinite scale would make NaN of a zero coefficient."""
    with refused(ValueError, f"scale must be positive and finite, got {scale}"):
        HeadGain(find_targets(tiny_gpt()), scale=scale)


def test_refused_coefficients_change_nothing() -> None:
    model = tiny_gpt()
    targets = find_targets(model)
    operator = HeadGain(targets)
    before = fingerprint(model)
    with SurgicalTheater(model, targets) as theater:
        for bad in (np.zeros(7), np.full(8, math.nan)):
            with pytest.raises(ValueError, match=r"^coefficients must"):
                operator.apply(theater, bad)
            assert fingerprint(model) == before


def test_weights_outside_the_theater_are_not_operated_on() -> None:
    model = tiny_gpt()
    targets = find_targets(model)
    before = fingerprint(model)
    theater = SurgicalTheater(model, targets[:1])
    with theater, pytest.raises(ValueError, match=r"^parameter must be one of the targets"):
        HeadGain(targets).apply(theater, np.ones(8))
    with pytest.raises(RuntimeError, match="closed"):
        HeadGain(targets).apply(theater, np.ones(8))
    assert fingerprint(model) == before


def test_gradients_flow_through_operated_weights() -> None:
    """The operated model's gradient is the plain gradient at the operated weights."""
    model, twin = tiny_gpt(), tiny_gpt()
    tokens = torch.arange(16)[None]
    targets = find_targets(model)
    c = coefficients(8)
    with SurgicalTheater(model, targets) as theater:
        HeadGain(targets).apply(theater, c)
        twin.load_state_dict(model.state_dict())
        model(tokens).log_softmax(-1)[..., 3].sum().backward()
    twin(tokens).log_softmax(-1)[..., 3].sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert rows_of(p.grad) == rows_of(q.grad)
