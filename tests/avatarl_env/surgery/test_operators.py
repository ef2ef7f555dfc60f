"""Tests of avatarl_env/surgery/operators.py."""

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
    SurgicalTheater,
    find_targets,
    make_operator,
)
from avatarl_env.surgery.operators import OPERATORS, as_coefficients
from tests.fakes import bits, fingerprint, reference_logits, tiny_gpt

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
    return model, AttentionTarget("attn", 0, 2, 2, model["query"], model["output"])


def rows_of(tensor: Tensor) -> list[list[int]]:
    return [bits(row) for row in tensor]


# --- HeadGain ------------------------------------------------------------------------------------


def test_gains_by_hand() -> None:
    """Temperatures (e, 1) and value gains (1, 1/e) on two heads of two channels."""
    model, target = biased_target()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    operator = HeadGain([target])
    with SurgicalTheater(model, [target]) as theater:
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


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_scale_is_nats_of_gain_at_one(scale: float) -> None:
    model, target = biased_target()
    with SurgicalTheater(model, [target]) as theater:
        HeadGain([target], scale=scale).apply(theater, [0.5, 0, 0, 0])
        expected = torch.tensor([1.0, 2.0, 3.0]) * math.exp(scale / 2)
        torch.testing.assert_close(model["query"].weight[0].detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_is_the_identity_bit_for_bit(dtype: torch.dtype, zero: float) -> None:
    model, target = biased_target(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        model["query"].weight[0] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny])
        model["query"].weight[1] = torch.tensor([math.inf, -math.inf, torch.finfo(dtype).max])
        model["query"].bias[0] = -0.0
    before = fingerprint(model)
    with SurgicalTheater(model, [target]) as theater:
        HeadGain([target], scale=3.0).apply(theater, [zero] * 4)
        assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_leaves_a_whole_model_and_its_logits_alone(dtype: torch.dtype) -> None:
    model = tiny_gpt().to(dtype)
    tokens = torch.arange(16)[None]
    before, logits = fingerprint(model), model(tokens)
    targets = find_targets(model)
    for tied in (True, False):
        operator = HeadGain(targets, tied=tied)
        with SurgicalTheater(model, targets) as theater:
            operator.apply(theater, np.zeros(len(operator.labels)))
            assert fingerprint(model) == before
            assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_applying_twice_is_applying_once_whatever_came_between(dtype: torch.dtype) -> None:
    model = tiny_gpt().to(dtype)
    targets = find_targets(model)
    operator = HeadGain(targets)
    first, other = coefficients(8, 1), coefficients(8, 2)
    before = fingerprint(model)
    with SurgicalTheater(model, targets) as theater:
        operator.apply(theater, first)
        once = fingerprint(model)
        assert once != before
        operator.apply(theater, first)
        assert fingerprint(model) == once
        operator.apply(theater, other)
        assert fingerprint(model) != once
        operator.apply(theater, first)
        assert fingerprint(model) == once
        operator.apply(theater, np.zeros(8))
        assert fingerprint(model) == before
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
    model = tiny_gpt(seed)
    tokens = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(seed))
    targets = find_targets(model)
    operator = HeadGain(targets, tied=tied, scale=0.7)
    c = coefficients(len(operator.labels), seed)
    gains = torch.from_numpy(np.exp(0.7 * c)).view(-1, 2, 4).expand(2, 2, 4)  # (L, kind, H)
    expected = reference_logits(model, tokens, gains[:, 0], gains[:, 1])
    unoperated = reference_logits(model, tokens)
    with SurgicalTheater(model, targets) as theater, torch.no_grad():
        operator.apply(theater, c)
        operated = model(tokens).double()
    torch.testing.assert_close(operated, expected, atol=1e-4, rtol=1e-4)
    assert (expected - unoperated).abs().max() > 0.05


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
    assert len(set(labels)) == len(labels)
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
    """A = 2 H tied, 2 H L not, layer by layer, temperatures before gains."""
    targets = find_targets(tiny_gpt(n_heads=2))
    kinds = ("log-sharpness", "log-value-gain")
    tied = HeadGain(targets).labels
    assert tied == tuple(f"{kind} layer all head {head}" for kind in kinds for head in range(2))
    untied = HeadGain(targets, tied=False).labels
    assert untied == tuple(
        f"{kind} layer {layer} head {head}"
        for layer in range(2)
        for kind in kinds
        for head in range(2)
    )


def test_layers_that_differ_in_heads_can_only_be_operated_untied() -> None:
    (wide,), (narrow,) = (
        find_targets(tiny_gpt(n_layers=1)),
        find_targets(tiny_gpt(n_layers=1, n_heads=2)),
    )
    message = re.escape("targets must agree in the number of heads, got [2, 4]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        HeadGain([wide, narrow])
    assert len(HeadGain([wide, narrow], tied=False).labels) == 2 * (4 + 2)


@pytest.mark.parametrize("tied", [True, False])
def test_no_targets_are_refused(tied: bool) -> None:
    message = re.escape("targets must agree in the number of heads, got []")
    with pytest.raises(ValueError, match=f"^{message}$"):
        HeadGain([], tied=tied)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    """An infinite scale would make NaN of a zero coefficient."""
    with pytest.raises(ValueError, match=f"^scale must be positive and finite, got {scale}$"):
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


# --- coefficients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        [1, 0, -1],
        (1.0, 0.0, -1.0),
        np.array([1, 0, -1], dtype=np.float32),
        np.array([1, 0, -1], dtype=np.int8),
        np.array([-1.0, 0.0, 1.0])[::-1],
        torch.tensor([1.0, 0.0, -1.0]),
    ],
)
def test_coefficients_of_any_kind_become_float64(given: object) -> None:
    found = as_coefficients(given, 3)  # type: ignore[arg-type]
    assert found.dtype == torch.float64
    assert found.tolist() == [1.0, 0.0, -1.0]


def test_coefficients_are_copied() -> None:
    given = np.zeros(3)
    as_coefficients(given, 3).fill_(7.0)
    assert given.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(), (2,), (4,), (1, 3), (3, 1), (0,)])
def test_coefficients_must_have_the_operators_shape(shape: tuple[int, ...]) -> None:
    message = re.escape(f"coefficients must have shape (3,), got {shape}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        as_coefficients(np.zeros(shape), 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coefficients_must_be_finite(bad: float) -> None:
    message = re.escape(f"coefficients must be finite, got [0.0, {bad}, 1.0]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        as_coefficients([0.0, bad, 1.0], 3)


# --- make_operator -------------------------------------------------------------------------------


def test_operator_is_made_by_name_with_its_options() -> None:
    targets = find_targets(tiny_gpt())
    operator = make_operator("head_gain", targets, tied=False, scale=0.5)
    assert isinstance(operator, HeadGain)
    assert (operator.targets, operator.tied, operator.scale) == (targets, False, 0.5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("head_gian", ", did you mean 'head_gain'?"),
        ("headgain", ", did you mean 'head_gain'?"),
        ("x", ""),
    ],
)
def test_unknown_operator_is_refused_with_the_closest_name(name: str, hint: str) -> None:
    message = re.escape(f"operator must be one of ['head_gain'], got '{name}'{hint}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_operator(name, find_targets(tiny_gpt()))


def test_operators_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "mine", HeadGain)
    assert isinstance(make_operator("mine", find_targets(tiny_gpt())), HeadGain)
