"""Tests of avatarl_env/surgery/theater.py: restoring, committing, writing, refusals."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from avatarl_env.surgery import SurgicalTheater
from tests.avatarl_env.surgery.edits import (
    COMMITTABLE,
    EDITS,
    Edit,
    Snapshot,
    in_place,
    new_data,
    replaced,
    shared,
    small,
    taken_out_and_put_back,
    write,
)
from tests.fakes import bits, fingerprint, tiny_gpt


@contextlib.contextmanager
def failing(method: str, fails: Callable[[int, Tensor], bool], error: BaseException) -> Any:
    """Let a tensor method raise `error` where `fails(number of the call, tensor)`."""
    original, calls = getattr(torch.Tensor, method), itertools.count(1)

    def replacement(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if fails(next(calls), tensor):
            raise error
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, method, replacement)
        yield


# --- restoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_undone_however_the_body_ends(
    edit: Edit, error: type[BaseException] | None
) -> None:
    model, x = small(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before, outputs, room = Snapshot(model), model(x), SurgicalTheater(model, [model])
    raised = error("body") if error else None

    def operate() -> None:
        with room:
            edit(model, room)
            if edit is not taken_out_and_put_back:
                assert fingerprint(model) != before.state
            if raised:
                raise raised

    with pytest.raises(error) if error else contextlib.nullcontext() as caught:
        operate()
    assert raised is None or caught.value is raised  # neither wrapped nor replaced
    assert not room.is_open
    before.assert_same(same_address=edit is not shared)
    assert torch.equal(model(x), outputs)


def test_edits_of_other_weights_are_kept() -> None:
    model = small()
    flat = torch.arange(12.0)
    model[1].bias.data = flat[4:6]
    with SurgicalTheater(model, [model[0].weight, model[1].bias]):
        model[0].bias.data.fill_(5.0)
        model[1].weight = nn.Parameter(torch.zeros(2, 3))
        del model[0].weight
        model[0].extra = nn.Parameter(torch.zeros(1))
        flat.mul_(10)
    assert model[0].bias.tolist() == [5.0, 5.0, 5.0]
    assert model[1].weight.tolist() == [[0.0] * 3] * 2
    assert list(model[0]._parameters) == ["weight", "bias", "extra"]
    assert flat.tolist() == [0, 10, 20, 30, 4, 5, 60, 70, 80, 90, 100, 110]


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8])
def test_every_bit_pattern_is_restored(dtype: torch.dtype) -> None:
    """NaN payloads, negative zeros, denormals and infinities, compared as integers."""
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    patterns = torch.linspace(info.min, info.max, 4096, dtype=torch.float64)
    patterns = patterns.clamp(info.min, info.max).to(integer)
    patterns[:4] = torch.tensor([info.min, -1, info.max, 1], dtype=integer)  # -0.0, NaN, NaN, tiny
    signalling = {torch.int64: 0x7FF4_DEAD_BEEF_CAFE, torch.int32: 0x7FA0_BEEF}
    patterns[4] = signalling.get(integer, 0)
    model = nn.Module()
    model.weight = nn.Parameter(patterns.view(dtype), requires_grad=False)
    for commit in (False, True):
        with SurgicalTheater(model, [model]) as room:
            if commit:
                room.commit()
            model.weight.data.copy_(torch.ones(4096).to(dtype))
        assert torch.equal(model.weight.view(integer), patterns)


def layouts() -> dict[str, Tensor]:
    base = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    return {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(4, 6),
        "scalar expanded": torch.tensor(2.0).expand(3, 3),
        "overlapping": torch.arange(5.0).as_strided((3, 3), (1, 1)),
        "empty": torch.empty(0, 3),
        "expanded to nothing": torch.ones(1, 3).expand(0, 3),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("kind", layouts())
def test_every_memory_layout_is_restored(kind: str) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(layouts()[kind])
    before = Snapshot(model)
    for _ in range(2):
        with SurgicalTheater(model, [model]) as room:
            assert room.original(model.weight).shape == model.weight.shape
            assert torch.equal(room.original(model.weight), model.weight)
            flat = model.weight.data.as_strided((min(1, model.weight.numel()),), (1,))
            flat.fill_(77.0)
            model.weight.data = torch.zeros(9)
        before.assert_same()


@pytest.mark.parametrize("n_bytes", [0, 39])
def test_storage_that_the_body_freed_or_shrank_is_restored(n_bytes: int) -> None:
    """Access while it is too small is refused: it would reach other memory."""
    flat = torch.arange(12.0)
    model = nn.Module()
    model.weight = nn.Parameter(flat[4:10].view(3, 2).T)  # the flat buffer's bytes 16 to 39
    model.last = nn.Parameter(flat[10:])
    before = Snapshot(model)
    room = SurgicalTheater(model, [model])
    with room:
        flat.untyped_storage().resize_(n_bytes)
        for work in (room.commit, lambda: room.write(model.weight, torch.zeros(2, 3))):
            with pytest.raises(RuntimeError, match=rf"storage of weight .*40 bytes, got {n_bytes}"):
                work()
    before.assert_same(same_address=False)
    flat.untyped_storage().resize_(n_bytes)
    with pytest.raises(RuntimeError, match=rf"storage of weight .*40 bytes, got {n_bytes}"):
        room.__enter__()
    assert not room.is_open


def test_tied_weights_are_saved_once_and_stay_tied() -> None:
    for end in ("embed", "lm_head"):
        model = tiny_gpt()
        before = Snapshot(model)
        with SurgicalTheater(model, ["embed.weight", "lm_head.weight"]) as room:
            assert room.saved_bytes == 16 * 32 * 4
            getattr(model, end).weight.data = torch.zeros(16, 32)
            assert not model.embed.weight.any()
            getattr(model, end).weight = nn.Parameter(torch.ones(16, 32))  # unties
        before.assert_same()
        assert model.lm_head.weight is model.embed.weight


def test_recurrent_modules_compute_with_their_own_weights_again() -> None:
    """They keep a list of their weights besides the parameters."""
    model, x = nn.GRU(4, 4), torch.linspace(-1, 1, 24).view(2, 3, 4)
    before = model(x)[0].detach()
    with SurgicalTheater(model, [model]):
        model.weight_ih_l0 = nn.Parameter(torch.zeros_like(model.weight_ih_l0))
        assert not torch.equal(model(x)[0], before)
        model.half()  # rebuilds the list
    assert torch.equal(model(x)[0], before)


def test_the_keys_of_a_parameter_dict_are_restored() -> None:
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1)})
    before = dict(model.items())
    with SurgicalTheater(model, [model]):
        del model["a"]
        model.pop("c")
        model["added"] = torch.ones(1)
        assert list(model.keys()) == ["b", "added"]
    assert list(model.keys()) == list(model.state_dict()) == ["a", "b", "c", "added"]
    assert all(model[name] is p for name, p in before.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("commit", [False, True])
def test_gradient_modes_do_not_matter_and_do_not_change(mode: type, commit: bool) -> None:
    model = small()
    before = Snapshot(model)
    with mode():
        with SurgicalTheater(model, [model]) as room:
            write(model, room)
            in_place(model, room)
            new_data(model, room)
            if commit:
                room.commit()
            model(torch.ones(1, 3))
        inside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert inside == (mode is torch.enable_grad, mode is torch.inference_mode)
    if not commit:
        before.assert_same()
    assert [p.data_ptr() for p in model.parameters()] == before.pointers
    assert not any(p.is_inference() for p in model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_autocast_drops_its_copies_of_operated_weights() -> None:
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):  # caches casts of weights for the whole region
        before = model(x)
        with SurgicalTheater(model, ["weight"]) as room:
            with torch.no_grad():
                model.weight.mul_(3)
            assert not torch.equal(model(x), before)
            room.write(model.weight, torch.zeros(4, 4))
            assert torch.equal(model(x), model.bias.to(torch.bfloat16)[None])
        assert torch.equal(model(x), before)


def test_cached_parametrizations_are_computed_again() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    direction, x = model.parametrizations.weight.original1, torch.ones(1, 4)
    before = model(x)
    with parametrize.cached():
        model(x)
        with SurgicalTheater(model, [model]) as room:
            room.write(direction, -direction)
            assert torch.equal(model(x), -before)
        assert torch.equal(model(x), before)


# --- commit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", COMMITTABLE)
def test_commit_keeps_the_present_weights_in_their_own_storage(edit: Edit) -> None:
    model = small()
    before = Snapshot(model)
    with contextlib.suppress(KeyboardInterrupt), SurgicalTheater(model, [model]) as room:
        edit(model, room)
        operated = model[0].weight.detach().clone()
        room.commit()
        kept = fingerprint(model)
        assert torch.equal(model[0].weight, operated)
        assert torch.equal(room.original(model[0].weight), operated)
        in_place(model, room)
        new_data(model, room)
        raise KeyboardInterrupt
    assert fingerprint(model) == kept
    assert [id(p) for p in model.parameters()] == [id(p) for p in before.parameters]
    assert [p.data_ptr() for p in model.parameters()] == before.pointers or edit is shared
    assert [p.stride() for p in model.parameters()] == before.strides


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit not in COMMITTABLE])
def test_a_commit_that_does_not_fit_is_refused_and_loses_nothing(edit: Edit) -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as room:
        edit(model, room)
        operated = fingerprint(model)
        with pytest.raises(RuntimeError, match=r"^commit needs (0\.weight as|every target)"):
            room.commit()
        assert fingerprint(model) == operated
        assert room.is_open
    before.assert_same()


# --- targets, original and write -----------------------------------------------------------------


def test_targets_may_be_modules_parameters_and_names_and_are_saved_once() -> None:
    """Weight 9 and bias 3 floats of 4 bytes; in the second layer 6 and 2."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Linear(3, 2), nn.Sequential(layer))
    cases: list[tuple[list[Any], int]] = [
        ([layer.weight], 36),
        ([layer], 48),
        (["0.weight", "1.weight"], 60),
        (["2.0.weight", "0.weight"], 36),
        ([model], 80),
        ([layer, "0.bias", layer.weight], 48),
    ]
    for targets, expected in cases:
        room = SurgicalTheater(model, iter(targets))
        assert room.saved_bytes == 0
        with room:
            assert room.saved_bytes == expected
        assert room.saved_bytes == 0
    model.bfloat16()
    with SurgicalTheater(model, [layer.weight]) as room:
        assert room.saved_bytes == 18


