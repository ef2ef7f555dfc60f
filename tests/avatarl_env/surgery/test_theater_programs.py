"""Tests of avatarl_env/surgery/theater.py: random programs against a plain specification.

The specification keeps storage as lists of bit patterns and weights as positions in these lists.
Every step of a program is applied to the real model and to the lists; both are compared after it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from avatarl_env.surgery import SurgicalTheater
from tests.avatarl_env.surgery.edits import Snapshot

INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
DTYPES = list(INTEGERS)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a part": lambda flat: flat[2:8].view(2, 3),
    "transposed": lambda flat: flat[:6].view(3, 2).T,
    "strided": lambda flat: flat.view(2, 6)[:, ::2],
    "expanded": lambda flat: flat[3:6].expand(2, 3),
    "three": lambda flat: flat[1:4],
    "every third": lambda flat: flat[::3].view(2, 2),
    "the first": lambda flat: flat[:4],
    "from the third on": lambda flat: flat[2:8].view(3, 2),
}
"""Parts of storage of twelve elements."""
NAMES = ("a.w", "a.b", "c.w", "u", "v")


class Config(NamedTuple):
    """The kind of model that a program runs on."""

    dtype: torch.dtype
    layout: str
    """Of a.w."""
    tied: bool
    """Whether c.w is a.w."""
    shared: bool
    """Whether u and v are parts of one storage and overlap."""


@dataclass(frozen=True, eq=False)
class View:
    """A tensor, as positions (cells) in storage (memory)."""

    memory: list[int]
    cells: list[int]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def repeats(self) -> bool:
        return len(set(self.cells)) < len(self.cells)

    def values(self) -> list[int]:
        return [self.memory[cell] for cell in self.cells]

    def fill(self, values: Iterable[int]) -> None:
        for cell, value in zip(self.cells, values, strict=True):
            self.memory[cell] = value

    def through(self, change: Callable[[Tensor], Tensor]) -> View:
        """Return the view of the same storage that `change` makes of a tensor like this."""
        cells = change(torch.tensor(self.cells, dtype=torch.int64).view(self.shape))
        return View(self.memory, cells.reshape(-1).tolist(), tuple(cells.shape), self.dtype)


def patterns(tensor: Tensor) -> list[int]:
    """Return the elements' bits, as integers."""
    return tensor.detach().reshape(-1).view(INTEGERS[tensor.dtype]).tolist()


def fresh(tensor: Tensor) -> View:
    return View(patterns(tensor), list(range(tensor.numel())), tuple(tensor.shape), tensor.dtype)


