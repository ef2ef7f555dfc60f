"""Tests of avatarl_env/surgery/theater.py: restoring, targets, entering and leaving."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from avatarl_env.surgery import SurgicalTheater, find_targets, snapshot
from tests.avatarl_env.surgery.edits import (
    EDITS,
    Edit,
    Snapshot,
    in_place,
    new_data,
    one_row,
    refused,
    replaced,
    shared,
    small,
    taken_out_and_put_back,
    through_data,
    write,
)
from tests.fakes import bits, fingerprint, tiny_gpt

TOKENS = torch.arange(16)[None]

# --- restoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_undone(edit: Edit) -> None:
    model, x = small(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before, outputs = Snapshot(model), model(x)
    with SurgicalTheater(model, [model]) as room:
        edit(model, room)
        if edit is not taken_out_and_put_back:
            assert fingerprint(model) != before.state
    before.assert_same(same_address=edit is not shared)
    assert torch.equal(model(x), outputs)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_every_edit_is_undone_when_the_body_raises(edit: Edit, error: type[BaseException]) -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    raised = error("body")

    def operate() -> None:
        with room:
            edit(model, room)
            raise raised

    with pytest.raises(error) as caught:
        operate()
    assert caught.value is raised  # neither wrapped nor replaced
    assert not room.is_open
    before.assert_same(same_address=edit is not shared)


def test_operated_model_differs_and_comes_back_with_its_logits() -> None:
    model = tiny_gpt()
    before, logits = Snapshot(model), model(TOKENS)
    targets = find_targets(model)
    with SurgicalTheater(model, targets) as room:
        for target in targets:
            room.write(target.query.weight, room.original(target.query.weight) * 1.5)
        assert fingerprint(model) != before.state
        assert not torch.allclose(model(TOKENS), logits, atol=1e-2)
    before.assert_same()
    assert torch.equal(model(TOKENS), logits)


def test_what_is_no_target_is_left_as_the_body_leaves_it() -> None:
    model = small()
    with SurgicalTheater(model, [model[0].weight]):
        with torch.no_grad():
            model[0].bias.fill_(5.0)
        model[1].weight = nn.Parameter(torch.zeros(2, 3))
    assert model[0].bias.tolist() == [5.0, 5.0, 5.0]
    assert model[1].weight.tolist() == [[0.0] * 3] * 2


def test_parameters_added_by_the_body_stay_behind_the_old_ones() -> None:
    model = small()
    with SurgicalTheater(model, [model[0]]):
        del model[0].weight
        model[0].extra = nn.Parameter(torch.zeros(1))
    assert list(model[0]._parameters) == ["weight", "bias", "extra"]


def test_an_empty_body_changes_nothing() -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, [model]):
        before.assert_same()
    before.assert_same()


def test_a_thousand_cycles_do_not_drift() -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    for i in range(1000):
        with room:
            model[0].weight.data.mul_(1.001).add_(0.1 * i)
    before.assert_same()


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8],
)
def test_every_bit_pattern_comes_back(dtype: torch.dtype) -> None:
    """NaN payloads, negative zeros, denormals and infinities, compared as integers."""
    integer = INTEGERS[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(integer)
    patterns = torch.linspace(info.min, info.max, 4096, dtype=torch.float64)
    patterns = patterns.clamp(info.min, info.max).to(integer)
    patterns[:4] = torch.tensor([info.min, -1, info.max, 1], dtype=integer)  # -0.0, NaN, NaN, tiny
    if integer is torch.int64:
        patterns[4] = 0x7FF4_DEAD_BEEF_CAFE  # a signalling NaN
    elif integer is torch.int32:
        patterns[4] = 0x7FA0_BEEF
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
        "with offset": base[2:, 3:],
        "expanded": base[:1].expand(4, 6),
        "scalar expanded": torch.tensor(2.0).expand(3, 3),
        "overlapping": torch.arange(5.0).as_strided((3, 3), (1, 1)),
        "empty": torch.empty(0, 3),
        "expanded empty": torch.empty(1, 0).expand(4, 0),
        "expanded to nothing": torch.ones(1, 3).expand(0, 3),
        "scalar": torch.tensor(3.0),
        "channels last": base.view(1, 2, 3, 6).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("kind", layouts())
def test_any_layout_comes_back(kind: str) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(layouts()[kind])
    before = Snapshot(model)
    for _ in range(2):
        with SurgicalTheater(model, [model]) as room:
            assert room.original(model.weight).shape == model.weight.shape
            assert torch.equal(room.original(model.weight), model.weight)
            flat = model.weight.data.as_strided((min(1, model.weight.numel()),), (1,))
            flat.fill_(77.0)
            if model.weight.numel():
                assert fingerprint(model) != before.state
            model.weight.data = torch.zeros(9)
        before.assert_same()


def test_a_view_into_a_larger_storage_spares_its_neighbours() -> None:
    flat = torch.arange(12.0)
    model = nn.Module()
    model.weight = nn.Parameter(flat[4:8])
    with SurgicalTheater(model, [model]) as room:
        assert room.saved_bytes == 16
        flat.mul_(10)
    assert flat.tolist() == [0, 10, 20, 30, 4, 5, 6, 7, 80, 90, 100, 110]


def test_two_parameters_on_one_storage_come_back() -> None:
    flat = torch.arange(6.0)
    model = nn.Module()
    model.one, model.two = nn.Parameter(flat[:4]), nn.Parameter(flat[2:])
    before = Snapshot(model)
    with SurgicalTheater(model, [model]):
        model.one.data.fill_(1.0)
        model.two.data.fill_(2.0)
    before.assert_same()


@pytest.mark.parametrize("n_bytes", [0, 16, 39])
def test_storage_that_the_body_freed_or_shrank_is_reported(n_bytes: int) -> None:
    """Copying into it ends the process, or writes into the memory of something else."""
    flat = torch.arange(12.0)
    model = nn.Module()
    model.weight = nn.Parameter(flat[4:10].view(3, 2).T)  # the flat buffer's bytes 16 to 39
    model.last = nn.Parameter(flat[10:])
    model.none = nn.Parameter(torch.empty(0))
    before = Snapshot(model)

    def operate() -> None:
        with SurgicalTheater(model, [model]) as room:
            flat.untyped_storage().resize_(n_bytes)
            with pytest.raises(RuntimeError, match="freed or shrunk"):
                room.write(model.weight, torch.zeros(2, 3))
            with pytest.raises(RuntimeError, match="commit needs the memory"):
                room.commit()

    with pytest.raises(ExceptionGroup, match="could not be restored") as caught:
        operate()
    assert [str(error)[:24] for error in caught.value.exceptions] == [
        "the storage of last was ",
        "the storage of weight wa",
    ]
    before.assert_same(same_address=False)
    assert flat.untyped_storage().nbytes() == n_bytes
    with SurgicalTheater(model, [model]) as room:  # the values have whole memory again
        room.write(model.weight, torch.zeros(2, 3))
    before.assert_same(same_address=False)


def test_entry_is_refused_on_storage_that_is_already_freed() -> None:
    model = small()
    model[1].weight.untyped_storage().resize_(8)
    room = SurgicalTheater(model, [model])
    with pytest.raises(RuntimeError, match=r"^entry needs the memory of every target, 1\.weight"):
        room.__enter__()
    assert not room.is_open


# --- what is saved -------------------------------------------------------------------------------


def test_saved_bytes_are_exactly_the_targets() -> None:
    """Weight 9 and bias 3 floats of 4 bytes; in the second layer 6 and 2."""
    model = small()
    cases: list[tuple[list[Any], int]] = [
        ([model[0].weight], 36),
        ([model[0]], 48),
        (["0.weight", "1.weight"], 60),
        ([model], 80),
        ([model[0], "0.bias", model[0].weight], 48),  # nothing twice
    ]
    for targets, expected in cases:
        room = SurgicalTheater(model, targets)
        assert room.saved_bytes == 0
        with room:
            assert room.saved_bytes == expected
        assert room.saved_bytes == 0


def test_half_precision_takes_half() -> None:
    model = small().bfloat16()
    with SurgicalTheater(model, [model[0].weight]) as room:
        assert room.saved_bytes == 18


def test_tied_weights_are_saved_once_and_stay_tied() -> None:
    model = tiny_gpt()
    before = Snapshot(model)
    with SurgicalTheater(model, ["embed.weight", "lm_head.weight"]) as room:
        assert room.saved_bytes == 16 * 32 * 4
        model.lm_head.weight.data = torch.zeros(16, 32)
        assert torch.equal(model.embed.weight, torch.zeros(16, 32))
        model.embed.weight = nn.Parameter(torch.ones(16, 32))  # unties
    before.assert_same()
    assert model.lm_head.weight is model.embed.weight


def test_untying_either_end_is_undone() -> None:
    for end in ("embed", "lm_head"):
        model = tiny_gpt()
        before = Snapshot(model)
        with SurgicalTheater(model, ["embed.weight"]):
            getattr(model, end).weight = nn.Parameter(torch.ones(16, 32))
        before.assert_same()
        assert model.lm_head.weight is model.embed.weight


def test_attention_targets_save_the_projections_only() -> None:
    model = tiny_gpt()
    with SurgicalTheater(model, find_targets(model)) as room:
        assert room.saved_bytes == 2 * (96 * 32 + 32 * 32) * 4


def test_original_is_what_comes_back_whatever_the_body_does() -> None:
    model = small()
    old = model[0].weight.detach().clone()
    with SurgicalTheater(model, [model]) as room:
        through_data(model, room)
        assert torch.equal(room.original(model[0].weight), old)
        new_data(model, room)
        assert torch.equal(room.original(model[0].weight), old)


def test_write_casts_into_the_parameter_in_place() -> None:
    model = small()
    with SurgicalTheater(model, [model]) as room:
        pointer, version = model[0].weight.data_ptr(), model[0].weight._version
        room.write(model[0].weight, torch.full((3, 3), 0.1, dtype=torch.float64))
        assert model[0].weight.dtype == torch.float32
        assert torch.equal(model[0].weight, torch.full((3, 3), 0.1))
        assert model[0].weight.data_ptr() == pointer
        assert model[0].weight._version > version


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (torch.zeros(()), ValueError, r"\(\) torch.float32"),
        (torch.zeros(3), ValueError, r"\(3,\) torch.float32"),
        (torch.zeros(1, 3), ValueError, r"\(1, 3\) torch.float32"),
        (torch.zeros(3, 3, dtype=torch.complex64), ValueError, "torch.complex64"),
        (0.5, TypeError, "float"),
    ],
)
def test_write_refuses_what_would_broadcast_or_lose_its_kind(
    value: Any, error: type[Exception], got: str
) -> None:
    model = small()
    before = Snapshot(model)
    with SurgicalTheater(model, [model]) as room, pytest.raises(error, match=f"^value .*{got}"):
        room.write(model[0].weight, value)
    before.assert_same()


def test_write_does_not_round_fractions_into_integers() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with SurgicalTheater(model, [model]) as room:
        with pytest.raises(ValueError, match=r"torch.int8, got .* torch.float32"):
            room.write(model.weight, torch.full((2,), 0.5))
        with pytest.raises(ValueError, match=r"torch.int8, got .* torch.int64"):
            room.write(model.weight, torch.full((2,), 300))
        room.write(model.weight, torch.full((2,), 3, dtype=torch.int8))
    assert model.weight.tolist() == [1, 1]


# --- targets and messages ------------------------------------------------------------------------


def test_targets_may_be_modules_parameters_names_and_attention_layers() -> None:
    model = tiny_gpt()
    targets = [
        model.blocks[0].mlp,
        model.norm.weight,
        "blocks.1.norm_1.weight",
        find_targets(model)[1],
    ]
    before = Snapshot(model)
    with SurgicalTheater(model, iter(targets)) as room:
        for p in (
            model.blocks[0].mlp.c_fc.weight,
            model.blocks[0].mlp.c_proj.weight,
            model.norm.weight,
            model.blocks[1].norm_1.weight,
            model.blocks[1].attn.c_attn.weight,
            model.blocks[1].attn.c_proj.weight,
        ):
            room.write(p, torch.zeros_like(p))
        with pytest.raises(ValueError, match=r"^parameter must be one of the targets"):
            room.write(model.embed.weight, torch.zeros(()))
    before.assert_same()


@pytest.mark.parametrize("targets", [[], [nn.ReLU()], [nn.Module(), nn.Sequential()]])
def test_no_parameters_are_refused(targets: list[nn.Module]) -> None:
    with refused(ValueError, "targets must hold at least one parameter, got none"):
        SurgicalTheater(small(), targets)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("0.wieght", ", did you mean '0.weight'?"),
        ("0.weights", ", did you mean '0.weight'?"),
        ("nothing like it", ""),
    ],
)
def test_unknown_names_are_refused_with_the_closest(name: str, hint: str) -> None:
    with refused(ValueError, f"targets must name parameters of the model, got '{name}'{hint}"):
        SurgicalTheater(small(), ["0.weight", name])


def test_a_layer_in_two_places_may_be_named_by_either() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Sequential(layer))
    before = Snapshot(model)
    with SurgicalTheater(model, ["1.0.weight", "0.weight"]) as room:
        assert room.saved_bytes == 16
        layer.weight.data.fill_(0.0)
    before.assert_same()


def test_names_of_buffers_are_refused() -> None:
    model = nn.BatchNorm1d(2)
    with refused(ValueError, "targets must name parameters of the model, got 'running_mean'"):
        SurgicalTheater(model, ["running_mean"])


def test_parameters_of_another_model_are_refused() -> None:
    with refused(ValueError, "targets must belong to the model, got one of (3, 3)"):
        SurgicalTheater(small(), [small()[0]])


class Wrapper(torch.Tensor):
    """A tensor that keeps its numbers in another, as DTensor and quantised weights do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = [x.inner if isinstance(x, Wrapper) else x for x in args]
        return cls(func(*flat, **(kwargs or {})))


