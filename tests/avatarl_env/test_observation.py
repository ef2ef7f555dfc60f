"""Tests of avatarl_env/observation.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from avatarl_env.lm.gpt import GPT
from avatarl_env.observation import LIMIT, Observation, Vitals, VitalSigns
from avatarl_env.scoring import TERMS
from avatarl_env.surgery import OPERATORS, Overlay, SurgicalTheater, find_targets, make_operator
from tests.fakes import tiny_gpt
from tests.patients import count_hooks

N_HEADS, N_LAYERS, WIDTH, HEAD_DIM = 4, 2, 32, 8


@pytest.fixture
def model() -> GPT:
    return tiny_gpt()


def signs_of(model: GPT) -> VitalSigns:
    return VitalSigns(model, find_targets(model))


def some_tokens(seed: int = 0, n_rows: int = 3, n_tokens: int = 5) -> Tensor:
    return torch.randint(16, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def read(model: GPT, tokens: Tensor, n_operations: int = 1) -> list[Vitals]:
    """Return the readings of one forward."""
    with VitalSigns(model, find_targets(model), n_operations) as signs, torch.no_grad():
        model(tokens)
    return signs.read()


def close(left: Vitals, right: Vitals, tolerance: float = 1e-5) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a == pytest.approx(b, abs=tolerance) for a, b in pairs)


def biased_gpt() -> GPT:
    """A GPT whose attention projections have biases, as those of other models have."""
    model, generator = tiny_gpt(), torch.Generator().manual_seed(7)
    for block in model.blocks:
        for module in (block.attn.c_attn, block.attn.c_proj):
            module.bias = nn.Parameter(torch.randn(len(module.weight), generator=generator))
    return model


# --- VitalSigns -----------------------------------------------------------------------------------


@torch.no_grad()
def naive_vitals(model: GPT, tokens: Tensor) -> tuple[list[float], list[float], Tensor]:
    """Compute queries, head outputs at the last 8 positions and the hidden state directly."""
    taken: list[Tensor] = []
    handles = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        for block in model.blocks
    ]
    cos, sin = model.cos[: tokens.size(1)], model.sin[: tokens.size(1)]
    x = model.embed(tokens)
    queries, outputs = [], []
    for block, handle in zip(model.blocks, handles, strict=True):
        normed = block.norm_1(x)
        x = block(x, cos, sin, None)
        handle.remove()
        for head in range(N_HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            q = normed @ block.attn.c_attn.weight[rows].T  # the queries come first
            queries.append(0.5 * math.log(q.square().mean()))
            written = taken[-1][:, -8:, rows] @ block.attn.c_proj.weight[:, rows].T
            outputs.append(0.5 * math.log(written.square().mean()))
    return queries, outputs, model.norm(x)[:, -1].mean(0)


@pytest.mark.parametrize("n_tokens", [5, 8, 9, 16])
def test_readings_equal_a_naive_computation(n_tokens: int, model: GPT) -> None:
    tokens = some_tokens(n_tokens=n_tokens)
    expected = model(tokens)
    with signs_of(model) as signs, torch.no_grad():
        logits = model(tokens)
    assert torch.equal(logits, expected)  # reading changes nothing
    (vitals,) = signs.read()
    queries, outputs, hidden = naive_vitals(model, tokens)
    assert vitals.query_log_rms == pytest.approx(queries, abs=1e-5)
    assert vitals.output_log_rms == pytest.approx(outputs, abs=1e-5)
    assert vitals.hidden == pytest.approx(hidden.numpy(), abs=1e-5)
    assert np.ptp(vitals.query_log_rms) > 0.01
    assert {x.dtype for x in vitals} == {np.dtype(np.float32)}
    assert [x.shape for x in vitals] == [(WIDTH,), (8,), (8,)]


def test_output_vitals_exclude_the_bias() -> None:
    """The bias belongs to no head; here it is far larger than any head's output."""
    tokens = some_tokens(n_tokens=12)
    quiet, loud = biased_gpt(), biased_gpt()
    with torch.no_grad():
        quiet.blocks[1].attn.c_proj.bias.zero_()
        loud.blocks[1].attn.c_proj.bias.mul_(50)
    (one,), (other,) = read(quiet, tokens), read(loud, tokens)
    assert other.output_log_rms == pytest.approx(one.output_log_rms, abs=1e-4)
    assert other.hidden != pytest.approx(one.hidden, abs=0.1)


# --- many operations ------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_vitals_of_an_overlay_are_those_of_operations_in_place(name: str, biased: bool) -> None:
    model = biased_gpt() if biased else tiny_gpt()
    operator = make_operator(name, find_targets(model))
    shape = (3, len(operator.labels))
    coefficients = np.random.default_rng(0).uniform(-1, 1, shape)
    coefficients[1] = 0
    tokens = some_tokens(n_rows=6, n_tokens=11)
    with Overlay(operator, coefficients):
        found = read(model, tokens, 3)
    for row, (reading, rows) in enumerate(zip(found, tokens.split(2), strict=True)):
        (untouched,) = read(model, rows)
        with SurgicalTheater(model, [operator]) as theater:
            operator.apply(theater, coefficients[row])
            (expected,) = read(model, rows)
        assert close(reading, expected, 1e-4)
        changes = row != 1 and name != "output_temperature"
        assert close(reading, untouched, 1e-4) != changes or name == "output_temperature"


