"""The context manager in which weights may be edited: what it saved comes back bit for bit.

Besides the optimizer, this is the only place of the project that writes parameters.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from avatarl_env.surgery.interrupts import InterruptGuard
from avatarl_env.surgery.sites import TargetsLike, choose
from avatarl_env.surgery.snapshot import Snapshot, forget_cached_weights, has_memory, take

_lock = threading.RLock()  # a theater may be collected, and so left, while it is held
_open_theaters: list[SurgicalTheater] = []  # of all threads, in order of entry
_interrupts = InterruptGuard()
_DEPTH_OF_LEAVING = 20  # frames, at most, below __exit__


class SurgicalTheater:
    """Save some weights of a model, let the body edit them in place, and put them back.

    ::

        with SurgicalTheater(model, find_targets(model)) as theater:
            operator.apply(theater, coefficients)  # the shared model is modified in place
            score = evaluate(model)
        # restored bit for bit, whatever happened

    On every way out (return, exception, KeyboardInterrupt) each target gets its saved bytes back
    in its own storage, whether the body edited it in place, through `.data`, re-assigned
    `.data`, deleted it or put something else in its place. Signals with a Python handler (Ctrl-C,
    the alarm of a timeout) are held back while the theater is entered, commits and is left, and
    are delivered right after. This cannot be done for a handler that the body itself installs, nor
    for an exception that another thread injects into this one.

    * Only the targets are copied: `saved_bytes` says how many bytes that is.
    * Theaters nest in one thread and one asyncio task, also on the same targets, and unwind
      last-in first-out. A second thread or task is refused. Leaving an outer theater first (as two
      generators may) ends the inner ones: their weights come back, now and when they are left,
      and leaving them raises a RuntimeError.
    * Storage must stay as large as it was: a target whose storage the body freed or shrank gets its
      values back in new memory, and an error says so.
    * Autograd graphs may not span the boundary, either way: a backward that needs a target as it
      was on the other side raises a RuntimeError instead of giving a wrong gradient. This also
      holds for tensors of the model that share a target's storage. Exceptions, because torch does
      not notice them: an edit through `.data` between a loss and its backward, both in the body
      (edit with `write` or under `torch.no_grad()`); tensors on a target's storage that
      the model did not register when the theater was made; and backwards that read weights again
      or keep them out of autograd's sight, which are activation checkpointing
      (`torch.utils.checkpoint`, both forms), saved-tensor hooks (`save_on_cpu`) and the
      functions that `torch.func.vjp` returns. Call these on the side where the loss was built.
    * Compiled models see every edit and its end; new values need no new graph. Only graphs with
      frozen weights would not, so entry is refused while `torch._inductor.config.freezing` is on.
    * `state_dict()` and `deepcopy` inside see the operated weights.
    * Autocast and `parametrize.cached()` keep what they computed from weights for as long as
      their region lasts. Theaters make them forget it on entry, `write` and exit; after
      another edit it is up to you.
    * `requires_grad`, `.grad`, train/eval mode and all random generators are untouched, and
      so is an optimizer's state; its `step()` inside the body is undone for the weights only.
      (`model.to(dtype)` in the body rounds `.grad`; exit gives back its dtype, not its bits.)
    * Not undone: a module put in another's place, a parametrization registered on a target, what
      the body or a hook computed from operated weights and kept.
    """

    def __init__(self, model: nn.Module, targets: TargetsLike) -> None:
        """Choose what will be saved; nothing is touched before entry.

        Args:
            model: the model that holds the targets.
            targets: attention targets, modules, parameters, or names of parameters.

        Raises:
            TypeError: if a target is not a plain dense Parameter (DTensor, quantised and other
                tensor subclasses ignore in-place surgery silently), or the model is TorchScript or
                sharded by FSDP.
            ValueError: if there are no targets, or one does not belong to the model.
        """
        choice = choose(model, targets)
        self._choice = choice
        # Its own snapshot, then what of others must be put back after it: those of theaters that
        # it was opened in, and that were left first.
        self._held: list[Snapshot] = []
        self._owner: tuple[object, ...] = ()
        self._ended_early = False
        self._guarded = False

    @property
    def saved_bytes(self) -> int:
        """Bytes held to restore the targets while the theater is open, 0 while it is closed."""
        return sum(snapshot.n_bytes for snapshot in self._held)

    @property
    def is_open(self) -> bool:
        """Whether the theater has been entered, and neither it nor an outer one has been left."""
        return self in _open_theaters and not self._ended_early

    def original(self, parameter: Tensor) -> Tensor:
        """Return the weights that `parameter` will get back; to be read only.

        Raises:
            RuntimeError: if the theater is closed.
            ValueError: if `parameter` is not a target.
        """
        index = self._index(parameter)
        row = self._held[0].rows[index]
        return row.saved.expand(row.home.shape)

    @torch.no_grad()
    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Copy `value` into `parameter`, in place; autograd learns of the change.

        Args:
            parameter: a target.
            value: of the same shape and of the same kind of numbers; floating-point ones are
                rounded to the parameter's precision, integers have to fit its dtype.

        Raises:
            RuntimeError: if the theater is closed, or the body freed the parameter's storage.
            TypeError: if `value` is not a tensor.
            ValueError: if `parameter` is not a target, or `value` is of another shape or of a
                kind of numbers that the parameter cannot hold.
        """
        index = self._index(parameter)
        parameter = self._choice.parameters[index]
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor, got {type(value).__name__}")
        kept = torch.promote_types(value.dtype, parameter.dtype) == parameter.dtype
        if value.shape != parameter.shape or not (
            kept or (value.is_floating_point() and parameter.is_floating_point())
        ):
            raise ValueError(
                f"value must fit {self._choice.names[index]}, which is {tuple(parameter.shape)} "
                f"{parameter.dtype}, got {tuple(value.shape)} {value.dtype}"
            )
        if not has_memory(parameter):
            raise RuntimeError(f"the storage of {self._choice.names[index]} was freed or shrunk")
        parameter.data.copy_(value)  # also where the model was built in inference mode
        increment_version([parameter, *self._choice.aliases])
        forget_cached_weights()

    @_interrupts.guard
    def commit(self) -> None:
        """Keep the present weights: from now on they are what is put back on exit.

        Parameters, their storage and optimizer state stay the same objects. An enclosing theater
        still restores what it saved itself. Where targets share memory and the body drew them
        apart, the one chosen first wins.

        Raises:
            RuntimeError: if the theater is closed, or the body changed a target's shape or dtype,
                replaced its Parameter or freed its storage. Nothing is committed then, and nothing
                lost.
            ExceptionGroup: if weights could not be written into their own storage. They are
                committed all the same: leaving the theater tries again.
        """
        try:
            self._require_open()
            self._require_sites("commit")
            self._held[0] = self._held[0].retaken()
            _twice(self._held[0].put_back)
        finally:
            _interrupts.deliver()

    @_interrupts.guard
    def __enter__(self) -> Self:
        """Save the targets.

        Raises:
            RecursionError: if the stack has no room left for leaving.
            RuntimeError: if this theater is open already, another thread or asyncio task operates
                on the model, the model has another Parameter in a target's place since the theater
                was made, a target's storage was freed, or compiled graphs are being frozen.
        """
        owed = _interrupts.install()
        try:
            _require_stack(_DEPTH_OF_LEAVING)
            self._register()
        except BaseException:
            if owed:
                _interrupts.remove()
            _interrupts.deliver()
            raise
        self._guarded = owed
        try:
            self._held = [take(self._choice)]
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
            RecursionError: if it is left from so much deeper than it was entered that the stack has
                no room. It stays open then, and can be left again.
            RuntimeError: if the body ended well, but an outer theater was left before this one, so
                that part of the body ran on weights that were no longer operated.
        """
        ended_early = self._ended_early
        try:
            self._leave()
            if ended_early and exc_type is None:
                raise RuntimeError(
                    "a SurgicalTheater must be left before those it was opened in; an outer one on "
                    "the model was left first. All weights are restored, but what this body did "
                    "after that was done to a model that was not operated on"
                )
        finally:
            _interrupts.deliver()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: there is one that puts the weights back."""
        raise TypeError("a SurgicalTheater cannot be copied or pickled; make another")

    def _register(self) -> None:
        inductor = sys.modules.get("torch._inductor.config")
        if inductor is not None and inductor.freezing:
            raise RuntimeError(
                "torch._inductor.config.freezing must be False to operate on a model, got True: "
                "frozen graphs keep the weights they were compiled with"
            )
        me = _owner()
        with _lock:
            if self in _open_theaters:
                raise RuntimeError("this SurgicalTheater is open already; to nest, make another")
            for other in self._of_the_model():
                if other._owner not in (me, me[:1]):
                    raise RuntimeError(
                        "one thread and one asyncio task at a time may operate on a model, "
                        f"{_described(other._owner)} has a theater open on this one"
                    )
            self._require_sites("entry")
            self._owner = me
            self._ended_early = False
            _open_theaters.append(self)

    def _leave(self) -> None:
        """Restore and unregister; where the stack is too full for that, change nothing."""
        try:
            _twice(self._unwind)
        except RecursionError:
            raise
        except BaseException:
            self._unregister()
            raise
        self._unregister()

    def _unregister(self) -> None:
        with _lock:
            if self in _open_theaters:
                _open_theaters.remove(self)
        self._held, self._ended_early = [], False
        if self._guarded:
            self._guarded = False
            _interrupts.remove()

    def _unwind(self) -> list[BaseException]:
        """Restore, and before that end the theaters opened later; return what was raised."""
        failures: list[BaseException] = []
        if self._held:
            with _lock:
                start = _open_theaters.index(self) + 1
                later = self._of_the_model(start)
            for other in later:
                other._end(self._held)
            held = [snapshot for each in (self, *later) for snapshot in each._held]
            for snapshot in sorted(held, key=_number, reverse=True):  # the oldest last
                failures += snapshot.put_back()
        return failures

    def _end(self, outer: list[Snapshot]) -> None:
        """Take note that an outer theater is left, and of what it has to put back."""
        self._ended_early = True
        held = {snapshot.number: snapshot for snapshot in self._held}
        for snapshot in sorted(outer, key=_number, reverse=True):
            part = snapshot.part_for(held.values())
            if part.rows or part.sites:
                known = held.get(snapshot.number)
                held[snapshot.number] = part if known is None else known.joined(part)
        self._held = list(held.values())

    def _of_the_model(self, start: int = 0) -> list[SurgicalTheater]:
        """Return the theaters that are open on the same model, from the `start`-th entry on."""
        reach = self._choice.reach
        return [
            other for other in _open_theaters[start:] if not reach.isdisjoint(other._choice.reach)
        ]

    def _require_sites(self, action: str) -> None:
        for site in self._choice.sites:
            if not site.holds():
                raise RuntimeError(f"{action} needs every target in its place, {site.name} is not")

    def _require_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("this SurgicalTheater is closed: operate inside its with block")

    def _index(self, parameter: Tensor) -> int:
        self._require_open()
        for index, p in enumerate(self._choice.parameters):
            if p is parameter:
                return index
        raise ValueError(
            f"parameter must be one of the targets {self._choice.names}, "
            f"got another of shape {tuple(parameter.shape)}"
        )