def test_write_casts_into_the_parameter_in_place() -> None:
    model = small()
    with SurgicalTheater(model, [model]) as room:
        pointer, version = model[0].weight.data_ptr(), model[0].weight._version
        room.write(model[0].weight, torch.full((3, 3), 0.1, dtype=torch.float64))
        assert torch.equal(model[0].weight, torch.full((3, 3), 0.1))
        assert model[0].weight.data_ptr() == pointer
        assert model[0].weight._version > version


@pytest.mark.parametrize(
    ("dtype", "value", "error", "got"),
    [
        (torch.float32, torch.zeros(()), ValueError, r"\(\) torch.float32"),
        (torch.float32, torch.zeros(1, 3), ValueError, r"\(1, 3\) torch.float32"),
        (torch.float32, torch.zeros(3, 3, dtype=torch.complex64), ValueError, "torch.complex64"),
        (torch.float32, 0.5, TypeError, "float"),
        (torch.int8, torch.full((3, 3), 0.5), ValueError, "torch.float32"),
        (torch.int8, torch.full((3, 3), 300), ValueError, "torch.int64"),
    ],
)
def test_write_refuses_values_of_another_shape_or_kind(
    dtype: torch.dtype, value: Any, error: type[Exception], got: str
) -> None:
    model = small().requires_grad_(False)
    model[0].weight.data = model[0].weight.data.to(dtype)
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as room, pytest.raises(error, match=f"^value .*{got}"):
        room.write(model[0].weight, value)
    before.assert_same()


