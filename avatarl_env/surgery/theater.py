"""The context manager in which weights may be edited: what it saved comes back bit for bit.

Besides the optimizer, this is the only place of the project that writes parameters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from avatarl_env.choices import closest
from avatarl_env.surgery.interrupts import InterruptGuard

_lock = threading.Lock()
_open_theaters: list[SurgicalTheater] = []  # of all threads, in order of entry
_interrupts = InterruptGuard()


class HasParameters(Protocol):
    """Anything that lists parameters: a module, an attention target."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters to operate on."""


Targets = Iterable[HasParameters | Tensor | str]


class _Site(NamedTuple):
    """A name under which a module holds a target."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    order: tuple[str, ...]
    """The module's parameters, which state_dict() and optimizers list in this order."""

    def holds(self) -> bool:
        """Whether the module still finds the target under the name."""
        found = self.module._parameters.get(self.name)
        return found is self.parameter and self.name not in self.module.__dict__

    def put_back(self) -> None:
        """Give the module its target again, in its old place."""
        entries = self.module._parameters
        if not self.holds():
            for others in (self.module.__dict__, self.module._buffers, self.module._modules):
                others.pop(self.name, None)
            entries[self.name] = self.parameter
        if tuple(entries) != self.order:
            rank = {name: i for i, name in enumerate(self.order)}
            for name in sorted(entries, key=lambda name: rank.get(name, len(rank))):
                entries[name] = entries.pop(name)


