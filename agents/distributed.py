"""The ranks of a run: the processes that torchrun starts, and their communication.

Rank 0 is the first. Without torchrun there is one rank, and nothing here costs anything.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.errors import STOPPING, DriftError, LostError
from avatarl_env.surgery import SurgicalTheater

Rows = TypeVar("Rows", bound=np.generic)

# Long, because the other ranks wait while the first operates, evaluates and writes. With gloo, a
# rank notices at once, before any timeout, that the rank it waits for has ended; with NCCL, which
# averages the gradients of GPUs, torchrun ends all ranks soon after one has ended.
PATIENCE = timedelta(hours=12)
_groups = iter(range(2**31))


@dataclass(frozen=True)
class Ranks:
    """This rank among those of its run. Every rank must make the same calls in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank operates, evaluates and writes."""
        return self.rank == 0

    def shard(self, rows: NDArray[Rows]) -> NDArray[Rows]:
        """Return this rank's rows of a batch: the rank-th of `count` equal parts."""
        n = len(rows) // self.count
        return rows[self.rank * n : (self.rank + 1) * n]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors in place by their means over all ranks, the same bits on each."""
        if self.count == 1:
            return
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _reporting_loss():
            dist.all_reduce(flat)
        flat /= self.count
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, parts, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def broadcast(self, value: Any = None) -> Any:
        """Return the first rank's value; its tensors must be on the CPU."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _reporting_loss():
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any = None) -> list[Any]:
        """Return the values of all ranks, in order, once every rank has made this call."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with _reporting_loss():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreeing(self, *kinds: type[Exception]) -> Iterator[None]:
        """If the body raises an error of these kinds on any rank, raise one on every rank.

        Raises:
            Exception: this rank's own error, or one of the first kind with another rank's message.
        """
        own: Exception | None = None
        try:
            yield
        except kinds as error:
            own = error
        messages = self.gather(None if own is None else str(own))
        if own is not None:
            raise own
        for message in messages:
            if message is not None:
                raise kinds[0](message)

    @contextmanager
    def together(self, *kinds: type[BaseException]) -> Iterator[None]:
        """Synchronise all ranks on exit, also after errors of these kinds, which all ranks raise.

        torchrun ends all ranks soon after one has failed, so the others wait here until the first
        has written everything.
        """
        try:
            yield
        except kinds:
            with suppress(LostError):  # the error itself matters more
                self.gather()
            raise
        self.gather()


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connect this process to the other ranks of its run while the body runs.

    torchrun sends signals to every rank; only the first reacts and then stops the others. An
    existing process group is used and left open.
    """
    rank, count = place()
    if count == 1:
        yield ALONE
        return
    import torch.distributed as dist

    ranks = Ranks(rank, count)
    if dist.is_initialized():
        yield ranks
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    _import_before_a_group_exists()
    common, *_ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    # A second group of the same processes must not find the keys of the first in the store.
    store = PrefixStore(f"avatarl-{next(_groups)}", common)
    # NCCL for gradients. Everything else is small and uses gloo, which waits without a busy loop.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        with _ignoring_signals(not ranks.is_first):
            yield ranks
    finally:
        dist.destroy_process_group()


def average_gradients(ranks: Ranks, model: nn.Module, readings: Tensor) -> None:
    """Average a model's gradients and the figures of an update over all ranks, in place."""
    # One sum of everything, not DistributedDataParallel: rollouts, theaters and the optimizer would
    # have to handle its wrapper, and there is little computation to overlap with. Since the figures
    # are part of the sum, a loss that is not finite on one rank is not finite on any.
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    ranks.average([*grads, readings])


def share_edits(ranks: Ranks, model: nn.Module, edited: Iterable[Tensor]) -> bool:
    """Copy edited weights from the first rank to the others; optimizers are not changed.

    Args:
        ranks: of the run.
        model: the same on all ranks but for the edits.
        edited: edited parameters of the first rank's model; ignored on other ranks.

    Returns:
        Whether there were any.
    """
    ids = {id(p) for p in edited}
    if ranks.count == 1:
        return bool(ids)
    values = {name: p.detach().cpu() for name, p in model.named_parameters() if id(p) in ids}
    edits: dict[str, Tensor] = ranks.broadcast(values)
    if edits and not ranks.is_first:
        with SurgicalTheater(model, list(edits)) as theater:
            for name, weight in edits.items():
                theater.write(model.get_parameter(name), weight)
            theater.commit()
    return bool(edits)


def require_same(ranks: Ranks, model: nn.Module) -> None:
    """Check that all ranks have the same weights, bit for bit.

    Raises:
        DriftError: on every rank, if they differ.
    """
    if ranks.count == 1:
        return
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    if len(set(ranks.gather(digest.digest()))) > 1:
        raise DriftError(
            "weights must be the same on every rank, got different ones: "
            "processors of different kinds round differently"
        )


def _import_before_a_group_exists() -> None:
    """Import `torch.distributed.nn.functional` before the default process group exists.

    Its functions have the default group as a default argument, so a later import (by a compiled
    optimizer) keeps a reference to the group until the process ends. The group and its threads then
    outlive `destroy_process_group`; if a thread frees a tensor while Python shuts down, the process
    ends with SIGABRT.
    """
    import torch.distributed.nn.functional  # noqa: F401


@contextmanager
def _ignoring_signals(ignore: bool) -> Iterator[None]:
    if not ignore or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _reporting_loss() -> Iterator[None]:
    """Turn a RuntimeError, which torch raises for every failure, into a LostError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostError(f"another rank of this run cannot be reached: {reason}") from error


def place() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun set them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def torchrun_words() -> list[str]:
    """Return the torchrun command, in words, for this number of processes; empty for one."""
    _, count = place()
    if count == 1:
        return []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    nodes = [] if local == count else ["--nnodes", str(count // local)]
    return ["torchrun", *nodes, "--nproc-per-node", str(local)]


def own_device(name: str) -> str:
    """Return this process's device for the setting `name`.

    Processes on one machine cannot share a GPU: each uses the GPU numbered as its local rank.

    Raises:
        ValueError: if `name` has a number and there are several processes.
    """
    _, count = place()
    if count == 1 or name == "cpu":
        return name
    if ":" in name:
        raise ValueError(f"device must have no number with several processes, got {name!r}")
    return f"{name}:{os.environ.get('LOCAL_RANK', '0')}"