def _require_stack(depth: int) -> None:
    """Raise a RecursionError unless so many more calls fit on the stack."""
    if depth:
        _require_stack(depth - 1)


def _owner() -> tuple[object, ...]:
    """Return the running thread and, in one, the asyncio task."""
    thread = threading.get_ident()
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return (thread,)
    return (thread, asyncio.current_task())


def _described(owner: tuple[object, ...]) -> str:
    return f"thread {owner[0]}" if len(owner) == 1 else f"task {owner[1]} of thread {owner[0]}"


def _number(snapshot: Snapshot) -> int:
    return snapshot.number


def _twice(attempt: Callable[[], list[BaseException]]) -> None:
    """Restore; if something was raised meanwhile, restore once more, then raise it.

    Raises:
        BaseException: what was raised the first time, if the second attempt went well.
        ExceptionGroup: if it did not.
    """
    try:
        failures = attempt()
    except BaseException as failure:  # between two targets, say of a handler set in the body
        failures = [failure]
    if not failures:
        return
    lost = attempt()
    for error in lost:
        if isinstance(error, RecursionError):
            raise error
    if lost:
        raise BaseExceptionGroup("weights that could not be restored", lost)
    if len(failures) == 1:
        raise failures[0]
    raise BaseExceptionGroup("raised while weights were restored, which they are", failures)
