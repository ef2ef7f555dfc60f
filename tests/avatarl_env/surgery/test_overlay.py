"""Tests of avatarl_env/surgery/overlay.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from avatarl_env.lm.generation import Generation, generate
from avatarl_env.surgery import (
    OPERATORS,
    HeadGain,
    LowRankSeed,
    Operator,
    Overlay,
    Overlayable,
    RowEdit,
    SurgicalTheater,
    find_targets,
    make_operator,
)
from tests.fakes import fingerprint
from tests.zoo import assert_same_writing, shared, tokens


class Times:
    """A third party's: multiplies what a module makes; adds to what it reads."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def row_edits(self, coefficients: ArrayLike) -> Iterator[RowEdit]:
        factor, shift = torch.tensor(np.asarray(coefficients), dtype=torch.float32).unbind(1)
        yield RowEdit(self.module, after=lambda read, made: made * factor[:, None, None])
        yield RowEdit(self.module, before=lambda read: read + shift[:, None, None])


def linear() -> nn.Linear:
    """2 x + 1 on one channel."""
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(1.0)
    return module


def coefficients(operator: Operator, n: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, len(operator.labels)))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Check that not a bit, version, address, hook or generator of the model's has moved."""

    def state() -> tuple[Any, ...]:
        parameters = [(p._version, p.data_ptr(), p.grad) for p in model.parameters()]
        return parameters, n_hooks(model), model.training, torch.get_rng_state().tolist()

    before, weights = state(), fingerprint(model)
    yield
    assert state() == before
    assert fingerprint(model) == weights


# --- which rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 2, 3)])
def test_each_operation_has_its_own_rows(shape: tuple[int, ...]) -> None:
    """Two operations, two rows each, any number of dimensions between: y = f * (2 (x + s) + 1)."""
    module = linear()
    x = torch.arange(4.0).view(4, *[1] * (len(shape) - 1)).expand(shape)[..., None]
    with untouched(module), Overlay(Times(module), [[1.0, 0.0], [10.0, 1.0]]):
        y = module(x)
    assert y.shape == (*shape, 1)
    assert y.flatten(1)[:, 0].tolist() == [1.0, 3.0, 70.0, 90.0]
    assert (y == y.flatten(1)[:, 0].view(4, *[1] * len(shape))).all()


def test_a_module_may_be_called_by_keyword() -> None:
    module = linear()
    x = torch.arange(4.0)[:, None]
    with Overlay(Times(module), [[1.0, 0.0], [10.0, 1.0]]):
        assert torch.equal(module(input=x), module(x))
    assert torch.equal(module(input=x), module(x))


def test_rows_in_any_memory_layout() -> None:
    module = linear()
    x = torch.arange(8.0).view(2, 4, 1)
    with Overlay(Times(module), [[1.0, 0.0], [10.0, 0.0]] * 2):
        found = module(x.transpose(0, 1))
        expected = module(x.transpose(0, 1).contiguous())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n_rows", [1, 2, 4])
