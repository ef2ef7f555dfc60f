"""Tests of avatarl_env/surgery/theater.py: random programs against a specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from avatarl_env.surgery import SurgicalTheater, theater
from tests.avatarl_env.surgery.edits import (
    Snapshot,
    small,
)
from tests.fakes import bits

# --- random programs -----------------------------------------------------------------------------

NAMES = ("0.weight", "0.bias", "1.weight")
OPERATIONS = st.one_of(
    st.tuples(st.just("open"), st.sets(st.sampled_from(NAMES), min_size=1)),
    st.tuples(st.just("close"), st.integers(0, 5)),
    st.tuples(st.just("commit"), st.integers(0, 5)),
    st.tuples(
        st.sampled_from(["fill", "data", "new data", "resize", "cast", "replace", "delete"]),
        st.sampled_from(NAMES),
    ),
)


class Model:
    """What the weights must be, kept as plain values beside the real model."""

    def __init__(self) -> None:
        self.real = small()
        self.values: dict[str, Tensor | None] = {
            name: self.real.get_parameter(name).detach().clone() for name in NAMES
        }
        self.rooms: list[tuple[SurgicalTheater, dict[str, Tensor], dict[str, nn.Parameter]]] = []

    def open(self, names: set[str]) -> None:
        saved = {name: value for name in names if (value := self.values[name]) is not None}
        if saved.keys() != names:
            with pytest.raises(ValueError, match=r"^targets must name parameters of the model"):
                SurgicalTheater(self.real, names)
            return
        room = SurgicalTheater(self.real, names)
        room.__enter__()
        homes = {name: self.real.get_parameter(name) for name in names}
        self.rooms.append((room, saved, homes))

    def close(self, index: int) -> None:
        if not self.rooms:
            return
        index %= len(self.rooms)
        self.rooms[index][0].__exit__(None, None, None)
        for room, saved, _ in reversed(self.rooms[index:]):
            assert not room.is_open
            self.values.update(saved)
        for name, home in self.rooms[index][2].items():
            assert self.real.get_parameter(name) is home
        del self.rooms[index:]

    def commit(self, index: int) -> None:
        if not self.rooms:
            return
        index %= len(self.rooms)
        room, saved, homes = self.rooms[index]
        fits = all(
            (now := self.values[name]) is not None
            and self.real.get_parameter(name) is homes[name]
            and (now.shape, now.dtype) == (old.shape, old.dtype)
            for name, old in saved.items()
        )
        if fits:
            room.commit()
            saved.update({name: now for name in saved if (now := self.values[name]) is not None})
        else:
            with pytest.raises(RuntimeError, match=r"^commit needs"):
                room.commit()

    def edit(self, kind: str, name: str, number: int) -> None:
        if self.values[name] is None:
            return
        parameter = self.real.get_parameter(name)
        value = torch.full_like(parameter.detach(), float(number))
        layer, attribute = self.real[int(name[0])], name[2:]
        if kind == "fill":
            with torch.no_grad():
                parameter.fill_(number)
        elif kind == "data":
            parameter.data.fill_(number)
        elif kind == "new data":
            parameter.data = value.clone()
        elif kind == "resize":
            value = torch.full((number % 5,), float(number))
            parameter.data = value.clone()
        elif kind == "cast":
            value = value.to(torch.float64 if value.dtype == torch.float32 else torch.float32)
            parameter.data = value.clone()
        elif kind == "replace":
            setattr(layer, attribute, nn.Parameter(value.clone()))
        else:
            delattr(layer, attribute)
            self.values[name] = None
            return
        self.values[name] = value

    def check(self) -> None:
        found = dict(self.real.named_parameters())
        for name, value in self.values.items():
            if value is None:
                assert name not in found
            else:
                assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
                assert bits(found[name]) == bits(value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(OPERATIONS, max_size=25))
def test_random_programs_leave_what_the_specification_says(program: list[tuple[str, Any]]) -> None:
    model = Model()
    pristine = Snapshot(model.real)
    guard = SurgicalTheater(model.real, NAMES)
    with guard:
        for number, (kind, argument) in enumerate(program, start=1):
            if kind == "open":
                model.open(argument)
            elif kind == "close":
                model.close(argument)
            elif kind == "commit":
                model.commit(argument)
            else:
                model.edit(kind, argument, number)
            model.check()
    assert theater._open_theaters == []
    pristine.assert_same()