def test_a_closed_theater_and_other_parameters_are_refused() -> None:
    model = small()
    room = SurgicalTheater(model, [model[0]])
    for _ in range(2):
        for work in (
            lambda: room.original(model[0].weight),
            lambda: room.write(model[0].weight, torch.zeros(3, 3)),
            room.commit,
        ):
            with pytest.raises(RuntimeError, match="closed"):
                work()
        with room:
            for other in (model[1].weight, model[0].weight.detach()):
                match = rf"^parameter .*\['0.weight', '0.bias'\].*\({len(other)}, 3\)"
                with pytest.raises(ValueError, match=match):
                    room.original(other)
                with pytest.raises(ValueError, match=match):
                    room.write(other, torch.zeros_like(other))


# --- entering and leaving ------------------------------------------------------------------------


def test_each_entry_saves_the_present_weights_and_leaving_twice_does_nothing() -> None:
    model = small()
    room = SurgicalTheater(model, [model])
    room.__exit__(None, None, None)
    for value in (1.0, 2.0):
        model[0].weight.data.fill_(value)
        with room as entered:
            assert entered is room
            new_data(model, room)
        assert model[0].weight.unique().tolist() == [value]
        model[0].weight.data.fill_(9.0)
        room.__exit__(None, None, None)
        assert model[0].weight.unique().tolist() == [9.0]