def test_rows_that_do_not_divide_among_the_operations_are_refused(n_rows: int) -> None:
    model = shared("gpt")
    operator = HeadGain(find_targets(model))
    with (
        untouched(model),
        pytest.raises(ValueError, match=f"^the batch must .*3 operations, got {n_rows} rows"),
        Overlay(operator, coefficients(operator)),
    ):
        model(tokens(n_rows, 4))


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (1, 2, 3)])
def test_coefficients_must_be_rows(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^coefficients must have shape \(N, A\)"):
        Overlay(Times(linear()), np.zeros(shape))


# --- whatever happens, it is left as it was ------------------------------------------------------


def test_an_exception_in_the_body_passes_and_the_hooks_go() -> None:
    """Before or after a forward; that nothing took effect is not reported then."""
    model = shared("gpt")
    operator = HeadGain(find_targets(model))

    def body(*, runs: bool) -> None:
        with Overlay(operator, coefficients(operator)):
            if runs:
                model(tokens(3, 4))
            raise KeyError("mine")

    for runs in (False, True):
        with untouched(model), pytest.raises(KeyError, match="mine"):
            body(runs=runs)


class Broken:
    """Edits that fail, one way or another."""

    def __init__(self, *edits: RowEdit) -> None:
        self.edits = edits

    def row_edits(self, coefficients: ArrayLike) -> tuple[RowEdit, ...]:
        return self.edits


def failing(*args: Tensor) -> Tensor:
    raise KeyError("theirs")


def test_an_exception_in_an_edit_passes_and_the_hooks_go() -> None:
    model = nn.Sequential(linear(), linear())
    for edit in (RowEdit(model[1], before=failing), RowEdit(model[1], after=failing)):
        with (
            untouched(model),
            pytest.raises(KeyError, match="theirs"),
            Overlay(Broken(edit), [[0.0]]),
        ):
            model(torch.ones(1, 1))


def test_an_entry_that_fails_half_way_leaves_no_hook() -> None:
    model = linear()
    good, bad = RowEdit(model, before=lambda x: x), RowEdit(None, after=failing)  # type: ignore[arg-type]
    overlay = Overlay(Broken(good, bad), [[0.0]])
    for _ in range(2):
        with untouched(model), pytest.raises(AttributeError), overlay:
            pytest.fail("entered")


def test_a_deepcopy_made_inside_is_free_of_it_afterwards() -> None:
    model = linear()
    with Overlay(Times(model), [[5.0, 1.0]]):
        twin = copy.deepcopy(model)
        assert model(torch.ones(1, 1)).item() == twin(torch.ones(1, 1)).item() == 25.0
    assert twin(torch.ones(1, 1)).item() == 3.0


@pytest.mark.parametrize("kind", OPERATORS)
def test_no_parameter_and_no_generator_is_touched(kind: str) -> None:
    for name in ("gpt", "gpt2"):
        model = shared(name)
        operator = make_operator(kind, find_targets(model))
        with untouched(model):
            overlay = Overlay(operator, coefficients(operator))  # type: ignore[arg-type]
            with overlay, untouched(model), torch.no_grad():
                operated = model(tokens(3, 4))
            with torch.no_grad():
                assert not torch.equal(model(tokens(3, 4)), operated)


# --- every edit took effect ----------------------------------------------------------------------


def test_a_module_that_is_bypassed_is_an_error() -> None:
    """torch's attention reads the weights of its output projection without calling it."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.ones(2, 3, 4)
    message = r"never took effect on 2 of 2 places \(NonDynamicallyQuantizableLinear\)"
    overlay = Overlay(Times(model.out_proj), [[2.0, 0.0]])
    with untouched(model), pytest.raises(RuntimeError, match=message), overlay:
        model(x, x, x)


@torch.no_grad()  # dynamo warns where gradients are recorded
def test_what_was_compiled_before_is_an_error_and_what_is_compiled_inside_is_right() -> None:
    model = nn.Sequential(linear(), linear())
    x = torch.ones(1, 1)
    try:
        compiled = torch.compile(model, backend="eager")
        for factor in (5.0, 6.0):
            with Overlay(Times(model[0]), [[factor, 0.0]]):
                assert compiled(x).item() == 2 * 3 * factor + 1
            assert compiled(x).item() == 7.0
        torch._dynamo.reset()
        assert compiled(x).item() == 7.0
        overlay = Overlay(Times(model[0]), [[5.0, 0.0]])
        with pytest.raises(RuntimeError, match="or was compiled before"), overlay:
            compiled(x)
    finally:
        torch._dynamo.reset()


# --- again, and inside one another ---------------------------------------------------------------


def test_entering_an_open_overlay_is_refused() -> None:
    model = linear()
    overlay = Overlay(Times(model), [[5.0, 0.0]])
    with overlay:
        with pytest.raises(RuntimeError, match="open already"), overlay:
            pytest.fail("entered")
        assert model(torch.ones(1, 1)).item() == 15.0
    with overlay:
        assert model(torch.ones(1, 1)).item() == 15.0
    with pytest.raises(RuntimeError, match="2 of 2 places"), overlay:
        pass  # what took effect the last time does not count


@pytest.mark.parametrize("kind", ["head_gain", "low_rank_seed", "spectral_bands"])
def test_operations_are_relative_to_the_weights_at_entry(kind: str) -> None:
    """Not to those at the overlay's making, nor to those of its last use."""
    model = copy.deepcopy(shared("gpt"))
    operator = make_operator(kind, find_targets(model))
    c = coefficients(operator, 1)
    overlay = Overlay(operator, c)  # type: ignore[arg-type]
    read = tokens(2, 6)
    for _ in range(2):
        with torch.no_grad():
            for p in operator.parameters():
                p.mul_(1.5)
            with overlay:
                found = model(read)
            with SurgicalTheater(model, [operator]) as theater:
                operator.apply(theater, c[0])
                expected = model(read)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_changes_inside_changes_add_up() -> None:
    """Each is made from the weights, which the other does not change."""
    model = shared("gpt2")
    targets = find_targets(model)
    first, second = LowRankSeed(targets, seed=1), LowRankSeed(targets, seed=2)
    a, b = coefficients(first, 1, seed=1), coefficients(second, 1, seed=2)
    read = tokens(2, 6)
    before = {p: p.detach().clone() for p in first.parameters()}
    with torch.no_grad():
        with Overlay(first, a), Overlay(second, b):
            found = model(read)
        with SurgicalTheater(model, [first]) as theater:
            first.apply(theater, a[0])
            once = {p: p.detach().clone() for p in before}
            second.apply(theater, b[0])
            for p, old in before.items():
                theater.write(p, once[p] + (p - old))
            expected = model(read)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- under every regime --------------------------------------------------------------------------


@pytest.mark.parametrize("regime", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("kind", OPERATORS)
def test_gradient_modes_make_no_difference(kind: str, regime: Callable[[], Any]) -> None:
    model = shared("gpt2")
    operator = make_operator(kind, find_targets(model))
    c = coefficients(operator)
    with torch.no_grad(), Overlay(operator, c):  # type: ignore[arg-type]
        expected = model(tokens(6, 5))
    for entered_inside in (True, False):
        overlay = Overlay(operator, c)  # type: ignore[arg-type]
        with regime() if entered_inside else nullcontext(), overlay, regime():
            found = model(tokens(6, 5))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_autocast_agrees_with_in_place_to_its_rounding(name: str, kind: str) -> None:
    model = shared(name)
    operator = make_operator(kind, find_targets(model))
    c = coefficients(operator, 2)
    read = tokens(4, 6)
    expected = []

    def forward(rows: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(rows).float()  # type: ignore[no-any-return]

    with torch.autocast("cpu", torch.bfloat16), Overlay(operator, c):  # type: ignore[arg-type]
        found = forward(read)
    for i in range(2):
        with SurgicalTheater(model, [operator]) as theater:
            operator.apply(theater, c[i])
            expected.append(forward(read[2 * i : 2 * i + 2]))
    error = (found - torch.cat(expected)).abs()
    assert error.max() < 0.3
    assert error.mean() < 0.03
    assert (torch.cat(expected) - forward(read)).abs().mean() > 0.05


def loss_of(logits: Tensor) -> Tensor:
    """Weigh the log-probabilities, each its own way."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return (logits.log_softmax(-1) * weights).sum()


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["gpt", "gpt2"])
def test_gradients_are_those_of_the_operated_models(name: str, kind: str) -> None:
    """Of all parameters, by the chain rule: an edit is gain * W, or W + what is held constant."""
    model = copy.deepcopy(shared(name)).double()
    operator = make_operator(kind, find_targets(model))
    c = coefficients(operator, 2)
    read = tokens(2, 5)
    with Overlay(operator, c):  # type: ignore[arg-type]
        logits = model(read)
        loss_of(logits).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    for i in range(2):
        with SurgicalTheater(model, [operator]) as theater:
            operator.apply(theater, c[i])
            operated = {n: p.detach().clone() for n, p in model.named_parameters()}
        leaves = {n: p.requires_grad_() for n, p in operated.items()}
        row = torch.func.functional_call(model, leaves, (read[i : i + 1],))
        (row.log_softmax(-1)[0] * weights[i]).sum().backward()
        for n, p in model.named_parameters():
            gain = leaves[n].detach() / p.detach() if kind in GAINS else 1.0
            expected[n] += gain * leaves[n].grad
    for n, grad in expected.items():
        torch.testing.assert_close(found[n], grad, atol=1e-9, rtol=1e-7)
        assert grad.abs().max() > 1e-3


GAINS = ("head_gain", "output_temperature")


class Sizes(TorchDispatchMode):
    """Notes the most numbers that a tensor made inside takes in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.most = max(self.most, size)
        return made


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["gpt", "gpt2"])
def test_no_copy_of_a_weight_is_made_for_each_operation(name: str, kind: str) -> None:
    """For 64 operations of one row, nothing larger than one weight or one layer's activations."""
    model = shared(name)
    operator = make_operator(kind, find_targets(model))
    n = 64
    read = tokens(n, 1)
    with torch.no_grad():
        with Sizes() as plain:
            model(read)
        with Sizes() as overlaid, Overlay(operator, coefficients(operator, n)):  # type: ignore[arg-type]
            model(read)
    weights = [p.numel() for p in operator.parameters() if p.dim() > 1]
    assert overlaid.most <= max(plain.most, *weights, 0)
    assert overlaid.most < n * min(weights, default=16 * 16)


# --- writing -------------------------------------------------------------------------------------


def writer(name: str) -> tuple[nn.Module, Operator]:
    model = shared(name)
    kind = "spectral_bands" if name == "qwen3" else "head_gain"
    return model, make_operator(kind, find_targets(model))


@pytest.mark.parametrize(
    ("name", "length"), [("gpt", 6), ("gpt2", 6), ("qwen3", 6), ("neox", 6), ("mistral", 30)]
)
def test_writing_is_that_of_the_operated_models_one_by_one(name: str, length: int) -> None:
    """With the same noise, cached, and on beyond the context."""
    model, operator = writer(name)
    c = coefficients(operator, 3)
    prompts = tokens(6, length)
    uniforms = torch.rand(6, 22, generator=torch.Generator().manual_seed(4))
    with Overlay(operator, c):  # type: ignore[arg-type]
        found = generate(model, prompts, uniforms)  # type: ignore[arg-type]
    alone = []
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        with SurgicalTheater(model, [operator]) as theater:
            operator.apply(theater, c[i])
            alone.append(
                generate(
                    model,  # type: ignore[arg-type]
                    prompts[rows],
                    uniforms[rows],
                    return_distributions=True,
                    use_cache=False,
                )
            )
    expected = Generation(
        *(torch.cat(parts) for parts in zip(*(a[:3] for a in alone), strict=True))
    )  # type: ignore[arg-type]
    assert assert_same_writing(found, expected, uniforms, tolerance=1e-4) <= 1
    plain = generate(model, prompts, uniforms)  # type: ignore[arg-type]
    assert not torch.equal(found.tokens, plain.tokens)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_the_writing_of_transformers_own_generate(name: str) -> None:
    """Greedy, with its own cache; where a token differs, two were equally likely."""
    model, operator = writer(name)
    c = coefficients(operator, 3)
    prompts = tokens(6, 5)

    def write(rows: Tensor) -> Tensor:
        return model.model.generate(  # type: ignore[union-attr,operator,no-any-return]
            rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=12
        )

    plain = write(prompts)
    with Overlay(operator, c):  # type: ignore[arg-type]
        found = write(prompts)
    assert found.shape == (6, 17)
    assert not torch.equal(found, plain)
    for i in range(3):
        with SurgicalTheater(model, [operator]) as theater, torch.no_grad():
            operator.apply(theater, c[i])
            expected = write(prompts[2 * i : 2 * i + 2])
            logits = model(expected)
        for row in range(2):
            differs = (found[2 * i + row] != expected[row]).nonzero()[:, 0].tolist()
            if differs:
                here = logits[row, differs[0] - 1]
                assert here.max() - here[found[2 * i + row, differs[0]]] < 1e-4


# --- operators of others -------------------------------------------------------------------------


class InPlaceOnly:
    """An operator that only knows how to write weights."""

    labels = ("nothing",)

    def parameters(self) -> list[Tensor]:
        return []

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        pass


def test_an_operator_without_row_edits_is_refused() -> None:
    operator: Operator = InPlaceOnly()
    assert not isinstance(operator, Overlayable)
    with pytest.raises(TypeError, match="row_edits, got InPlaceOnly"):
        Overlay(operator, [[0.0]])  # type: ignore[arg-type]
