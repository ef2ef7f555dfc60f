"""Properties that every operator of `OPERATORS` must have, on every architecture."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarl_env.surgery import (
    OPERATORS,
    HeadGain,
    Operator,
    Overlay,
    Overlayable,
    SurgicalTheater,
    find_targets,
    make_operator,
)
from avatarl_env.surgery.operators.base import as_coefficients
from tests.fakes import bits, fingerprint, tiny_gpt
from tests.zoo import ZOO, shared, tokens

PAIRS = [(m, o) for m in ZOO for o in OPERATORS if (m, o) != ("qwen3", "head_gain")]
DOUBLES = [(m, o) for m, o in PAIRS if m in ("gpt", "gpt2", "neox")]  # no norm in float32 there
GPT2 = [(m, o) for m, o in PAIRS if m == "gpt2"]
OPTIONS: dict[str, dict[str, object]] = {
    "head_gain": {"tied": False, "scale": 0.5},
    "spectral_bands": {
        "projections": ("key", "value", "output"),
        "n_bands": 3,
        "tied": False,
        "scale": 2.0,
    },
    "low_rank_seed": {
        "projections": "value",
        "n_directions": 3,
        "rank": 2,
        "seed": 5,
        "scale": 0.5,
    },
    "layer_truncation": {"projections": ["query", "key"], "tied": True, "scale": 0.5},
    "seed_rank_one": {"projections": ("output", "query"), "tied": True, "scale": 0.5},
    "output_temperature": {"scale": 0.5},
}
"""Options off their defaults."""


def rows(operator: Operator, n: int = 3, seed: int = 0) -> np.ndarray:
    """Draw (N, A) coefficients, of which row 1 is zero."""
    c = np.random.default_rng(seed).uniform(-1, 1, (n, len(operator.labels)))
    c[1] = 0
    return c


def one_by_one(model: nn.Module, operator: Operator, c: np.ndarray, read: Tensor) -> Tensor:
    """Return the logits of every operation's rows, operated in place."""
    logits = []
    for operation, part in zip(c, read.chunk(len(c)), strict=True):
        with SurgicalTheater(model, [operator]) as theater, torch.no_grad():
            operator.apply(theater, operation)
            logits.append(model(part))
    return torch.cat(logits)


def check_forms_agree(
    model: nn.Module, operator: Any, tolerance: float, *, effect: float = 1e-3
) -> None:
    read = tokens(6, 10)
    c = rows(operator)
    before = fingerprint(model)
    with torch.no_grad():
        plain = model(read)
        with Overlay(operator, c):
            found = model(read)
        assert torch.equal(model(read), plain)
    # A row of zeros changes nothing: the output is that of the plain forward of the same batch.
    assert torch.equal(found[2:4], plain[2:4])
    expected = one_by_one(model, operator, c, read)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for operation in (slice(0, 2), slice(4, 6)):
        assert (expected - plain)[operation].abs().max() > effect
    assert fingerprint(model) == before


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_in_place_and_in_an_overlay_are_the_same_operation(name: str, kind: str) -> None:
    """With the default and with other options."""
    model = shared(name)
    for options in ({}, OPTIONS.get(kind, {})):
        check_forms_agree(model, make_operator(kind, find_targets(model), **options), 1e-4)


