"""Tests of avatarl_env/surgery/overlay.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
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
    Operator,
    Overlay,
    RowEdit,
    SurgicalTheater,
    find_targets,
    make_operator,
)
from tests.fakes import fingerprint
from tests.patients import InPlaceGain, count_hooks
from tests.zoo import assert_same_writing, shared, tokens


class Times:
    """A user's own edits: scale a module's output, shift its input."""

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


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Check that no bit, version, address or hook of the model changes."""

    def state() -> tuple[Any, ...]:
        parameters = [(p._version, p.data_ptr(), p.grad) for p in model.parameters()]
        return parameters, count_hooks(model), model.training

    before, weights = state(), fingerprint(model)
    yield
    assert state() == before
    assert fingerprint(model) == weights


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


# --- exceptions and copies -----------------------------------------------------------------------


@pytest.mark.parametrize("n_forwards", [0, 1])
def test_an_exception_in_the_body_removes_the_hooks(n_forwards: int) -> None:
    model = linear()

    def operate() -> None:
        with Overlay(Times(model), [[1.0, 0.0]]):
            for _ in range(n_forwards):
                model(torch.ones(1, 1))
            raise KeyError

    with untouched(model), pytest.raises(KeyError):
        operate()


def failing(*args: Tensor) -> Tensor:
    raise KeyError


@pytest.mark.parametrize("edit", [{"before": failing}, {"after": failing}])
def test_an_exception_in_an_edit_removes_the_hooks(edit: dict[str, Any]) -> None:
    model = nn.Sequential(linear(), linear())

    class Broken:
        def row_edits(self, coefficients: ArrayLike) -> tuple[RowEdit, ...]:
            return (RowEdit(model[1], **edit),)

    with untouched(model), pytest.raises(KeyError), Overlay(Broken(), [[0.0]]):
        model(torch.ones(1, 1))


def test_a_module_that_is_bypassed_is_an_error() -> None:
    """torch's attention reads the weights of its output projection without calling it."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.ones(2, 3, 4)
    message = r"never took effect on 2 of 2 places \(NonDynamicallyQuantizableLinear\)"
    overlay = Overlay(Times(model.out_proj), [[2.0, 0.0]])
    with untouched(model), pytest.raises(RuntimeError, match=message), overlay:
        model(x, x, x)


@pytest.mark.slow
@torch.no_grad()  # dynamo warns where gradients are recorded
def test_a_model_compiled_before_is_refused_and_one_compiled_inside_is_right() -> None:
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


def test_an_overlay_can_be_reused_but_not_entered_twice() -> None:
    model = linear()
    overlay = Overlay(Times(model), [[5.0, 0.0]])
    with overlay:
        with pytest.raises(RuntimeError, match="open already"), overlay:
            pytest.fail("entered")
        assert model(torch.ones(1, 1)).item() == 15.0
    with overlay:
        assert model(torch.ones(1, 1)).item() == 15.0
    with pytest.raises(RuntimeError, match="2 of 2 places"), overlay:
        pass  # edits that took effect the last time do not count


def test_operations_are_relative_to_the_weights_at_entry() -> None:
    """Not to the weights when the overlay was made or last used."""
    model = copy.deepcopy(shared("gpt"))
    operator = make_operator("spectral_bands", find_targets(model))
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


# --- gradient modes, precision, memory -----------------------------------------------------------


@pytest.mark.parametrize("kind", OPERATORS)
def test_gradient_modes_make_no_difference(kind: str) -> None:
    model = shared("gpt2")
    operator = make_operator(kind, find_targets(model))
    c = coefficients(operator)
    with torch.no_grad(), Overlay(operator, c):  # type: ignore[arg-type]
        expected = model(tokens(6, 5))
    for regime in (torch.inference_mode, nullcontext):
        for around in (regime, nullcontext):
            overlay = Overlay(operator, c)  # type: ignore[arg-type]
            with around(), overlay, regime():
                assert torch.equal(model(tokens(6, 5)), expected)


@pytest.mark.parametrize("kind", OPERATORS)
def test_autocast_agrees_with_in_place_to_its_rounding(kind: str) -> None:
    model = shared("llama")
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
    """Weight every log-probability differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return (logits.log_softmax(-1) * weights).sum()


@pytest.mark.parametrize("kind", OPERATORS)
def test_gradients_are_those_of_the_operated_models(kind: str) -> None:
    """For all parameters, by the chain rule: an edit is gain * W, or W plus a constant."""
    model = copy.deepcopy(shared("gpt2")).double()
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
    """Record the size in elements of the largest storage that is allocated."""

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
def test_weights_are_not_copied_for_each_operation(kind: str) -> None:
    """64 operations of one row need no tensor larger than one weight or one layer's activations."""
    model = shared("gpt2")
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


@pytest.mark.parametrize(("name", "length"), [("gpt", 6), ("qwen3", 6), ("mistral", 30)])
def test_generated_text_is_that_of_the_operated_models_one_by_one(name: str, length: int) -> None:
    """With the same noise, cached, and beyond the context."""
    model = shared(name)
    operator = make_operator("spectral_bands", find_targets(model))
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


def test_an_operator_without_row_edits_is_refused() -> None:
    operator = InPlaceGain(find_targets(shared("gpt")))
    with pytest.raises(TypeError, match=r"row_edits.*InPlaceGain"):
        Overlay(operator, coefficients(operator))  # type: ignore[arg-type]
