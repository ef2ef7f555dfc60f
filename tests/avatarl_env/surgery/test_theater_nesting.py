"""Tests of avatarl_env/surgery/theater.py: nesting and commit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatarl_env.surgery import SurgicalTheater
from tests.avatarl_env.surgery.edits import (
    EDITS,
    SHAPE_CHANGING,
    Edit,
    Snapshot,
    assigned,
    converted,
    deleted,
    in_place,
    new_data,
    new_data_edited,
    new_dtype,
    new_shape,
    refused,
    replaced,
    replaced_and_edited,
    replaced_by_a_buffer,
    replaced_by_a_module,
    replaced_by_a_tensor,
    run_in_thread,
    set_to_none,
    shared,
    small,
    through_data,
    write,
)
from tests.fakes import bits, fingerprint

# --- nesting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer_edit", EDITS[:12])
@pytest.mark.parametrize(
    "inner_edit", [in_place, through_data, new_data_edited, new_dtype, new_shape, deleted]
)
def test_nested_theaters_unwind_to_what_each_found(outer_edit: Edit, inner_edit: Edit) -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as outer:
        outer_edit(model, outer)
        between = Snapshot(model)
        with SurgicalTheater(model, [model]) as inner:
            inner_edit(model, inner)
            assert fingerprint(model) != between.state
        between.assert_same()
        assert outer.is_open
    before.assert_same()


def test_overlapping_targets_unwind() -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, ["0.weight", "0.bias"]) as outer:
        outer.write(model[0].weight, torch.ones(3, 3))
        between = Snapshot(model)
        with SurgicalTheater(model, ["0.weight", "1.weight"]) as inner:
            inner.write(model[0].weight, torch.zeros(3, 3))
            inner.write(model[1].weight, torch.zeros(2, 3))
            outer.write(model[0].bias, torch.zeros(3))
        assert model[0].bias.tolist() == [0.0] * 3
        outer.write(model[0].bias, outer.original(model[0].bias))
        between.assert_same()
    before.assert_same()


@pytest.mark.parametrize("targets", ["all", "overlap", "apart"])
def test_leaving_the_outer_first_ends_the_inner_too(targets: str) -> None:
    chosen = {
        "all": (["0.weight"], ["0.weight"]),
        "overlap": (["0.weight", "0.bias"], ["0.bias", "1.weight"]),
        "apart": (["0.weight"], ["1.weight"]),
    }[targets]
    model = small()
    before = Snapshot(model)
    outer, inner = (SurgicalTheater(model, names) for names in chosen)
    outer.__enter__()
    for name in chosen[0]:
        model.get_parameter(name).data.fill_(1.0)
    inner.__enter__()
    for name in chosen[1]:
        model.get_parameter(name).data = torch.zeros_like(model.get_parameter(name))
    outer.__exit__(None, None, None)
    before.assert_same()
    assert not inner.is_open
    with pytest.raises(RuntimeError, match="closed"):
        inner.write(model.get_parameter(chosen[1][0]), torch.zeros(()))
    leave_late(inner)
    before.assert_same()


def leave_late(room: SurgicalTheater) -> None:
    """Leave a theater after the one that it was opened in."""
    with pytest.raises(RuntimeError, match=r"an outer one on the model was left first"):
        room.__exit__(None, None, None)
    assert not room.is_open
    assert room.saved_bytes == 0


def operating(model: nn.Module, names: list[str], value: float) -> Iterator[None]:
    """Open a theater, and fill its targets each time that it is gone on with."""
    with SurgicalTheater(model, names):
        while True:
            for name in names:
                model.get_parameter(name).data.fill_(value)
            yield


CHOICES = [["0.weight"], ["1.weight"], ["0.weight", "1.weight"]]


@pytest.mark.parametrize("ending", [None, GeneratorExit])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_theaters_left_in_any_order_lose_no_weights(
    order: tuple[int, ...], ending: type[BaseException] | None
) -> None:
    """A weight is as it was before the first theater on it once all theaters on it are left.

    As of three generators on one model, each editing its targets after any other has moved on.
    """
    for chosen in itertools.product(CHOICES, repeat=3):
        model = small()
        before = Snapshot(model)
        rooms = [SurgicalTheater(model, names) for names in chosen]
        inside: list[int] = []

        for index, room in enumerate(rooms):
            room.__enter__()
            inside.append(index)
            double(model, [chosen[other] for other in inside])
        for index in order:
            late = any(other < index for other in set(range(3)) - set(inside)) and ending is None
            with pytest.raises(RuntimeError) if late else contextlib.nullcontext():
                rooms[index].__exit__(ending, None, None)
            inside.remove(index)
            still = {name for other in inside for name in chosen[other]}
            for name in {"0.weight", "1.weight"} - still:
                assert bits(model.get_parameter(name)) == before.state[name][2], (chosen, order)
            double(model, [chosen[other] for other in inside])
        before.assert_same()


def double(model: nn.Module, targets: list[list[str]]) -> None:
    for name in itertools.chain(*targets):
        model.get_parameter(name).data.mul_(2)


def test_what_is_no_target_any_more_may_be_trained_while_a_later_theater_is_open() -> None:
    model = small()
    first, second = operating(model, ["0.weight"], 5.0), operating(model, ["1.weight"], 7.0)
    next(first)
    next(second)
    first.close()
    model[0].weight.data.fill_(42.0)
    second.close()
    assert model[0].weight.unique().tolist() == [42.0]


def test_edits_made_after_the_outer_theater_was_left_are_undone_and_reported() -> None:
    model = small()
    before = Snapshot(model)
    first, second = operating(model, ["0.weight"], 5.0), operating(model, ["0.weight"], 7.0)
    next(first)
    next(second)
    first.close()
    before.assert_same()
    next(second)
    assert model[0].weight.unique().tolist() == [7.0]
    second.close()  # the generator's own way to end; nobody is there to be told
    before.assert_same()


def test_a_theater_opened_inside_one_that_ended_early_unwinds_too() -> None:
    model = small()
    before = Snapshot(model)
    outer, middle, late = (SurgicalTheater(model, [model]) for _ in range(3))
    outer.__enter__()
    in_place(model, outer)
    middle.__enter__()
    outer.__exit__(None, None, None)
    model[0].weight.data.fill_(1.0)
    late.__enter__()
    model[0].weight.data.fill_(2.0)
    leave_late(middle)
    before.assert_same()
    model[0].weight.data.fill_(3.0)
    leave_late(late)
    before.assert_same()


async def operate(model: nn.Module, entered: asyncio.Event, leave: asyncio.Event) -> None:
    with SurgicalTheater(model, [model]):
        entered.set()
        await leave.wait()
        model[0].weight.data.fill_(7.0)


def test_a_second_asyncio_task_is_refused_until_the_first_has_left() -> None:
    model = small()
    before = Snapshot(model)

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(operate(model, entered, leave), name="the first")
        await entered.wait()
        with pytest.raises(RuntimeError, match=r"one asyncio task at a time .*the first"):
            await operate(model, entered, leave)
        leave.set()
        await first
        before.assert_same()
        await operate(model, entered, leave)

    asyncio.run(main())
    before.assert_same()


def test_an_asyncio_task_may_operate_inside_the_theater_of_its_thread() -> None:
    model = small()
    before = Snapshot(model)

    async def main() -> None:
        done = asyncio.Event()
        done.set()
        await operate(model, asyncio.Event(), done)

    with SurgicalTheater(model, [model]) as room:
        write(model, room)
        between = Snapshot(model)
        asyncio.run(main())
        between.assert_same()
    before.assert_same()


def test_closing_leaves_theaters_of_other_models_open() -> None:
    one, two = small(), small()
    outer, inner = SurgicalTheater(one, [one]), SurgicalTheater(two, [two])
    with inner:
        inner.__exit__(None, None, None)
        with outer:
            inner.__enter__()
            in_place(two, inner)
            edited = fingerprint(two)
        assert inner.is_open
        assert fingerprint(two) == edited
    assert fingerprint(two) == fingerprint(small())


def test_an_inner_theater_on_a_replaced_parameter_is_still_of_the_same_model() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = Snapshot(model)
    outer = SurgicalTheater(model, [model])
    outer.__enter__()
    model.weight = nn.Parameter(torch.zeros(2, 2))
    inner = SurgicalTheater(model, [model])
    inner.__enter__()
    refused = run_in_thread(SurgicalTheater(model, [model]).__enter__)
    assert isinstance(refused, RuntimeError)
    outer.__exit__(None, None, None)
    assert not inner.is_open
    leave_late(inner)
    before.assert_same()


def test_models_that_share_a_parameter_are_one_model() -> None:
    one, two = small(), nn.Linear(3, 3)
    two.weight = one[0].weight
    before = Snapshot(one)
    outer, inner = SurgicalTheater(one, [one]), SurgicalTheater(two, [two])
    outer.__enter__()
    assert isinstance(run_in_thread(inner.__enter__), RuntimeError)
    inner.__enter__()
    two.weight.data = torch.zeros(3, 3)
    outer.__exit__(None, None, None)
    leave_late(inner)
    before.assert_same()


def test_models_that_share_memory_are_one_model() -> None:
    """As after `two.load_state_dict(one.state_dict(), assign=True)`."""
    one, two = small(), small()
    two.load_state_dict(one.state_dict(), assign=True)
    before = Snapshot(one)
    outer, inner = SurgicalTheater(one, [one]), SurgicalTheater(two, [two])
    outer.__enter__()
    in_place(one, outer)
    assert isinstance(run_in_thread(inner.__enter__), RuntimeError)
    inner.__enter__()
    outer.__exit__(None, None, None)
    two[0].weight.data.fill_(9.0)
    leave_late(inner)
    before.assert_same()


def test_a_part_of_a_model_and_the_whole_are_one_model() -> None:
    model = small()
    before = Snapshot(model)
    outer, inner = SurgicalTheater(model[0], [model[0]]), SurgicalTheater(model, [model])
    outer.__enter__()
    inner.__enter__()
    new_data(model, inner)
    outer.__exit__(None, None, None)
    leave_late(inner)
    before.assert_same()


# --- commit --------------------------------------------------------------------------------------

COMMITTABLE = [
    edit
    for edit in EDITS
    if edit not in SHAPE_CHANGING
    and edit.__name__
    not in (
        "new_dtype",
        "converted",
        "assigned",
        "replaced",
        "replaced_and_edited",
        "replaced_by_a_tensor",
        "replaced_by_a_buffer",
        "swapped",
    )
]
REFUSED = {
    new_shape: "commit needs 0.weight as (3, 3) torch.float32, got (5, 3) torch.float32",
    new_dtype: "commit needs 0.weight as (3, 3) torch.float32, got (3, 3) torch.float64",
    converted: "commit needs 0.weight as (3, 3) torch.float32, got (3, 3) torch.float64",
    **dict.fromkeys(
        (
            replaced,
            replaced_and_edited,
            assigned,
            set_to_none,
            deleted,
            replaced_by_a_tensor,
            replaced_by_a_buffer,
            replaced_by_a_module,
        ),
        "commit needs every target in its place, weight is not",
    ),
}


@pytest.mark.parametrize("edit", COMMITTABLE)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_commit_keeps_the_present_weights_in_their_own_storage(
    edit: Edit, error: type[BaseException] | None
) -> None:
    model = small()
    before, kept = Snapshot(model), None
    body = contextlib.suppress(error) if error else contextlib.nullcontext()
    with body, SurgicalTheater(model, [model]) as room:
        edit(model, room)
        operated = model[0].weight.detach().clone()
        room.commit()
        kept = fingerprint(model)
        assert torch.equal(model[0].weight, operated)
        assert [p.data_ptr() for p in model.parameters()] == before.pointers or edit is shared
        assert torch.equal(room.original(model[0].weight), operated)
        in_place(model, room)
        new_data(model, room)
        if error:
            raise error
    assert fingerprint(model) == kept
    assert [id(p) for p in model.parameters()] == [id(p) for p in before.parameters]
    assert [p.data_ptr() for p in model.parameters()] == before.pointers or edit is shared
    assert [p.stride() for p in model.parameters()] == before.strides


@pytest.mark.parametrize(("edit", "message"), REFUSED.items())
def test_commit_is_refused_and_nothing_is_lost(edit: Edit, message: str) -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as room:
        edit(model, room)
        operated = fingerprint(model)
        with refused(RuntimeError, message):
            room.commit()
        assert fingerprint(model) == operated
        assert room.is_open
    before.assert_same()


def test_commit_that_runs_out_of_memory_commits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before, calls, clone = Snapshot(model), [0], torch.Tensor.clone

    def second_fails(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError
        return clone(tensor, *args, **kwargs)

    with SurgicalTheater(model, [model]) as room:
        in_place(model, room)
        new_data(model, room)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "clone", second_fails)
            with pytest.raises(MemoryError):
                room.commit()
    before.assert_same()


def test_commit_in_inference_mode_keeps_weights_that_autograd_can_use() -> None:
    model = small()
    with SurgicalTheater(model, [model]) as room:
        with torch.inference_mode():
            new_data(model, room)
            room.commit()
        assert not room.original(model[0].weight).is_inference()
    assert not model[0].weight.is_inference()


def test_later_commits_replace_earlier_ones() -> None:
    model = small()
    with SurgicalTheater(model, [model[0].weight]) as room:
        for value in (1.0, 2.0, 3.0):
            room.write(model[0].weight, torch.full((3, 3), value))
            if value < 3:
                room.commit()
    assert model[0].weight.unique().tolist() == [2.0]


def test_inner_commit_is_undone_by_the_outer_theater() -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as outer:
        new_data(model, outer)
        with SurgicalTheater(model, [model]) as inner:
            write(model, inner)
            inner.commit()
            in_place(model, inner)
        assert model[0].weight.unique().tolist() == [7.0]
    before.assert_same()


def test_outer_commit_keeps_what_an_inner_commit_left() -> None:
    model = small()
    pointer = model[0].weight.data_ptr()
    with SurgicalTheater(model, [model]) as outer:
        new_data(model, outer)
        with SurgicalTheater(model, [model]) as inner:
            write(model, inner)
            inner.commit()
        outer.commit()
    assert model[0].weight.unique().tolist() == [7.0]
    assert model[0].weight.data_ptr() == pointer


def test_commit_of_an_expanded_weight() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0, 2.0]).expand(3, 2))
    pointer = model.weight.data_ptr()
    with SurgicalTheater(model, [model]) as room:
        assert room.saved_bytes == 8
        model.weight.data[0] = torch.tensor([3.0, 4.0])  # one row is all rows
        room.commit()
    assert model.weight.tolist() == [[3.0, 4.0]] * 3
    assert (model.weight.stride(), model.weight.data_ptr()) == ((0, 1), pointer)


def test_commit_of_rows_that_an_expanded_weight_cannot_hold_is_refused() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0, 2.0]).expand(3, 2))
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as room:
        model.weight.data = torch.arange(6.0).view(3, 2)
        message = "commit needs weight as (1, 2) torch.float32, got (3, 2) torch.float32"
        with refused(RuntimeError, message):
            room.commit()
        assert model.weight[2].tolist() == [4.0, 5.0]
    before.assert_same()


def test_commit_of_expanded_data_into_a_full_weight() -> None:
    model = small()
    with SurgicalTheater(model, [model]) as room:
        model[0].weight.data = torch.tensor([1.0, 2.0, 3.0]).expand(3, 3)
        room.commit()
        assert room.saved_bytes == 80
        in_place(model, room)
    assert model[0].weight.tolist() == [[1.0, 2.0, 3.0]] * 3
    assert model[0].weight.is_contiguous()