def test_entry_is_refused_after_a_target_was_replaced() -> None:
    """Leaving would put the old Parameter in the place of the new one."""
    model = small()
    room = SurgicalTheater(model, [model])
    replaced(model, room)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"^entry needs every target .*weight"):
        room.__enter__()
    assert not room.is_open
    before.assert_same()


def test_one_target_that_cannot_be_restored_does_not_stop_the_others() -> None:
    model = small()
    before = Snapshot(model)
    outer, inner = SurgicalTheater(model, [model[0]]), SurgicalTheater(model, [model[1]])
    home = model[1].bias.data_ptr()

    def operate() -> None:
        with outer:
            inner.__enter__()
            for p in model.parameters():
                p.data.fill_(9.0)
            raise ValueError("body")

    with (
        failing("copy_", lambda call, tensor: tensor.data_ptr() == home, OSError("gone")),
        pytest.raises(ExceptionGroup, match="could not be restored") as caught,
    ):
        operate()
    (cause,) = caught.value.exceptions
    assert isinstance(cause, OSError)
    assert "while restoring 1.bias" in cause.__notes__
    assert isinstance(caught.value.__context__, ValueError)
    assert not outer.is_open
    assert not inner.is_open
    inner.__exit__(ValueError, None, None)
    for name, p in model.named_parameters():
        assert (bits(p) == before.state[name][2]) == (name != "1.bias"), name


@pytest.mark.parametrize("deeper", ["enter", "leave"])
def test_a_stack_that_is_nearly_full_is_refused_before_anything_changes(deeper: str) -> None:
    model = small()
    before, limit, n_refused = Snapshot(model), sys.getrecursionlimit(), 0

    def at_depth(depth: int, room: SurgicalTheater) -> None:
        if depth:
            at_depth(depth - 1, room)
        elif deeper == "leave":
            room.__exit__(None, None, None)
        else:
            with room:
                model[0].weight.data.mul_(2)

    for depth in range(limit - 150, limit, 3):
        room = SurgicalTheater(model, [model])
        if deeper == "leave":
            room.__enter__()
            new_data(model, room)
        try:
            at_depth(depth, room)
        except RecursionError:
            n_refused += 1
            assert room.is_open == (deeper == "leave")
            room.__exit__(None, None, None)
        before.assert_same()
        assert not room.is_open
    assert 0 < n_refused < 50


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_theater_cannot_be_copied(make: Callable[[Any], Any]) -> None:
    model = small()
    with SurgicalTheater(model, [model]) as room, pytest.raises(TypeError, match="copied"):
        make(room)