class SurgicalTheater:
    """Save some weights of a model, let the body edit them in place, and put them back.

    ::

        with SurgicalTheater(model, find_targets(model)) as theater:
            operator.apply(theater, coefficients)  # the shared model is modified in place
            score = evaluate(model)
        # restored bit for bit, whatever happened

    On every way out (return, exception, KeyboardInterrupt) each target gets its saved bytes back
    in its own storage, whether the body edited it in place, through ``.data``, re-assigned
    ``.data``, deleted it or put something else in its place. Ctrl-C is held back while the theater
    is entered, commits and is left (main thread), and is delivered right after.

    * Only the targets are copied: :attr:`saved_bytes` says how many bytes that is.
    * Theaters nest on one thread, also on the same targets, and unwind last-in first-out: closing
      an outer one closes those opened on the model after it. A second thread is refused.
    * Autograd graphs may not span the boundary, either way: a backward that needs a target as it
      was on the other side raises a RuntimeError instead of giving a wrong gradient. (The
      exception is torch's own: an edit through ``.data`` between a loss and its backward, both in
      the body, is invisible to autograd. Edit with :meth:`write` or under ``torch.no_grad()``.)
    * ``state_dict()`` and ``deepcopy`` inside see the operated weights.
    * ``requires_grad``, ``.grad``, train/eval mode and all random generators are untouched, and
      so is an optimizer's state; its ``step()`` inside the body is undone for the weights only.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        """Choose what will be saved; nothing is touched before entry.

        Args:
            model: the model that holds the targets.
            targets: attention targets, modules, parameters, or names of parameters.

        Raises:
            TypeError: if a target is not a plain dense Parameter (DTensor, quantised and other
                tensor subclasses ignore in-place surgery silently).
            ValueError: if there are no targets, or one does not belong to the model.
        """
        names = {p: name for name, p in model.named_parameters()}
        chosen = _collect(model, targets, names)
        self._parameters, self._names = list(chosen), list(chosen.values())
        # Theaters whose reach overlaps operate on one model.
        self._reach = frozenset[nn.Parameter | nn.Module]([*names, *model.modules()])
        self._sites = [
            _Site(module, name, p, tuple(module._parameters))
            for module in model.modules()
            for name, p in module._parameters.items()
            if p is not None and p in chosen
        ]
        self._home: list[Tensor] = []  # the targets' own storage
        self._saved: list[Tensor] = []  # what they get back
        self._thread = 0
        self._guarded = False

    @property
    def saved_bytes(self) -> int:
        """Bytes held to restore the targets while the theater is open, 0 while it is closed."""
        return sum(saved.numel() * saved.element_size() for saved in self._saved)

    @property
    def is_open(self) -> bool:
        """Whether the theater has been entered and not left."""
        return self in _open_theaters

    def original(self, parameter: Tensor) -> Tensor:
        """Return the weights that ``parameter`` will get back; to be read only.

        Raises:
            RuntimeError: if the theater is closed.
            ValueError: if ``parameter`` is not a target.
        """
        index = self._index(parameter)
        return self._saved[index].expand(self._home[index].shape)

    @torch.no_grad()
    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Copy ``value`` into ``parameter``, in place; autograd learns of the change.

        Raises:
            RuntimeError: if the theater is closed.
            ValueError: if ``parameter`` is not a target.
        """
        parameter = self._parameters[self._index(parameter)]
        parameter.data.copy_(value)  # also where the model was built in inference mode
        increment_version(parameter)

    @_interrupts.guard
    def commit(self) -> None:
        """Keep the present weights: from now on they are what is put back on exit.

        Parameters, their storage and optimizer state stay the same objects. An enclosing theater
        still restores what it saved itself.

        Raises:
            RuntimeError: if the theater is closed, or the body changed a target's shape or dtype
                or replaced its Parameter. Nothing is committed then, and nothing lost.
        """
        try:
            self._require_open()
            self._require_sites("commit")
            self._saved = self._present()
            _raise_together(self._put_back())
        finally:
            _interrupts.deliver()

    @_interrupts.guard
    def __enter__(self) -> Self:
        """Save the targets.

        Raises:
            RuntimeError: if this theater is open already, another thread operates on the model, or
                the model has another Parameter in a target's place since the theater was made.
        """
        owed = _interrupts.install()
        try:
            self._register()
        except BaseException:
            if owed:
                _interrupts.remove()
            _interrupts.deliver()
            raise
        self._guarded = owed
        try:
            self._save()
            _interrupts.deliver()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @_interrupts.guard
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore every target, then let the body's exception go on; a second call does nothing.

        Raises:
            ExceptionGroup: if targets could not be restored; all others were.
        """
        try:
            _raise_together(self._leave())
        finally:
            _interrupts.deliver()

    def _register(self) -> None:
        me = threading.get_ident()
        with _lock:
            if self in _open_theaters:
                raise RuntimeError("this SurgicalTheater is open already; to nest, make another")
            for other in _open_theaters:
                if other._thread != me and not self._reach.isdisjoint(other._reach):
                    raise RuntimeError(
                        "one thread at a time may operate on a model, "
                        f"thread {other._thread} has a theater open on this one"
                    )
            self._require_sites("entry")
            self._thread = me
            _open_theaters.append(self)

    def _save(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            home = [p.data for p in self._parameters]
            saved = [_dense(tensor).clone() for tensor in home]
            self._home, self._saved = home, saved
            for p in self._parameters:
                increment_version(p)

    def _present(self) -> list[Tensor]:
        """Return copies of the targets' weights that fit their own storage."""
        present = []
        with torch.inference_mode(False), torch.no_grad():
            for name, p, home, saved in self._rows():
                value = _dense(p.data)
                same = (p.shape, p.dtype) == (home.shape, home.dtype)
                if not same or value.numel() > saved.numel():  # more than an expanded one holds
                    raise RuntimeError(
                        f"commit needs {name} as {tuple(saved.shape)} {home.dtype}, "
                        f"got {tuple(value.shape)} {p.dtype}"
                    )
                present.append(value.expand_as(saved).clone())
        return present

    def _leave(self) -> list[Exception]:
        """Restore and unregister, the theaters opened later first; return the failures."""
        failures: list[Exception] = []
        try:
            if self._saved:
                for other in reversed(_open_theaters[_open_theaters.index(self) + 1 :]):
                    if not self._reach.isdisjoint(other._reach):
                        failures += other._leave()
                failures += self._put_back()
        finally:
            with _lock:
                if self in _open_theaters:
                    _open_theaters.remove(self)
            self._home, self._saved = [], []
            if self._guarded:
                self._guarded = False
                _interrupts.remove()
        return failures

    def _put_back(self) -> list[Exception]:
        """Give every target its own storage and its saved bytes; return the failures."""
        failures: list[Exception] = []
        with torch.no_grad():
            for name, p, home, saved in reversed(self._rows()):
                try:
                    _dense(home).copy_(saved)
                    p.data = home
                    # Without this a graph that spans the boundary would be silently wrong.
                    increment_version(p)
                except Exception as failure:
                    failure.add_note(f"while restoring {name}")  # and go on with the others
                    failures.append(failure)
        for site in self._sites:
            site.put_back()
        return failures

    def _rows(self) -> list[tuple[str, nn.Parameter, Tensor, Tensor]]:
        return list(zip(self._names, self._parameters, self._home, self._saved, strict=True))

    def _require_sites(self, action: str) -> None:
        for site in self._sites:
            if not site.holds():
                raise RuntimeError(f"{action} needs every target in its place, {site.name} is not")

    def _require_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("this SurgicalTheater is closed: operate inside its with block")

    def _index(self, parameter: Tensor) -> int:
        self._require_open()
        for index, p in enumerate(self._parameters):
            if p is parameter:
                return index
        raise ValueError(
            f"parameter must be one of the targets {self._names}, "
            f"got another of shape {tuple(parameter.shape)}"
        )


def _collect(
    model: nn.Module, targets: Targets, names: dict[nn.Parameter, str]
) -> dict[nn.Parameter, str]:
    """Return the distinct parameters of ``targets`` and their names, all checked."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    found: dict[nn.Parameter, str] = {}
    for target in targets:
        if isinstance(target, str):
            if target not in by_name:
                hint = closest(target, by_name)
                raise ValueError(f"targets must name parameters of the model, got {target!r}{hint}")
            chosen: Iterable[Tensor] = [by_name[target]]
        else:
            chosen = [target] if isinstance(target, Tensor) else target.parameters()
        for p in chosen:
            if type(p) is not nn.Parameter or p.layout != torch.strided or p.is_meta:
                raise TypeError(
                    f"targets must be plain dense parameters, got {type(p).__name__} "
                    f"({p.layout}, {p.device})"
                )
            if p not in names:
                raise ValueError(f"targets must belong to the model, got one of {tuple(p.shape)}")
            found[p] = names[p]
    if not found:
        raise ValueError("targets must hold at least one parameter, got none")
    return found


def _dense(tensor: Tensor) -> Tensor:
    """Return a part of ``tensor`` that covers each byte once (an expanded weight repeats some)."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.size(dim)))
    return tensor


def _raise_together(failures: list[Exception]) -> None:
    if failures:
        raise ExceptionGroup("weights that could not be restored", failures)