def test_gains_of_an_overlay_move_the_vitals_by_hand() -> None:
    """In the first layer, whose input does not change, vitals move by the coefficient itself."""
    model, tokens = biased_gpt(), some_tokens(n_rows=2).repeat(2, 1)
    operator = make_operator("head_gain", find_targets(model), tied=False)
    coefficients = np.zeros((2, 16))
    coefficients[0, 1] = 0.75  # sharpness of head 1
    coefficients[1, 6] = -0.5  # loudness of head 2
    with Overlay(operator, coefficients):
        sharper, softer = read(model, tokens, 2)
    (plain,) = read(model, tokens[:2])
    rise = sharper.query_log_rms[:4] - plain.query_log_rms[:4]
    assert rise == pytest.approx([0, 0.75, 0, 0], abs=1e-5)
    assert softer.query_log_rms[:4] == pytest.approx(plain.query_log_rms[:4], abs=1e-5)
    rise = softer.output_log_rms[:4] - plain.output_log_rms[:4]
    assert rise == pytest.approx([0, 0, -0.5, 0], abs=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_on_exit(model: GPT, error: type[BaseException]) -> None:
    operator = make_operator("spectral_bands", find_targets(model))
    with signs_of(model):
        assert count_hooks(model) == 2 * N_LAYERS + 1
    assert count_hooks(model) == 0
    with pytest.raises(error), Overlay(operator, np.ones((1, 8))), signs_of(model):
        raise error("stop")
    assert count_hooks(model) == 0


# --- Observation ----------------------------------------------------------------------------------

TERM_VALUES = {
    "kl_ref": -0.5,
    "heldout_loss": 1.5,
    "distinct": 0.75,
    "collision_l2": 20.0,
    "ref_loglik": -2.5,
    "entropy": 1.25,
}


def layout(n_coef: int = 3) -> Observation:
    return Observation(find_targets(tiny_gpt()), WIDTH, n_coef)


def vitals(hidden: float = 0.0, query: float = 0.0, output: float = 0.0) -> Vitals:
    full = [np.full(n, x, dtype=np.float32) for n, x in ((WIDTH, hidden), (8, query), (8, output))]
    return Vitals(*full)


def observe(readings: Vitals, improvement: float = 0.0) -> np.ndarray:
    coefficients = np.array([0.25, -1.0, 1.0])
    return layout().observe(readings, TERM_VALUES, improvement, coefficients, 0.75)


def parts(observation: np.ndarray) -> Iterator[list[float]]:
    cuts = np.cumsum([16, 8, 8, 6, 1, 3, 1])
    assert len(observation) == cuts[-1]
    yield from (part.tolist() for part in np.split(observation, cuts[:-1]))


def test_layout_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms that a user registers are not observed."""
    monkeypatch.setitem(TERMS, "mine", TERMS["entropy"])
    hidden, query, output, terms, improvement, coefficients, time_left = parts(
        observe(vitals(query=-1.0, output=3.0), improvement=0.05)
    )
    assert hidden == [0.0] * 16
    assert query == [-0.5] * 8
    assert output == [1.5] * 8
    assert terms == [-0.5, 1.5, 0.75, 2.0, -2.5, 1.25]
    assert improvement == [0.5]
    assert coefficients == [0.25, -1.0, 1.0]
    assert time_left == [0.75]


@pytest.mark.parametrize(("n_coef", "size"), [(3, 43), (8, 48)])
def test_the_space_follows_from_the_layout(n_coef: int, size: int) -> None:
    """16 projected + 2 * 2 layers * 4 heads + 6 terms + 1 + coefficients + 1."""
    observation = layout(n_coef)
    assert observation.space() == Box(-10, 10, (size,), np.float32)
    assert observation.space() is not observation.space()
    arguments = (vitals(1.0), TERM_VALUES, 0.0, np.zeros(n_coef), 1.0)
    first, second = observation.observe(*arguments), observation.observe(*arguments)
    assert first in observation.space()
    assert first.tolist() == second.tolist()  # no running statistics
    assert not np.shares_memory(first, second)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_observations_are_always_finite_and_in_bounds(value: float) -> None:
    readings = vitals(value, value, value)
    readings.hidden[::2] = 1.0  # mixed signs and infinities must not warn either
    result = observe(readings, improvement=1e4 if value > 0 else -1e4)
    assert result in layout().space()
    _, query, _, _, improvement, *_ = parts(result)
    expected = 0.0 if math.isnan(value) else math.copysign(LIMIT, value)
    assert query == [expected] * 8
    assert abs(improvement[0]) == LIMIT
