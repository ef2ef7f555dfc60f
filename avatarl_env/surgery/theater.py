"""The context manager in which weights may be edited, and which restores them bit for bit.

Besides the optimizer, this is the only place of the project that writes parameters.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from avatarl_env.surgery.interrupts import InterruptGuard, require_stack
from avatarl_env.surgery.parameters import TargetsLike, check_unfrozen, check_value, choose
from avatarl_env.surgery.snapshot import EMPTY, Row, Snapshot, forget_cached_weights, restore, take

_lock = threading.RLock()  # garbage collection may leave a theater while the lock is held
_open_theaters: list[SurgicalTheater] = []  # of all threads, in order of entry
_interrupts = InterruptGuard()


class SurgicalTheater:
    """Save some weights of a model, let the body edit them in place, and restore them.

    ::

        with SurgicalTheater(model, find_targets(model)) as theater:
            operator.apply(theater, coefficients)  # the shared model is modified in place
            score = evaluate(model)
        # restored bit for bit, even after an exception

    On every way out (return, exception, KeyboardInterrupt) each target gets its saved bytes back
    in its own storage, even if the body edited it through `.data`, re-assigned `.data`, deleted it,
    freed its storage or put something else in its place. Signals with a Python handler (Ctrl-C, the
    alarm of a timeout) are deferred while the theater is entered and left, and delivered right
    after; those of handlers that the body installs are not, nor are exceptions that another thread
    injects into this one.

    * Only the targets are copied: `saved_bytes` is the size of the copies.
    * Theaters nest in one thread and one asyncio task, also on the same targets, and unwind
      last-in first-out. A second thread or task is refused. Leaving an outer theater first (two
      generators can do that) restores and ends the inner ones. Later edits in their bodies are
      undone when they are left, which raises a RuntimeError.
    * Autograd graphs must not cross the boundary: call backward on the side where the loss was
      built. A backward that needs a target's value from the other side raises a RuntimeError
      instead of giving a wrong gradient, also for other tensors of the model on a target's storage.
      Torch does not detect: edits through `.data` between a loss and its backward in the body (use
      `write` or `torch.no_grad()`); tensors on a target's storage that the model did not register
      when the theater was made; activation checkpointing, saved-tensor hooks (`save_on_cpu`) and
      the functions that `torch.func.vjp` returns, which bypass autograd's check.
    * Compiled models see every edit and the restored weights, and are not recompiled. Graphs with
      frozen weights would not, so entry is refused if `torch._inductor.config.freezing` is on.
    * `state_dict()` and `deepcopy` inside see the operated weights.
    * Autocast and `parametrize.cached()` cache what they compute from weights. Theaters empty these
      caches on entry, `write` and exit; other edits do not.
    * `requires_grad`, `.grad`, train/eval mode, random generators and optimizer state are
      untouched; an optimizer's `step()` inside is undone for the weights only. (`model.to(dtype)`
      in the body rounds `.grad`; exit gives back its dtype, not its bits.)
    * Not undone: a replaced module, a parametrization registered on a target, and values that the
      body or a hook computed from operated weights and kept.
    """

    def __init__(self, model: nn.Module, targets: TargetsLike) -> None:
        """Choose the targets; nothing is touched before entry.

        Args:
            model: the model that holds the targets.
            targets: attention targets, modules, parameters, or names of parameters.

        Raises:
            TypeError: if a target is not a plain dense Parameter (DTensors, quantised and other
                tensor subclasses silently ignore in-place edits), or the model is TorchScript or
                sharded by FSDP.
            ValueError: if there are no targets, or one does not belong to the model.
        """
        self._choice = choose(model, targets)
        self._snapshot: Snapshot | None = None  # while it is in _open_theaters
        self._owner: tuple[object, ...] = ()
        self._ended_early = False
        self._guarded = False

    @property
    def saved_bytes(self) -> int:
        """Size of the copies while the theater is open, bytes; 0 while it is closed."""
        return 0 if self._snapshot is None else self._snapshot.n_bytes

    @property
    def is_open(self) -> bool:
        """Whether the theater has been entered, and neither it nor an outer one has been left."""
        return self._snapshot is not None and not self._ended_early

    def original(self, parameter: Tensor) -> Tensor:
        """Return the saved value of a parameter, which must not be written to.

        Raises:
            RuntimeError: if the theater is closed.
            ValueError: if `parameter` is not a target.
        """
        row = self._row(parameter)
        return row.saved.expand(row.home.shape)

    @torch.no_grad()
    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Copy `value` into `parameter` in place, and mark it as changed for autograd.

        Args:
            parameter: a target.
            value: of the same shape and kind of numbers; floating-point ones are rounded to the
                parameter's precision, integers must fit its dtype.

        Raises:
            RuntimeError: if the theater is closed, or the body freed the parameter's storage.
            TypeError: if `value` is not a tensor.
            ValueError: if `parameter` is not a target, or `value` is of another shape or of a
                kind of numbers that the parameter cannot hold.
        """
        check_value(self._row(parameter).name, parameter, value)
        parameter.data.copy_(value)  # also where the model was built in inference mode
        increment_version([parameter, *self._choice.aliases])
        forget_cached_weights()

    def commit(self) -> None:
        """Keep the current weights: from now on they are the ones to restore.

        Parameters, their storage and optimizer state stay the same objects. An enclosing theater
        still restores what it saved itself. If targets share memory and the body separated
        them, the one chosen first wins.

        Raises:
            RuntimeError: if the theater is closed, or the body changed a target's shape or dtype,
                replaced its Parameter or freed its storage; nothing is committed then.
        """
        snapshot = self._require_open()
        self._choice.require_places("commit")
        self._snapshot = snapshot.retaken()

    @_interrupts.guard
    def __enter__(self) -> Self:
        """Save the targets.

        Raises:
            RecursionError: if the stack has no room for leaving.
            RuntimeError: if this theater is open already, another thread or asyncio task operates
                on the model, a target's Parameter was replaced since the theater was made, a
                target's storage was freed, or compiled graphs are being frozen.
        """
        is_installed = _interrupts.install()
        try:
            require_stack(25)  # more than leaving needs
            check_unfrozen()
            self._open()
        except BaseException:
            if is_installed:
                _interrupts.remove()
            _interrupts.deliver()
            raise
        self._guarded = is_installed
        try:
            _interrupts.deliver()
        except BaseException:
            self._leave()
            raise
        return self

    @_interrupts.guard
    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Restore every target and let the body's exception pass; a second call does nothing.

        Raises:
            ExceptionGroup: if targets could not be restored; all others were.
            RecursionError: if the stack has no room; the theater stays open then, and can be left
                again.
            RuntimeError: if the body raised nothing, but an outer theater was left before this one,
                so that part of the body ran on weights that were no longer operated.
        """
        ended_early = self._ended_early
        try:
            self._leave()
            if ended_early and exc_type is None:
                raise RuntimeError(
                    "a SurgicalTheater must be left before those it was opened in; an outer one on "
                    "the model was left first. All weights are restored, but from then on this "
                    "body ran on a model that was not operated on"
                )
        finally:
            _interrupts.deliver()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: only one theater may restore the weights."""
        raise TypeError("a SurgicalTheater cannot be copied or pickled; make another")

    def _open(self) -> None:
        me = _owner()
        with _lock:
            if self._snapshot is not None:
                raise RuntimeError("this SurgicalTheater is open already; to nest, make another")
            for other in self._of_the_model(_open_theaters.copy()):
                if other._owner not in (me, me[:1]):
                    raise RuntimeError(
                        "one thread and one asyncio task at a time may operate on a model, "
                        f"{other._owner[-1]} has a theater open on this one"
                    )
            self._choice.require_places("entry")
            self._snapshot = take(self._choice)
            self._owner = me
            _open_theaters.append(self)

    def _leave(self) -> None:
        """Restore the weights, end the theaters opened later, and close."""
        if self._snapshot is None:
            return
        require_stack(20)
        with _lock:
            present = _open_theaters.copy()  # others may be left meanwhile
        leaving = self._of_the_model(present[present.index(self) :])
        raised, lost = restore([theater._snapshot or EMPTY for theater in leaving])
        for theater in leaving[1:]:
            lost += theater._end_early()
        with _lock:
            _open_theaters.remove(self)
        self._snapshot, self._ended_early = None, False
        if self._guarded:
            self._guarded = False
            _interrupts.remove()
        if lost:
            raise BaseExceptionGroup("weights that could not be restored", lost)
        if len(raised) == 1:
            raise raised[0]
        if raised:
            raise BaseExceptionGroup("raised while weights were restored; all of them are", raised)

    def _end_early(self) -> list[BaseException]:
        """Stop operating, and save the current weights as the ones to restore on exit."""
        if self._snapshot is None:  # left meanwhile
            return []
        self._snapshot, self._ended_early = EMPTY, True
        try:
            self._snapshot = take(self._choice.present())
        except BaseException as failure:
            return [failure]
        return []

    def _of_the_model(self, theaters: list[SurgicalTheater]) -> list[SurgicalTheater]:
        """Return the theaters that are on the same model."""
        reach = self._choice.reach
        return [other for other in theaters if not reach.isdisjoint(other._choice.reach)]

    def _require_open(self) -> Snapshot:
        if self._snapshot is None or self._ended_early:
            raise RuntimeError("this SurgicalTheater is closed: operate inside its with block")
        return self._snapshot

    def _row(self, parameter: Tensor) -> Row:
        row = self._require_open().rows.get(parameter)
        if row is None:
            raise ValueError(
                f"parameter must be one of the targets {[*self._choice.names.values()]}, "
                f"got another of shape {tuple(parameter.shape)}"
            )
        return row


def _owner() -> tuple[object, ...]:
    """Return the running thread and, inside one, the asyncio task."""
    thread = threading.current_thread()
    try:
        return (thread, asyncio.current_task())
    except RuntimeError:  # no loop is running
        return (thread,)
