"""Tests of avatarl_env/surgery/operators/__init__.py: every operator on every architecture."""

from __future__ import annotations

import copy
import math

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
from tests.avatarl_env.surgery.edits import refused
from tests.fakes import bits, fingerprint, tiny_gpt
from tests.zoo import ZOO, shared, tokens

PAIRS = [(m, o) for m in ZOO for o in OPERATORS if (m, o) != ("qwen3", "head_gain")]
FEW = [(m, o) for m, o in PAIRS if m in ("gpt2", "qwen3", "phi3")]  # fused, separate, grouped
DOUBLES = [(m, o) for m, o in PAIRS if m in ("gpt", "gpt2", "neox")]  # no norm in float32 there

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
"""Every option off its default."""


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
    model: nn.Module, operator: Operator, tolerance: float, *, effect: float = 1e-3
) -> None:
    read = tokens(6, 10)
    c = rows(operator)
    before = fingerprint(model)
    with torch.no_grad():
        plain = model(read)
        with Overlay(operator, c):  # type: ignore[arg-type]
            found = model(read)
        assert torch.equal(model(read), plain)
    # All zeros act as nothing: equal to the plain forward of the same batch, 0.0 being -0.0.
    assert torch.equal(found[2:4], plain[2:4])
    expected = one_by_one(model, operator, c, read)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for operation in (slice(0, 2), slice(4, 6)):
        assert (expected - plain)[operation].abs().max() > effect
    assert fingerprint(model) == before


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_in_place_and_in_an_overlay_are_the_same_operation(name: str, kind: str) -> None:
    model = shared(name)
    check_forms_agree(model, make_operator(kind, find_targets(model)), 1e-4)


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_and_with_options_off_their_defaults(name: str, kind: str) -> None:
    model = shared(name)
    targets = find_targets(model)
    operator = make_operator(kind, targets, **OPTIONS[kind])
    check_forms_agree(model, operator, 1e-4)
    default = make_operator(kind, targets)
    assert kind == "output_temperature" or default.labels != operator.labels


@pytest.mark.parametrize(("name", "kind"), DOUBLES)
def test_in_double_precision_they_agree_to_twelve_digits(name: str, kind: str) -> None:
    model = copy.deepcopy(shared(name)).double()
    check_forms_agree(model, make_operator(kind, find_targets(model)), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kind"), [(m, o) for m, o in DOUBLES if m == "gpt2"])
def test_in_half_precision_they_agree_to_its_rounding(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """Logits are of order 1 and go through some ten roundings in a row."""
    model = copy.deepcopy(shared(name)).to(dtype)
    check_forms_agree(
        model, make_operator(kind, find_targets(model)), 40 * torch.finfo(dtype).eps, effect=0.01
    )


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_only_a_projection_s_own_part_of_its_listed_weights_is_written(
    name: str, kind: str
) -> None:
    model = shared(name)
    targets = find_targets(model)
    operator = make_operator(kind, targets)
    listed = list(operator.parameters())
    assert len({id(p) for p in listed}) == len(listed)
    allowed = {p: torch.zeros_like(p, dtype=torch.bool) for p in listed}
    if kind == "output_temperature":
        for mask in allowed.values():
            mask.fill_(True)
    else:
        chosen = getattr(operator, "projections", ("query", "output"))
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
            if p in allowed:
                assert (p != old).any()
    for p, old in before.items():
        assert bits(p) == bits(old)


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *((m, o, torch.float32) for m, o in PAIRS),
        *((m, o, torch.bfloat16) for m, o in DOUBLES),
        *(("gpt2", o, d) for o in OPERATORS for d in (torch.float64, torch.float16)),
    ],
)
def test_zero_is_the_identity_bit_for_bit(name: str, kind: str, dtype: torch.dtype) -> None:
    """On weights as odd as they come, with zeros of either sign, after another operation too."""
    model = copy.deepcopy(shared(name)).to(dtype)
    operator = make_operator(kind, find_targets(model))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    odd = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny / 4, math.inf, math.nan], dtype=dtype)
    odd.view(integer)[4] += 3
    count = len(operator.labels)
    before = fingerprint(model)
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, rows(operator)[0])
        assert fingerprint(model) != before
        operator.apply(theater, np.zeros(count))
        assert fingerprint(model) == before
    for p in operator.parameters():
        p.data.view(-1)[:5] = odd
    before = fingerprint(model)
    with SurgicalTheater(model, [operator]) as theater:
        for zero in (0.0, -0.0):
            operator.apply(theater, np.full(count, zero))
            assert fingerprint(model) == before


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_applying_twice_is_applying_once_whatever_came_between(name: str, kind: str) -> None:
    model = copy.deepcopy(shared(name))
    operator = make_operator(kind, find_targets(model))
    first, zero, other = rows(operator)
    before = fingerprint(model)
    with SurgicalTheater(model, [operator]) as theater:
        operator.apply(theater, first)
        once = fingerprint(model)
        for c in (first, other, first, zero, first):
            operator.apply(theater, c)
            assert (fingerprint(model) == once) == (c is first)
    assert fingerprint(model) == before


@pytest.mark.parametrize("options", [{}, OPTIONS])
@pytest.mark.parametrize(("name", "kind"), FEW)
def test_labels_are_distinct_and_their_number_is_that_of_the_coefficients(
    name: str, kind: str, options: dict[str, dict[str, object]]
) -> None:
    model = shared(name)
    operator = make_operator(kind, find_targets(model), **options.get(kind, {}))
    count = len(operator.labels)
    assert len(set(operator.labels)) == count >= 1
    assert isinstance(operator, Overlayable)
    with SurgicalTheater(model, [operator]) as theater:
        for wrong in (count - 1, count + 1):
            with refused(ValueError, f"coefficients must have shape ({count},), got ({wrong},)"):
                operator.apply(theater, np.zeros(wrong))
            message = f"coefficients must have shape (N, {count}), got (2, {wrong})"
            with refused(ValueError, message):
                operator.row_edits(np.zeros((2, wrong)))


def test_building_and_using_operators_leaves_the_global_generators_alone() -> None:
    model = shared("gpt")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for kind in OPERATORS:
        operator = make_operator(kind, find_targets(model))
        check_forms_agree(model, operator, 1e-4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002


# --- make_operator -------------------------------------------------------------------------------


def test_operator_is_made_by_name_with_its_options() -> None:
    targets = find_targets(tiny_gpt())
    operator = make_operator("head_gain", targets, tied=False, scale=0.5)
    assert isinstance(operator, HeadGain)
    assert (operator.targets, operator.tied, operator.scale) == (tuple(targets), False, 0.5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("head_gian", ", did you mean 'head_gain'?"),
        ("spectralbands", ", did you mean 'spectral_bands'?"),
        ("x", ""),
    ],
)
def test_unknown_operator_is_refused_with_the_closest_name(name: str, hint: str) -> None:
    with refused(ValueError, f"operator must be one of {sorted(OPERATORS)}, got '{name}'{hint}"):
        make_operator(name, find_targets(tiny_gpt()))


def test_unknown_option_is_refused_by_its_name() -> None:
    for kind in OPERATORS:
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            make_operator(kind, find_targets(tiny_gpt()), colour=1)


def test_operators_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "mine", HeadGain)
    assert isinstance(make_operator("mine", find_targets(tiny_gpt())), HeadGain)
