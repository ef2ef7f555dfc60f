"""Copies of the targets' weights, and how they are put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from avatarl_env.surgery.parameters import Choice, Site, check_storage


class Row(NamedTuple):
    """One target."""

    name: str
    parameter: nn.Parameter
    home: Tensor
    """The target's own memory."""
    saved: Tensor
    """A copy of that memory; each byte once if the weight is expanded."""
    n_bytes: int
    """Size of the whole storage."""

    def put_back(self) -> None:
        """Give the target its own memory and the saved bytes."""
        home, parameter, storage = self.home, self.parameter, self.home.untyped_storage()
        if storage.nbytes() < self.n_bytes:  # freed or shrunk by the body
            storage.resize_(self.n_bytes)
        _dense(home).copy_(self.saved)
        moved = (parameter.dtype, parameter.device) != (home.dtype, home.device)
        parameter.data = home
        if parameter.grad_fn is not None:  # edited in place by a tensor with a gradient
            parameter.detach_()
        if moved and parameter.grad is not None:  # module.to() also moved the gradient
            parameter.grad.data = parameter.grad.data.to(home.device, home.dtype)


class Snapshot(NamedTuple):
    """The saved bytes of all targets, and the places of the targets."""

    rows: dict[Tensor, Row]
    sites: Sequence[Site]
    aliases: Sequence[Tensor]
    """Tensors of the model that are not targets but share storage with one."""

    @property
    def n_bytes(self) -> int:
        """Bytes held by the copies."""
        return sum(row.saved.numel() * row.saved.element_size() for row in self.rows.values())

    def put_back(self) -> list[BaseException]:
        """Restore every target and every place; return the exceptions that were raised."""
        failures: list[BaseException] = []
        parts: list[Row | Site] = [*reversed(self.rows.values()), *self.sites]
        for part in parts:
            try:
                part.put_back()
            except BaseException as failure:  # restore the others first
                failure.add_note(f"while restoring {part.name}")
                failures.append(failure)
        self.mark_changed()
        return failures

    def mark_changed(self) -> None:
        """Mark the targets as changed for autograd, and empty torch's caches.

        Without this, the backward of a graph that read the old values would be silently wrong.
        """
        increment_version([*self.rows, *self.aliases])
        forget_cached_weights()

    def retaken(self) -> Snapshot:
        """Return a snapshot of the current weights, for the same memory.

        Raises:
            RuntimeError: if a target no longer has its shape and dtype, or its storage was freed.
        """
        rows = {}
        with torch.inference_mode(False):
            for p, row in self.rows.items():
                check_storage(row.name, p.data)
                value, home = _dense(p.data), row.home
                shapes = zip(value.shape, row.saved.shape, strict=False)
                fits = all(n in (1, m) for n, m in shapes)  # an expanded weight holds one row only
                if (p.shape, p.dtype) != (home.shape, home.dtype) or not fits:
                    raise RuntimeError(
                        f"commit needs {row.name} as {tuple(row.saved.shape)} {home.dtype}, "
                        f"got {tuple(value.shape)} {p.dtype}"
                    )
                rows[p] = row._replace(saved=value.expand_as(row.saved).clone())
        return self._replace(rows=rows)


EMPTY = Snapshot({}, (), ())


def restore(snapshots: Sequence[Snapshot]) -> tuple[list[BaseException], list[BaseException]]:
    """Put all snapshots back, the latest first, and try once more if anything was raised.

    Returns:
        The exceptions of the first attempt and of the second.
    """
    raised = _attempt(snapshots)
    return raised, _attempt(snapshots) if raised else []


def _attempt(snapshots: Sequence[Snapshot]) -> list[BaseException]:
    raised: list[BaseException] = []
    try:
        for snapshot in reversed(snapshots):
            raised += snapshot.put_back()
    except BaseException as failure:  # between two targets, for example by a signal handler
        raised.append(failure)
    return raised


def take(choice: Choice) -> Snapshot:
    """Save the targets.

    Raises:
        RuntimeError: if a target's storage was freed or shrunk.
    """
    rows: dict[Tensor, Row] = {}
    with torch.inference_mode(False):
        for p, name in choice.names.items():
            home = p.data
            check_storage(name, home)
            saved = _dense(home).clone()
            rows[p] = Row(name, p, home, saved, home.untyped_storage().nbytes())
    snapshot = Snapshot(rows, choice.sites, choice.aliases)
    snapshot.mark_changed()
    return snapshot


def forget_cached_weights() -> None:
    """Empty torch's caches of tensors that were computed from weights.

    Autocast keeps half-precision copies, `parametrize.cached()` the parametrized weights.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _dense(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that covers each byte once (an expanded weight repeats some)."""
    if tensor.is_contiguous():
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.size(dim)))
    return tensor