@pytest.mark.parametrize(("name", "kind"), DOUBLES)
def test_in_double_precision_they_agree_to_twelve_digits(name: str, kind: str) -> None:
    model = copy.deepcopy(shared(name)).double()
    check_forms_agree(model, make_operator(kind, find_targets(model)), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kind"), GPT2)
def test_in_half_precision_they_agree_to_its_rounding(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """Logits are of order 1 and go through some ten roundings in a row."""
    model = copy.deepcopy(shared(name)).to(dtype)
    operator = make_operator(kind, find_targets(model))
    check_forms_agree(model, operator, 40 * torch.finfo(dtype).eps, effect=0.01)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_only_the_projections_own_part_of_listed_parameters_is_written(
    name: str, kind: str
) -> None:
    model = shared(name)
    targets = find_targets(model)
    operator = make_operator(kind, targets)
    listed = list(operator.parameters())
    assert len({id(p) for p in listed}) == len(listed)
    is_attention = any(p is q for t in targets for p in t.parameters() for q in listed)
    allowed = {p: torch.full_like(p, not is_attention, dtype=torch.bool) for p in listed}
    chosen = getattr(operator, "projections", ("query", "output")) if is_attention else ()
    for projection in (getattr(target, part) for target in targets for part in chosen):
        projection.by_head(allowed[projection.weight]).fill_(True)
        if projection.bias in allowed and not projection.reads_heads:
            projection.heads(allowed[projection.bias]).fill_(True)
    before = {p: p.detach().clone() for p in model.parameters()}
    with SurgicalTheater(model, [operator]) as theater:
        assert theater.saved_bytes == sum(p.numel() * p.element_size() for p in listed)
        operator.apply(theater, rows(operator)[0])
        for p, old in before.items():
            kept = ~allowed[p] if p in allowed else torch.ones_like(p, dtype=torch.bool)
            assert bits(p[kept]) == bits(old[kept])
            assert p not in allowed or (p != old).any()
            assert p.is_leaf
            assert p.grad is None


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *((m, o, torch.float32) for m, o in PAIRS),
        *((m, o, torch.bfloat16) for m, o in DOUBLES),
        *((m, o, d) for m, o in GPT2 for d in (torch.float64, torch.float16)),
    ],
)
def test_zero_coefficients_restore_every_bit_after_other_operations(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """Also of weights with NaN, infinities and denormals, for zeros of either sign."""
    model = copy.deepcopy(shared(name)).to(dtype)
    operator = make_operator(kind, find_targets(model))
    first, zero, other = rows(operator)
    before = fingerprint(model)
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, first)
        once = fingerprint(model)
        for c in (first, other, first, zero):
            operator.apply(theater, c)
            assert (fingerprint(model) == once) == (c is first)
        assert fingerprint(model) == before
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    odd = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny / 4, math.inf, math.nan], dtype=dtype)
    odd.view(integer)[4] += 3
    for p in operator.parameters():
        p.data.view(-1)[:5] = odd
    before = fingerprint(model)
    with SurgicalTheater(model, [operator]) as theater:
        for sign in (1, -1):
            operator.apply(theater, sign * zero)
            assert fingerprint(model) == before


@pytest.mark.parametrize("kind", OPERATORS)
def test_wrong_arguments_are_refused_by_every_operator(kind: str) -> None:
    """Labels are distinct, one for each coefficient; a refused call changes nothing."""
    model = tiny_gpt()
    targets = find_targets(model)
    for options in ({}, OPTIONS.get(kind, {})):
        operator: Any = make_operator(kind, targets, **options)
        count = len(operator.labels)
        assert len(set(operator.labels)) == count >= 1
        assert isinstance(operator, Overlayable)
        before = fingerprint(model)
        with SurgicalTheater(model, [operator]) as theater:
            for wrong in (count - 1, count + 1):
                with pytest.raises(ValueError, match=rf"coefficients .*\({count},\).*\({wrong},"):
                    operator.apply(theater, np.zeros(wrong))
                with pytest.raises(ValueError, match=rf"coefficients .*{count}\).*\(2, {wrong}\)"):
                    operator.row_edits(np.zeros((2, wrong)))
            with pytest.raises(ValueError, match=r"coefficients must be finite, got .*nan"):
                operator.apply(theater, np.full(count, math.nan))
            assert fingerprint(model) == before
        with pytest.raises(RuntimeError, match="closed"):
            operator.apply(theater, np.ones(count))
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"scale must be .*{scale}"):
            make_operator(kind, targets, scale=scale)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        make_operator(kind, targets, colour=1)


@pytest.mark.parametrize(
    "given",
    [
        [1, 0, -1],
        np.array([1, 0, -1], dtype=np.int8),
        np.array([-1.0, 0.0, 1.0])[::-1],
        torch.tensor([1.0, 0.0, -1.0]),
    ],
)
def test_coefficients_of_any_kind_become_a_new_float64_tensor(given: Any) -> None:
    for found in (as_coefficients(given, 3), as_coefficients([given, given], 3, rows=True)[1]):
        assert found.dtype == torch.float64
        assert found.tolist() == [1.0, 0.0, -1.0]
        found.fill_(7.0)
    assert list(given) == [1, 0, -1]


@pytest.mark.parametrize(("name", "hint"), [("head_gian", "'head_gain'"), ("x", "")])
def test_unknown_operator_is_refused_with_the_closest_name(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"^operator must be one of .*'{name}'.*{hint}"):
        make_operator(name, find_targets(tiny_gpt()))


def test_operators_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "mine", HeadGain)
    operator = make_operator("mine", find_targets(tiny_gpt()), tied=False, scale=0.5)
    assert isinstance(operator, HeadGain)
    assert (operator.tied, operator.scale) == (False, 0.5)
