"""Tests of avatarl_env/surgery/theater.py: compiled models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatarl_env.surgery import SurgicalTheater
from tests.avatarl_env.surgery.edits import (
    EDITS,
    SHAPE_CHANGING,
    Snapshot,
    converted,
    new_dtype,
    replaced_by_a_buffer,
    replaced_by_a_tensor,
    shared,
    small,
    swapped,
    transposed,
    write,
)

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
NOT_RUNNABLE = (new_dtype, converted, swapped)  # dynamo holds a weakref: torch will not swap
RUNNABLE = [edit for edit in EDITS if edit not in (*SHAPE_CHANGING, *NOT_RUNNABLE)]
"""The edits that leave a model which still runs."""
OTHER_GRAPHS = {transposed, replaced_by_a_tensor, replaced_by_a_buffer}
"""Of these, the ones that change a weight's strides or kind."""


@pytest.fixture(autouse=True)
def no_old_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# With fullgraph nothing falls back to plain Python, which would be right without being compiled.


class Layer(nn.Linear):
    """A subclass, because `compile()` leaves torch's own layers to their caller."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Net(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


def net() -> Net:
    """Return the small model, of these classes."""
    model = Net(Layer(3, 3), nn.Linear(3, 2))
    model.load_state_dict(small().state_dict())
    return model


def wrapped(model: nn.Sequential, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place_compiled(model: nn.Sequential, backend: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend, fullgraph=True)
    return model


def layer_compiled(model: nn.Sequential, backend: Any) -> Callable[[Tensor], Tensor]:
    model[0].compile(backend=backend, fullgraph=True)
    return model


def check_every_edit(compile_: Any, backend: Any, *, rtol: float = 0.0) -> None:
    """Compare the compiled model with plain Python, in the theater and after each edit."""
    model = net()
    compiled = compile_(model, backend)
    with torch.no_grad():
        outputs, before = compiled(X), Snapshot(model)
        for edit in RUNNABLE:
            with SurgicalTheater(model, [model]) as room:
                edit(model, room)
                expected = model[1].forward(model[0].forward(X))
                torch.testing.assert_close(compiled(X), expected, rtol=rtol, atol=0)
            same = edit is not shared
            before.assert_same(same_address=same)
            before = before if same else Snapshot(model)
            assert torch.equal(compiled(X), outputs), edit.__name__


@pytest.mark.parametrize(
    ("compile_", "backend"),
    [
        (in_place_compiled, "eager"),
        pytest.param(wrapped, "aot_eager", marks=pytest.mark.slow),
        pytest.param(layer_compiled, "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_models_see_every_edit_and_its_end(compile_: Any, backend: str) -> None:
    check_every_edit(compile_, backend)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch's own imports
def test_inductor_sees_every_edit_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    check_every_edit(wrapped, "inductor", rtol=1e-5)


def test_edits_of_values_need_no_new_graph() -> None:
    graphs = []

    def counting(graph: Any, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = net()
    compiled = wrapped(model, counting)
    with torch.no_grad():
        for edit in RUNNABLE:
            if edit not in OTHER_GRAPHS:
                with SurgicalTheater(model, [model]) as room:
                    edit(model, room)
                    assert torch.equal(compiled(X), model(X))
                compiled(X)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_gradients_may_not_span_the_boundary_either() -> None:
    model, x = net(), X.clone().requires_grad_()
    compiled = wrapped(model, "aot_eager")
    with SurgicalTheater(model, [model]) as room:
        write(model, room)
        compiled(x).square().sum().backward()
        inside = x.grad
        x.grad = None
        model(x).square().sum().backward()
        assert torch.equal(inside, x.grad)
        loss = compiled(x).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_entry_is_refused_while_graphs_are_frozen() -> None:
    from torch._inductor import config

    model = net()
    room = SurgicalTheater(model, [model])
    with config.patch(freezing=True), pytest.raises(RuntimeError, match=r"freezing .*True"):
        room.__enter__()
    with room:
        pass
