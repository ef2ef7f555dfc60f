"""The context manager in which weights may be edited: what it saved comes back bit for bit.

Besides the optimizer, this is the only place of the project that writes parameters.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from avatarl_env.surgery.interrupts import InterruptGuard
from avatarl_env.surgery.sites import TargetsLike, choose

_lock = threading.RLock()  # a theater may be collected, and so left, while it is held
_open_theaters: list[SurgicalTheater] = []  # of all threads, in order of entry
_interrupts = InterruptGuard()


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
    * Compiled models see every edit and its end; new values need no new graph. Only graphs with
      frozen weights would not, so entry is refused while ``torch._inductor.config.freezing`` is on.
    * ``state_dict()`` and ``deepcopy`` inside see the operated weights.
    * Autocast keeps half-precision copies of weights for as long as its region lasts. Theaters
      make it forget them on entry, :meth:`write` and exit; after another edit it is up to you.
    * ``requires_grad``, ``.grad``, train/eval mode and all random generators are untouched, and
      so is an optimizer's state; its ``step()`` inside the body is undone for the weights only.
    * Not undone: a module put in another's place, a parametrization registered on a target.
    """

    def __init__(self, model: nn.Module, targets: TargetsLike) -> None:
        """Choose what will be saved; nothing is touched before entry.

        Args:
            model: the model that holds the targets.
            targets: attention targets, modules, parameters, or names of parameters.

        Raises:
            TypeError: if a target is not a plain dense Parameter (DTensor, quantised and other
                tensor subclasses ignore in-place surgery silently).
            ValueError: if there are no targets, or one does not belong to the model.
        """
        choice = choose(model, targets)
        self._parameters, self._names, self._sites, self._reach = choice
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
        torch.clear_autocast_cache()  # which keeps half-precision copies of weights

    @_interrupts.guard
    def commit(self) -> None:
        """Keep the present weights: from now on they are what is put back on exit.

        Parameters, their storage and optimizer state stay the same objects. An enclosing theater
        still restores what it saved itself. Where targets share memory and the body drew them
        apart, the one chosen first wins.

        Raises:
            RuntimeError: if the theater is closed, or the body changed a target's shape or dtype
                or replaced its Parameter. Nothing is committed then, and nothing lost.
            ExceptionGroup: if weights could not be written into their own storage. They are
                committed all the same: leaving the theater tries again.
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
            RuntimeError: if this theater is open already, another thread operates on the model,
                the model has another Parameter in a target's place since the theater was made, or
                compiled graphs are being frozen.
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
        inductor = sys.modules.get("torch._inductor.config")
        if inductor is not None and inductor.freezing:
            raise RuntimeError(
                "torch._inductor.config.freezing must be False to operate on a model, got True: "
                "frozen graphs keep the weights they were compiled with"
            )
        with _lock:
            if self in _open_theaters:
                raise RuntimeError("this SurgicalTheater is open already; to nest, make another")
            for other in tuple(_open_theaters):
                if other._thread != me and not self._reach.isdisjoint(other._reach):
                    raise RuntimeError(
                        "one thread at a time may operate on a model, "
                        f"thread {other._thread} has a theater open on this one"
                    )
            self._require_sites("entry")
            self._thread = me
            _open_theaters.append(self)

    def _save(self) -> None:
        with torch.inference_mode(False):
            home = [p.data for p in self._parameters]
            saved = [_dense(tensor).clone() for tensor in home]
            self._home, self._saved = home, saved
            for p in self._parameters:
                increment_version(p)
        torch.clear_autocast_cache()

    def _present(self) -> list[Tensor]:
        """Return copies of the targets' weights that fit their own storage."""
        present = []
        with torch.inference_mode(False):
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
        """Restore and unregister; return the failures."""
        try:
            return self._unwind()
        except BaseException:  # from elsewhere, say a timeout: first the weights, then that
            self._unwind()
            raise
        finally:
            with _lock:
                if self in _open_theaters:
                    _open_theaters.remove(self)
            self._home, self._saved = [], []
            if self._guarded:
                self._guarded = False
                _interrupts.remove()

    def _unwind(self) -> list[Exception]:
        """Restore, and before that leave the theaters opened later; return the failures."""
        failures: list[Exception] = []
        if self._saved:
            with _lock:
                later = _open_theaters[_open_theaters.index(self) + 1 :]
            for other in reversed(later):
                if not self._reach.isdisjoint(other._reach):
                    failures += other._leave()
            failures += self._put_back()
        return failures

    def _put_back(self) -> list[Exception]:
        """Give every target its own storage and its saved bytes; return the failures."""
        failures: list[Exception] = []
        for name, p, home, saved in reversed(self._rows()):
            try:
                if not home.untyped_storage().nbytes():
                    _regrow(home)
                _dense(home).copy_(saved)
                p.data = home
                # Without this a graph that spans the boundary would be silently wrong.
                increment_version(p)
            except Exception as failure:
                failure.add_note(f"while restoring {name}")  # and go on with the others
                failures.append(failure)
        for site in self._sites:
            site.put_back()
        torch.clear_autocast_cache()
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


def _dense(tensor: Tensor) -> Tensor:
    """Return a part of ``tensor`` that covers each byte once (an expanded weight repeats some)."""
    if tensor.is_contiguous():
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.size(dim)))
    return tensor


def _regrow(tensor: Tensor) -> None:
    """Give ``tensor`` memory again if its storage was freed: copying to none is a crash."""
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        n_elements = tensor.storage_offset() + sum((n - 1) * step for n, step in steps) + 1
        tensor.untyped_storage().resize_(int(n_elements * tensor.element_size()))


def _raise_together(failures: list[Exception]) -> None:
    if failures:
        raise ExceptionGroup("weights that could not be restored", failures)