@torch.no_grad()
def fill(tensor: Tensor, number: float) -> None:
    """Fill a tensor, of which an expanded one repeats some elements."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.size(dim):
            tensor = tensor.narrow(dim, 0, 1)
    tensor.fill_(number)


def initial(dtype: torch.dtype) -> Tensor:
    flat = (torch.arange(12) / 8 - 0.5).to(dtype)
    flat[:2], flat[-1] = -0.0, torch.inf
    return flat


@functools.cache
def positions(layout: str) -> tuple[list[int], tuple[int, ...]]:
    """Return the cells of a layout, and its shape."""
    cells = LAYOUTS[layout](torch.arange(12))
    return cells.reshape(-1).tolist(), tuple(cells.shape)


@dataclass(eq=False)
class Room:
    """A theater that was entered."""

    theater: SurgicalTheater
    targets: list[nn.Parameter]
    places: dict[str, nn.Parameter | None]
    homes: dict[nn.Parameter, View] = field(default_factory=dict)
    """The views that it saved, with their memory."""
    saved: dict[Any, Any] = field(default_factory=dict)
    """What it will restore: values of cells, views of parameters, parameters in places."""
    ended_early: bool = False


class Fault(NamedTuple):
    """A method of tensors that fails when it is called the nth time."""

    method: str
    nth: int
    error: type[BaseException]

    @contextlib.contextmanager
    def comes_through(self) -> Iterator[None]:
        """Inject the fault into the body once and expect its error."""
        original, calls = getattr(torch.Tensor, self.method), itertools.count(1)
        raised = self.error()

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.nth:
                raise raised
            return original(*args, **kwargs)

        setattr(torch.Tensor, self.method, failing)
        try:
            with pytest.raises(self.error) as caught:
                yield
        finally:
            delattr(torch.Tensor, self.method)  # it is inherited
        assert caught.value is raised


class World:
    """A real model and its specification, on which a program runs step by step."""

    def __init__(self, config: Config) -> None:
        self.model = nn.Module()
        self.model.a, self.model.c = nn.Module(), nn.Module()
        self.owner: dict[str, tuple[nn.Module, str]] = {
            name: (self.model.get_submodule(name[:-2]), name[-1]) for name in NAMES
        }
        self.views: dict[nn.Parameter, View] = {}
        self.storage: list[tuple[Tensor, list[int]]] = []
        self.slots: dict[str, nn.Parameter | None] = dict.fromkeys(NAMES)
        self.rooms: list[Room] = []
        self.memories: dict[int, list[int]] = {}
        self.closed: list[Room] = []
        self.number = 0  # of the step, which is what it writes

        def build(**layouts: str) -> None:
            flat, memory = initial(config.dtype), patterns(initial(config.dtype))
            self.storage.append((flat, memory))
            for place, layout in layouts.items():
                cells, shape = positions(layout)
                view = View(memory, cells, shape, config.dtype)
                self.put(place.replace("_", "."), nn.Parameter(LAYOUTS[layout](flat)), view)

        build(a_w=config.layout)
        build(a_b="three")
        if config.tied:
            self.put("c.w", self.model.a.w)
        else:
            build(c_w="every third")
        if config.shared:
            build(u="the first", v="from the third on")
        else:
            build(u="the first")
            build(v="from the third on")

    def put(self, name: str, parameter: nn.Parameter, view: View | None = None) -> None:
        setattr(*self.owner[name], parameter)
        self.slots[name] = parameter
        if view:
            self.views[parameter] = view

    def next_to(self, name: str) -> nn.Parameter | None:
        return self.slots[NAMES[(NAMES.index(name) + 1) % len(NAMES)]]

    def check(self) -> None:
        for name, parameter in self.slots.items():
            module, attribute = self.owner[name]
            assert module._parameters.get(attribute) is parameter, name
            if parameter is not None:
                view = self.views[parameter]
                assert (parameter.dtype, parameter.shape) == (view.dtype, view.shape), name
                assert patterns(parameter) == view.values(), name

    # --- entering and leaving --------------------------------------------------------------------

    def open(self, names: tuple[str, ...], fault: Fault | None = None) -> None:
        names = tuple(name for name in names if self.slots[name] is not None)
        held = [p for name in names if (p := self.slots[name]) is not None]
        if not held:
            with pytest.raises(ValueError, match=r"^targets must hold at least one parameter"):
                SurgicalTheater(self.model, names)
            return
        ways = (names, held, [SimpleNamespace(parameters=lambda: held)])
        room = SurgicalTheater(self.model, ways[self.number % 3])
        targets = dict.fromkeys(held)
        places = {name: p for name, p in self.slots.items() if p is not None and p in targets}
        self.enter(Room(room, list(targets), places), fault)

    def again(self, index: int) -> None:
        """Enter a theater once more."""
        if index < len(self.closed):
            room = self.closed.pop(index)
            if all(self.slots[name] is p for name, p in room.places.items()):
                self.enter(Room(room.theater, room.targets, room.places), None)
            else:
                with pytest.raises(RuntimeError, match=r"^entry needs every target in its place"):
                    room.theater.__enter__()

    def enter(self, room: Room, fault: Fault | None) -> None:
        if fault and fault.nth <= len(room.targets):
            with fault.comes_through():
                room.theater.__enter__()
            assert not room.theater.is_open
            return
        assert room.theater.__enter__() is room.theater
        self.save(room, room.places)
        n_bytes = [len(set(h.cells)) * h.dtype.itemsize for h in room.homes.values()]
        assert room.theater.saved_bytes == sum(n_bytes)
        self.rooms.append(room)

    def save(self, room: Room, places: dict[str, nn.Parameter | None]) -> None:
        """Let the theater save its targets and the parameters in these places."""
        room.homes = {p: self.views[p] for p in (*room.targets, *places.values())}
        homes = room.homes.values()
        self.memories |= {id(home.memory): home.memory for home in homes}
        cells = [("cell", id(home.memory), cell) for home in homes for cell in home.cells]
        keys = [*cells, *(("view", p) for p in room.homes), *(("slot", n) for n in places)]
        room.saved = {key: self.value(key) for key in keys}

    def value(self, key: Any) -> Any:
        if key[0] == "cell":
            return self.memories[key[1]][key[2]]
        return self.views[key[1]] if key[0] == "view" else self.slots[key[1]]

    def set(self, key: Any, value: Any) -> None:
        if key[0] == "cell":
            self.memories[key[1]][key[2]] = value
        elif key[0] == "view":
            self.views[key[1]] = value
        else:
            self.slots[key[1]] = value

    def leave(self, room: Room) -> int:
        """Undo a theater and those opened after it; return how many copies that takes.

        The later ones end, and from now on save what is there at this moment.
        """
        ended = self.rooms[self.rooms.index(room) :]
        n_copies = sum(len(each.homes) for each in ended)
        for each in reversed(ended):
            for key, value in each.saved.items():
                self.set(key, value)
        for later in ended[1:]:
            later.ended_early = True
            self.save(later, {name: self.slots[name] for name in later.places})
        self.rooms.remove(room)
        return n_copies

    def close(self, index: int, fault: Fault | None = None) -> None:
        """Leave a theater, also before those that were opened after it."""
        if not self.rooms:
            return
        room = self.rooms[max(0, len(self.rooms) - 1 - index)]
        ended_early, n_copies = room.ended_early, self.leave(room)
        if fault and fault.nth <= n_copies:
            expected: contextlib.AbstractContextManager[Any] = fault.comes_through()
        elif ended_early:
            expected = pytest.raises(RuntimeError, match="an outer one on the model was left first")
        else:
            expected = contextlib.nullcontext()
        with expected:
            room.theater.__exit__(None, None, None)
        self.note_closed(room)

    def note_closed(self, *rooms: Room) -> None:
        for room in rooms:
            assert not room.theater.is_open
            assert room.theater.saved_bytes == 0
        for flat, memory in self.storage:  # the weights' neighbours, too
            assert patterns(flat) == memory
        self.closed = [*rooms, *self.closed][:3]

    def raises(self, index: int, error: type[BaseException]) -> None:
        """Let an exception of the body pass through the innermost theaters."""
        if not self.rooms:
            return
        index = max(0, len(self.rooms) - 1 - index)
        raised, left = error("of the body"), self.rooms[index:]

        def body() -> None:
            with contextlib.ExitStack() as stack:
                for room in left:
                    stack.push(room.theater.__exit__)
                raise raised

        with pytest.raises(error) as caught:
            body()
        assert caught.value is raised
        for room in reversed(left):
            self.leave(room)
        self.note_closed(*left)

    def commit(self, index: int, fault: Fault | None = None) -> None:
        if not self.rooms:
            return
        room = self.rooms[max(0, len(self.rooms) - 1 - index)]
        if room.ended_early:
            with pytest.raises(RuntimeError, match=r"^this SurgicalTheater is closed"):
                room.theater.commit()
            return
        present, homes = ([views[p] for p in room.targets] for views in (self.views, room.homes))
        fits = [
            (now.shape, now.dtype) == (home.shape, home.dtype)
            and len(set(now.cells)) <= len(set(home.cells))
            for now, home in zip(present, homes, strict=True)
        ]
        placed = all(self.slots[name] is p for name, p in room.places.items())
        n_clones = (fits.index(False) if False in fits else len(fits)) if placed else 0
        if fault and fault.nth <= n_clones:
            with fault.comes_through():
                room.theater.commit()
        elif n_clones < len(fits):
            with pytest.raises(RuntimeError, match=r"^commit needs"):
                room.theater.commit()
        else:
            room.theater.commit()
            for home, now in reversed(list(zip(homes, present, strict=True))):
                cells = [("cell", id(home.memory), cell) for cell in home.cells]
                room.saved |= dict(zip(cells, now.values(), strict=True))
            for p, now in zip(room.targets, present, strict=True):
                assert patterns(room.theater.original(p)) == now.values()

    # --- edits -----------------------------------------------------------------------------------

    def edit(self, kind: str, name: str) -> None:
        parameter = self.slots[name]
        if parameter is None:
            new = torch.full((2,), float(self.number))
            self.put(name, nn.Parameter(new), fresh(new))
            return
        view = self.views[parameter]
        writes = kind in ("copied", "written", "loaded", "stepped")
        if view.repeats and writes:  # torch refuses to write a whole tensor whose cells repeat
            return
        new = torch.arange(len(view.cells)).add(self.number).to(view.dtype).view(view.shape)
        if self.number % 5 == 0:
            new = new.fill_(-0.0 if self.number % 2 else torch.inf)
        EDITS[kind](self, name, parameter, new)

    def set_data(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        parameter.data = new
        self.views[parameter] = fresh(new)

    def resized(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        self.set_data(name, parameter, torch.full((self.number % 5,), 7.0, dtype=new.dtype))

    def cast(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        dtype = DTYPES[(DTYPES.index(new.dtype) + 1 + self.number % 3) % len(DTYPES)]
        self.set_data(name, parameter, parameter.detach().contiguous().to(dtype))

    def filled(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        number = float(self.number)
        fill(parameter if self.number % 2 else parameter.data, number)
        pattern = patterns(torch.full((1,), number, dtype=new.dtype))
        self.views[parameter].fill(pattern * new.numel())

    def one_element(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        if new.numel():
            parameter.detach()[(-1,) * parameter.dim()] = float(self.number)
            view = self.views[parameter]
            (pattern,) = patterns(torch.full((1,), float(self.number), dtype=new.dtype))
            view.memory[view.cells[-1]] = pattern

    def copied(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(new)
        self.views[parameter].fill(patterns(new))

    def written(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        for room in self.rooms:
            if any(target is parameter for target in room.targets):
                if room.ended_early:
                    with pytest.raises(RuntimeError, match=r"^this SurgicalTheater is closed"):
                        room.theater.write(parameter, new)
                elif new.shape == parameter.shape:
                    room.theater.write(parameter, new)
                    self.views[parameter].fill(patterns(new))

    def loaded(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        self.model.load_state_dict({name: new}, strict=False)
        self.views[parameter].fill(patterns(new))

    def stepped(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        expected = parameter.detach().clone(memory_format=torch.contiguous_format)
        expected.add_(torch.ones_like(expected), alpha=-0.5)
        parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([parameter], lr=0.5, foreach=False).step()
        parameter.grad = None
        self.views[parameter].fill(patterns(expected))

    def transposed(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        if parameter.dim() == 2:
            parameter.data = parameter.data.T
            self.views[parameter] = self.views[parameter].through(lambda x: x.T)

    def first_row(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        parameter.data = parameter.data[:1]
        self.views[parameter] = self.views[parameter].through(lambda x: x[:1])

    def aliased(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        """Give the parameter the storage of another."""
        other = self.next_to(name)
        if other is not None:
            parameter.data = other.data
            self.views[parameter] = self.views[other]

    def assigned(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        self.model.load_state_dict({name: new}, strict=False, assign=True)
        found = self.model.get_parameter(name)
        assert found is not parameter
        self.slots[name], self.views[found] = found, fresh(new)

    def replaced(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        self.put(name, nn.Parameter(new), fresh(new))

    def tied(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        other = self.next_to(name)
        if other is not None:
            self.put(name, other)

    def deleted(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        delattr(*self.owner[name])
        self.slots[name] = None

    def set_to_none(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        setattr(*self.owner[name], None)
        self.slots[name] = None

    def made_a_buffer(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        self.deleted(name, parameter, new)
        module, attribute = self.owner[name]
        module.register_buffer(attribute, new)

    def made_a_tensor(self, name: str, parameter: nn.Parameter, new: Tensor) -> None:
        self.deleted(name, parameter, new)
        setattr(*self.owner[name], new)


EDITS: dict[str, Callable[[World, str, nn.Parameter, Tensor], None]] = {
    edit.__name__: edit
    for edit in (
        World.filled,
        World.one_element,
        World.copied,
        World.written,
        World.set_data,
        World.loaded,
        World.stepped,
        World.resized,
        World.cast,
        World.transposed,
        World.first_row,
        World.aliased,
        World.assigned,
        World.replaced,
        World.tied,
        World.deleted,
        World.set_to_none,
        World.made_a_buffer,
        World.made_a_tensor,
    )
}

# --- random programs -----------------------------------------------------------------------------

SUBSETS = [names for n in range(1, len(NAMES) + 1) for names in itertools.combinations(NAMES, n)]
ORDERS = list(dict.fromkeys([*SUBSETS, *(names[::-1] for names in SUBSETS)]))
INDICES = (0, 0, 0, 1, 2, 3)  # of theaters, from the innermost
CLONE_FAULTS = [Fault("clone", n, e) for n in (1, 2, 4) for e in (MemoryError, KeyboardInterrupt)]
COPY_FAULTS = [Fault("copy_", n, e) for n in range(1, 7) for e in (OSError, KeyboardInterrupt)]
STEPS: list[tuple[int, list[Any]]] = [  # with weights: what leads deeper comes more often
    (1, [("close",), INDICES]),
    (7, [("edit",), EDITS, NAMES]),
    (4, [("open",), ORDERS]),
    (2, [("commit",), INDICES]),
    (1, [("again",), range(3)]),
    (1, [("raises",), INDICES, (ValueError, KeyboardInterrupt)]),
    (1, [("open",), ORDERS[::3], CLONE_FAULTS]),
    (1, [("close",), INDICES, COPY_FAULTS]),
    (1, [("commit",), INDICES, CLONE_FAULTS]),
]
CONFIGS = list(
    itertools.starmap(Config, itertools.product(DTYPES, list(LAYOUTS)[:4], *[(False, True)] * 2))
)
# Two choices for a step, both among at most 127: of more, Hypothesis mostly takes the first ones.
CHOICES = [
    st.sampled_from(list(itertools.product(*parts)))
    for weight, parts in STEPS
    for _ in range(weight)
]
PROGRAMS = st.lists(st.one_of(CHOICES), min_size=4, max_size=24)
Program = list[tuple[Any, ...]]


def run(config: Config, program: Program) -> None:
    """Run the program and compare after each step; the outermost theater undoes everything."""
    world = World(config)
    pristine = Snapshot(world.model)
    memory = [list(memory) for _, memory in world.storage]
    with SurgicalTheater(world.model, NAMES):
        for number, (kind, *arguments) in enumerate(program, start=1):
            world.number = number
            getattr(world, kind)(*arguments)
            world.check()
        for room in world.rooms:
            assert room.theater.is_open is not room.ended_early
    pristine.assert_same()
    for room in world.rooms[::2] + world.rooms[1::2]:  # what they still edit is undone, too
        for p in (*room.targets, *map(world.model.get_parameter, room.places)):
            fill(p.data, 9.0)
        with pytest.raises(RuntimeError, match="an outer one on the model was left first"):
            room.theater.__exit__(None, None, None)
        pristine.assert_same()
        assert [patterns(flat) for flat, _ in world.storage] == memory


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(CONFIGS), PROGRAMS)
def test_random_programs_agree_with_the_specification(config: Config, program: Program) -> None:
    run(config, program)


@pytest.mark.exhaustive
@settings(max_examples=20_000, deadline=None)
@given(st.sampled_from(CONFIGS), PROGRAMS)
def test_many_more_random_programs_agree_with_the_specification(
    config: Config, program: Program
) -> None:
    run(config, program)
