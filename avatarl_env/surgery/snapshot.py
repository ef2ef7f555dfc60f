"""What a theater saved: each target's own memory and the bytes that belong there."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from avatarl_env.surgery.sites import Choice, Site, address_range, n_bytes_spanned

_numbers = itertools.count()


class Row(NamedTuple):
    """One target."""

    name: str
    parameter: nn.Parameter
    home: Tensor
    """The target's own memory."""
    saved: Tensor
    """A copy of what was there; of an expanded weight, each byte once."""
    storage: torch.UntypedStorage
    """That the memory is a part of."""
    n_bytes: int
    """Bytes that the storage must have for it."""

    @property
    def has_memory(self) -> bool:
        """Whether the target's own memory is still there."""
        return int(self.storage.nbytes()) >= self.n_bytes

    def overlaps(self, other: Row) -> bool:
        """Whether putting one back may change what the other put back."""
        mine, others = address_range(self.home), address_range(other.home)
        in_memory = mine.start < others.stop and others.start < mine.stop
        return self.parameter is other.parameter or in_memory

    def put_back(self) -> None:
        """Give the target its own memory and its saved bytes.

        Raises:
            RuntimeError: if the memory was freed or shrunk. The target then has the saved values
                in new memory.
        """
        home, parameter = self.home, self.parameter
        lost = not self.has_memory
        if lost:
            home = torch.empty_strided(
                home.shape, home.stride(), dtype=home.dtype, device=home.device
            )
        _dense(home).copy_(self.saved)
        moved = (parameter.dtype, parameter.device) != (home.dtype, home.device)
        parameter.data = home
        if parameter.grad_fn is not None:  # edited in place by what has a gradient
            parameter.detach_()
        if moved and parameter.grad is not None:  # module.to() moved it along
            parameter.grad.data = parameter.grad.data.to(home.device, home.dtype)
        if lost:
            raise RuntimeError(
                f"the storage of {self.name} was freed or shrunk by the body, to "
                f"{self.storage.nbytes()} bytes: its values are back in new memory"
            )


class Snapshot(NamedTuple):
    """The saved bytes of all targets, and everything else that must be as it was."""

    number: int
    """Later snapshots have higher numbers."""
    rows: Sequence[Row]
    sites: Sequence[Site]
    aliases: Sequence[Tensor]
    """Tensors of the model that are no targets, but share memory with one."""

    def part_for(self, others: Collection[Snapshot]) -> Snapshot:
        """Return what of this must be put back again after `others` were."""
        theirs = [row for other in others for row in other.rows]
        places = {site.place for other in others for site in other.sites}
        return self._replace(
            rows=[row for row in self.rows if any(map(row.overlaps, theirs))],
            sites=[site for site in self.sites if site.place in places],
        )

    def joined(self, part: Snapshot) -> Snapshot:
        """Return this with what another part of the same snapshot has more."""
        return self._replace(
            rows=list({row.parameter: row for row in (*self.rows, *part.rows)}.values()),
            sites=list({site.place: site for site in (*self.sites, *part.sites)}.values()),
        )

    @property
    def n_bytes(self) -> int:
        """Bytes held by the copies."""
        return sum(row.saved.numel() * row.saved.element_size() for row in self.rows)

    def put_back(self) -> list[BaseException]:
        """Restore every target and every place; return what was raised meanwhile."""
        failures: list[BaseException] = []
        for row in reversed(self.rows):
            try:
                row.put_back()
            except BaseException as failure:  # go on with the others
                failure.add_note(f"while restoring {row.name}")
                failures.append(failure)
        for site in self.sites:
            try:
                site.put_back()
            except BaseException as failure:
                failure.add_note(f"while restoring {site.name}")
                failures.append(failure)
        self.announce()
        return failures

    def announce(self) -> None:
        """Tell autograd and torch's caches that the targets have changed.

        Without this, the backward of a graph that read the old values would be silently wrong.
        """
        increment_version([row.parameter for row in self.rows])
        increment_version(self.aliases)
        forget_cached_weights()

    def retaken(self) -> Snapshot:
        """Return a snapshot of the targets as they are now, to be put into the same memory.

        Raises:
            RuntimeError: if a target no longer has the shape and dtype that its memory is for, or
                the memory was freed or shrunk.
        """
        rows = []
        with torch.inference_mode(False):
            for row in self.rows:
                name, p, home, saved = row[:4]
                if not (has_memory(p.data) and row.has_memory):
                    raise RuntimeError(f"commit needs the memory of {name}, which the body freed")
                value = _dense(p.data)
                same = (p.shape, p.dtype) == (home.shape, home.dtype)
                if not same or value.numel() > saved.numel():  # more than an expanded one holds
                    raise RuntimeError(
                        f"commit needs {name} as {tuple(saved.shape)} {home.dtype}, "
                        f"got {tuple(value.shape)} {p.dtype}"
                    )
                rows.append(row._replace(saved=value.expand_as(saved).clone()))
        return self._replace(rows=rows)


def take(choice: Choice) -> Snapshot:
    """Save the targets.

    Raises:
        RuntimeError: if a target's storage holds fewer bytes than the target needs.
    """
    rows = []
    with torch.inference_mode(False):
        for name, p in zip(choice.names, choice.parameters, strict=True):
            home = p.data
            storage, needed = home.untyped_storage(), n_bytes_needed(home)
            if storage.nbytes() < needed:
                raise RuntimeError(
                    f"entry needs the memory of every target, {name} of {tuple(p.shape)} has "
                    f"{storage.nbytes()} bytes (its storage was freed or shrunk)"
                )
            rows.append(Row(name, p, home, _dense(home).clone(), storage, needed))
    snapshot = Snapshot(next(_numbers), rows, choice.sites, choice.aliases)
    snapshot.announce()
    return snapshot


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of `tensor` reaches to its last element.

    Storage can be freed or shrunk under a tensor (`untyped_storage().resize_`); reading or
    writing the tensor is then an access to memory of something else.
    """
    return int(tensor.untyped_storage().nbytes()) >= n_bytes_needed(tensor)


def n_bytes_needed(tensor: Tensor) -> int:
    """Return how far into its storage a tensor reaches, bytes."""
    spanned = n_bytes_spanned(tensor)
    return spanned and int(tensor.storage_offset()) * tensor.element_size() + spanned


def forget_cached_weights() -> None:
    """Empty torch's caches of tensors that were computed from weights.

    Autocast keeps half-precision copies, `parametrize.cached()` the parametrized weights.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _dense(tensor: Tensor) -> Tensor:
    """Return a part of `tensor` that covers each byte once (an expanded weight repeats some)."""
    if tensor.is_contiguous():
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.size(dim)))
    return tensor
