"""A small model, many ways to edit it, and a snapshot to compare with."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

from avatarl_env.surgery import SurgicalTheater
from tests.fakes import fingerprint


def small() -> nn.Sequential:
    """Two linear layers of known weights 1, 2, 3, ..."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(1.0, p.numel() + 1).view_as(p) / 8)
    return model


def run_in_thread(function: Callable[[], object]) -> BaseException | None:
    """Return what `function` raised on another thread."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return raised[0] if raised else None


# --- the ways to edit ----------------------------------------------------------------------------


def write(model: nn.Sequential, room: SurgicalTheater) -> None:
    room.write(model[0].weight, torch.full((3, 3), 7.0))


def in_place(model: nn.Sequential, room: SurgicalTheater) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2).add_(1)


def through_data(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight.data.add_(0.5)


def through_numpy(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight.detach().numpy()[0, 0] = 100.0


def new_data(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight.data = torch.zeros(3, 3)


def new_data_edited(model: nn.Sequential, room: SurgicalTheater) -> None:
    in_place(model, room)
    model[0].weight.data = model[0].weight.data * 2
    in_place(model, room)


def new_shape(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight.data = torch.zeros(5, 3)
    model[0].bias.data = torch.zeros(5)


def new_dtype(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight.data = model[0].weight.data.double() * 3


def transposed(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight.data = model[0].weight.data.T


def loaded(model: nn.Sequential, room: SurgicalTheater) -> None:
    model.load_state_dict({name: -x for name, x in model.state_dict().items()})


def assigned(model: nn.Sequential, room: SurgicalTheater) -> None:
    state = {name: -x for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def converted(model: nn.Sequential, room: SurgicalTheater) -> None:
    model.half()
    model.double()


def replaced(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight = nn.Parameter(torch.zeros(3, 3))


def set_to_none(model: nn.Sequential, room: SurgicalTheater) -> None:
    model[0].weight = None
    model[0].bias = None


def deleted(model: nn.Sequential, room: SurgicalTheater) -> None:
    del model[0].weight


def replaced_by_a_tensor(model: nn.Sequential, room: SurgicalTheater) -> None:
    value = model[0].weight * 2
    del model[0].weight
    model[0].weight = value


def replaced_by_a_buffer(model: nn.Sequential, room: SurgicalTheater) -> None:
    del model[0].weight
    model[0].register_buffer("weight", torch.zeros(3, 3))


def replaced_by_a_module(model: nn.Sequential, room: SurgicalTheater) -> None:
    del model[0].weight
    model[0].weight = nn.Linear(2, 2)


def taken_out_and_put_back(model: nn.Sequential, room: SurgicalTheater) -> None:
    weight = model[0].weight
    del model[0].weight
    model[0].weight = weight


def set_storage(model: nn.Sequential, room: SurgicalTheater) -> None:
    with torch.no_grad():
        model[0].weight.set_(torch.zeros(3, 3))


def swapped(model: nn.Sequential, room: SurgicalTheater) -> None:
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.zeros(3, 3)))


def shared(model: nn.Sequential, room: SurgicalTheater) -> None:
    model.share_memory()
    in_place(model, room)


def optimizer_step(model: nn.Sequential, room: SurgicalTheater) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def all_at_once(model: nn.Sequential, room: SurgicalTheater) -> None:
    write(model, room)
    new_data(model, room)
    in_place(model, room)
    new_shape(model, room)
    deleted(model, room)


Edit = Callable[[nn.Sequential, SurgicalTheater], None]

SHAPE_CHANGING: list[Edit] = [new_shape, set_to_none, deleted, replaced_by_a_module, all_at_once]
EDITS: list[Edit] = [
    write,
    in_place,
    through_data,
    through_numpy,
    new_data,
    new_data_edited,
    new_dtype,
    transposed,
    loaded,
    assigned,
    converted,
    replaced,
    replaced_by_a_tensor,
    replaced_by_a_buffer,
    taken_out_and_put_back,
    set_storage,
    swapped,
    shared,
    optimizer_step,
    *SHAPE_CHANGING,
]
NEW_PARAMETERS: list[Edit] = [
    new_dtype,
    assigned,
    converted,
    replaced,
    replaced_by_a_tensor,
    replaced_by_a_buffer,
]
"""Edits that leave another Parameter, or one of another dtype, in a target's place."""
COMMITTABLE = [edit for edit in EDITS if edit not in (*SHAPE_CHANGING, *NEW_PARAMETERS)]


class Snapshot:
    """Everything of a model that a theater must restore."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = fingerprint(model)
        self.parameters = list(model.parameters())
        self.pointers = [p.data_ptr() for p in self.parameters]
        self.strides = [p.stride() for p in self.parameters]
        self.attributes = [set(vars(module)) for module in model.modules()]

    def assert_same(self, *, same_address: bool = True) -> None:
        state = fingerprint(self.model)
        assert list(state) == list(self.state)  # the order, too
        assert state == self.state
        found = list(self.model.parameters())
        assert [id(p) for p in found] == [id(p) for p in self.parameters]
        assert [p.stride() for p in found] == self.strides
        assert [set(vars(module)) for module in self.model.modules()] == self.attributes
        if same_address:
            assert [p.data_ptr() for p in found] == self.pointers