class Renamed(nn.Parameter):
    """A Parameter of another class."""


@pytest.mark.parametrize(
    ("parameter", "description"),
    [
        (nn.Parameter(Wrapper(torch.ones(2))), "Wrapper (torch.strided, cpu)"),
        (Renamed(torch.ones(2)), "Renamed (torch.strided, cpu)"),
        (nn.Parameter(torch.eye(2).to_sparse()), "Parameter (torch.sparse_coo, cpu)"),
        (nn.Parameter(torch.ones(2, device="meta")), "Parameter (torch.strided, meta)"),
        (nn.UninitializedParameter(), "UninitializedParameter (torch.strided, cpu)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unusual_parameters_are_refused(parameter: nn.Parameter, description: str) -> None:
    model = small()
    model.register_parameter("odd", parameter)
    message = f"targets must be plain dense parameters, got {description}"
    for target in (parameter, "odd"):
        with refused(TypeError, message):
            SurgicalTheater(model, ["0.weight", target])
    with SurgicalTheater(model, ["0.weight"]):  # but may be there
        pass


def test_plain_tensors_are_refused() -> None:
    message = "targets must be plain dense parameters, got Tensor (torch.strided, cpu)"
    with refused(TypeError, message):
        SurgicalTheater(small(), [torch.ones(3)])


def test_closed_theater_refuses_work() -> None:
    model = small()
    room = SurgicalTheater(model, [model])
    message = "this SurgicalTheater is closed: operate inside its with block"
    for _ in range(2):
        for work in (
            lambda: room.original(model[0].weight),
            lambda: room.write(model[0].weight, torch.zeros(3, 3)),
            room.commit,
        ):
            with refused(RuntimeError, message):
                work()
        with room:
            pass


def test_parameters_that_are_no_targets_are_refused() -> None:
    model = small()
    before = Snapshot(model)
    message = (
        "parameter must be one of the targets ['0.weight', '0.bias'], got another of shape (2, 3)"
    )
    with SurgicalTheater(model, [model[0]]) as room:
        with refused(ValueError, message):
            room.original(model[1].weight)
        with refused(ValueError, message):
            room.write(model[1].weight, torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"^parameter must be one of the targets"):
            room.original(model[0].weight.detach())  # equal, but not the one
    before.assert_same()


def test_refusals_at_construction_leave_nothing_open() -> None:
    model = small()
    versions = [p._version for p in model.parameters()]
    SurgicalTheater(model, [model])
    with pytest.raises(ValueError, match="targets"):
        SurgicalTheater(model, ["nope"])
    assert [p._version for p in model.parameters()] == versions


# --- entering and leaving ------------------------------------------------------------------------


def test_reuse_saves_what_is_there_at_each_entry() -> None:
    model = small()
    room = SurgicalTheater(model, [model])
    for value in (1.0, 2.0):
        with torch.no_grad():
            model[0].weight.fill_(value)
        with room as entered:
            assert entered is room
            new_data(model, room)
        assert model[0].weight.unique().tolist() == [value]


def test_entering_twice_is_refused_and_the_first_stays_open() -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    with room:
        in_place(model, room)
        edited = fingerprint(model)
        with refused(RuntimeError, "this SurgicalTheater is open already; to nest, make another"):
            room.__enter__()
        assert room.is_open
        assert fingerprint(model) == edited
        write(model, room)
    before.assert_same()


def test_leaving_twice_or_before_entering_does_nothing() -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    room.__exit__(None, None, None)
    with room:
        in_place(model, room)
    through_data(model, room)
    edited = fingerprint(model)
    room.__exit__(None, None, None)
    assert fingerprint(model) == edited != before.state


def test_entry_is_refused_after_a_target_was_replaced() -> None:
    """Otherwise leaving would put the old Parameter back in the place of the new one."""
    model = small()
    room = SurgicalTheater(model, [model])
    replaced(model, room)
    before = Snapshot(model)
    with refused(RuntimeError, "entry needs every target in its place, weight is not"):
        room.__enter__()
    assert not room.is_open
    before.assert_same()
    with SurgicalTheater(model, [model]) as another:
        in_place(model, another)
    before.assert_same()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_while_entering_leaves_everything_closed_and_equal(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    calls, clone = [0], torch.Tensor.clone
    raised = error("no room for the second")

    def second_fails(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise raised
        return clone(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", second_fails)
        with pytest.raises(error) as caught:
            room.__enter__()
    assert caught.value is raised
    assert calls == [2]
    assert not room.is_open
    assert room.saved_bytes == 0
    before.assert_same()
    for again in (room, SurgicalTheater(model, [model])):
        with again:
            in_place(model, again)
        before.assert_same()


def test_a_failure_after_saving_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    calls, increment_version = [0], snapshot.increment_version

    def second_fails(tensors: list[Tensor]) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError
        increment_version(tensors)

    monkeypatch.setattr(snapshot, "increment_version", second_fails)
    with pytest.raises(MemoryError):
        room.__enter__()
    assert not room.is_open
    before.assert_same()


def fail_for(home: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make restoring the parameter that lives at `home` fail."""
    dense, pointer = snapshot._dense, home.data_ptr()

    def failing(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == pointer:
            raise OSError("the device is gone")
        return dense(tensor)

    monkeypatch.setattr(snapshot, "_dense", failing)


@pytest.mark.parametrize("failing", ["0.weight", "0.bias", "1.weight", "1.bias"])
@pytest.mark.parametrize("error", [None, ValueError])
def test_one_target_that_cannot_be_restored_does_not_stop_the_others(
    failing: str, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])
    chosen = model.get_parameter(failing)

    def operate() -> None:
        with room:
            for p in model.parameters():
                p.data.fill_(9.0)
            model[1].weight = nn.Parameter(torch.zeros(2, 3))
            fail_for(chosen, monkeypatch)
            if error:
                raise error("body")

    with pytest.raises(ExceptionGroup, match="weights that could not be restored") as caught:
        operate()
    (cause,) = caught.value.exceptions
    assert isinstance(cause, OSError)
    assert cause.__notes__ == [f"while restoring {failing}"]
    if error:
        assert isinstance(caught.value.__context__, error)
    assert not room.is_open
    assert [id(p) for p in model.parameters()] == [id(p) for p in before.parameters]
    for name, p in model.named_parameters():
        assert (bits(p) == before.state[name][2]) == (name != failing), name


def test_failures_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    room = SurgicalTheater(model, [model])
    room.__enter__()
    fail_for(model[0].weight, monkeypatch)
    fail_for(model[1].bias, monkeypatch)
    with pytest.raises(ExceptionGroup) as caught:
        room.__exit__(None, None, None)
    notes = [cause.__notes__ for cause in caught.value.exceptions]
    assert notes == [["while restoring 1.bias"], ["while restoring 0.weight"]]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exception_from_elsewhere_while_restoring_waits_for_all_weights(
    failing: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As raised by the handler of a signal other than Ctrl-C: a timeout, a termination."""
    model = small()
    before, calls, copy_ = Snapshot(model), [0], torch.Tensor.copy_

    def interrupted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == failing:
            raise error
        return copy_(tensor, *args, **kwargs)

    outer, inner = SurgicalTheater(model, [model[0]]), SurgicalTheater(model, [model[1]])
    outer.__enter__()
    inner.__enter__()
    for p in model.parameters():
        p.data = torch.zeros(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(error):
            outer.__exit__(None, None, None)
    assert not outer.is_open
    assert not inner.is_open
    inner.__exit__(error, None, None)
    before.assert_same()


def test_an_inner_theater_that_fails_does_not_stop_the_outer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Closed out of order, the outer one closes the inner, and restores all the same."""
    model = small()
    before = Snapshot(model)
    outer, inner = SurgicalTheater(model, [model[0]]), SurgicalTheater(model, [model[1]])
    outer.__enter__()
    inner.__enter__()
    for p in model.parameters():
        p.data.fill_(9.0)
    fail_for(model[1].bias, monkeypatch)
    with pytest.raises(ExceptionGroup) as caught:
        outer.__exit__(None, None, None)
    assert [cause.__notes__ for cause in caught.value.exceptions] == [["while restoring 1.bias"]]
    assert not inner.is_open
    assert not outer.is_open
    with pytest.raises(ExceptionGroup):
        inner.__exit__(None, None, None)
    for name, p in model.named_parameters():
        assert (bits(p) == before.state[name][2]) == (name != "1.bias"), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("edit", [write, in_place, through_data, new_data, one_row])
def test_gradient_modes_do_not_matter_and_do_not_stick(
    mode: type, commit: bool, edit: Edit
) -> None:
    model = small()
    before = Snapshot(model)
    with mode():
        with SurgicalTheater(model, [model]) as room:
            edit(model, room)
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


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_built_in_inference_mode_comes_back(inside: bool) -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    before = Snapshot(model)
    with torch.inference_mode(inside):
        with SurgicalTheater(model, [model]) as room:
            room.write(model.weight, torch.zeros(3, 3))
            assert model.weight.count_nonzero() == 0
            model.bias.data = torch.zeros(3)
        before.assert_same()
        with SurgicalTheater(model, [model]) as room:
            room.write(model.weight, torch.ones(3, 3))
            room.commit()
    assert model.weight.unique().tolist() == [1.0]


def test_autocast_forgets_its_copies_of_operated_weights() -> None:
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):  # one region: casts of weights are kept in it
        before = model(x)
        with SurgicalTheater(model, ["weight"]), torch.no_grad():
            model.weight.mul_(3)
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)
        with SurgicalTheater(model, ["weight"]) as room:
            room.write(model.weight, torch.zeros(4, 4))
            assert torch.equal(model(x), model.bias.to(torch.bfloat16)[None])
            room.write(model.weight, torch.ones(4, 4))
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("filled_before", [False, True])
def test_cached_parametrizations_are_computed_again(filled_before: bool) -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    direction, x = model.parametrizations.weight.original1, torch.ones(1, 4)
    before = model(x)
    with parametrize.cached():
        if filled_before:
            model(x)
        with SurgicalTheater(model, [model]) as room:
            room.write(direction, -direction)
            assert torch.equal(model(x), -before)
            room.write(direction, room.original(direction))
            assert torch.equal(model(x), before)
            room.write(direction, -direction)
            model(x)
        assert torch.equal(model(x), before)


def test_a_stack_that_is_nearly_full_is_refused_before_anything_is_edited() -> None:
    model = small()
    before, room = Snapshot(model), SurgicalTheater(model, [model])

    def at_depth(depth: int) -> None:
        if depth:
            at_depth(depth - 1)
        else:
            with room:
                for p in model.parameters():
                    p.data.mul_(2)

    refused = 0
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        try:
            at_depth(depth)
        except RecursionError:
            refused += 1
        before.assert_same()
        assert not room.is_open
    assert 0 < refused < 150


def test_a_theater_that_cannot_be_left_for_want_of_stack_can_be_left_again() -> None:
    model = small()
    before = Snapshot(model)

    def at_depth(depth: int, room: SurgicalTheater) -> None:
        if depth:
            at_depth(depth - 1, room)
        else:
            room.__exit__(None, None, None)

    limit, refused = sys.getrecursionlimit(), 0
    for depth in range(limit - 150, limit):
        room = SurgicalTheater(model, [model])
        room.__enter__()
        in_place(model, room)
        try:
            at_depth(depth, room)
        except RecursionError:
            refused += 1
            assert room.is_open
            room.__exit__(None, None, None)
        before.assert_same()
        assert not room.is_open
    assert 0 < refused < 150


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_theater_cannot_be_copied(make: Callable[[Any], Any]) -> None:
    model = small()
    with SurgicalTheater(model, [model]) as room, pytest.raises(TypeError, match="copied"):
        make(room)


def test_a_weight_edited_by_what_has_a_gradient_is_a_leaf_again() -> None:
    model = small()
    model.requires_grad_(False)
    before, gain = Snapshot(model), torch.ones(3, 3, requires_grad=True)
    with SurgicalTheater(model, [model]):
        model[0].weight.add_(gain)
    before.assert_same()
    assert model[0].weight.is_leaf
    assert not model[0].weight.requires_grad
