"""The ranks of a run: processes that torchrun starts, and what they exchange.

Rank 0 is the first. A program that was started otherwise is the only rank: everything here is then
free.
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

# The other ranks wait while the first operates, evaluates and writes, for unknown minutes. With
# gloo a rank that waits for one that has ended learns of it at once, whatever the timeout; between
# GPUs gradients go by NCCL, where torchrun ends all ranks soon after one has ended.
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
        """Return the values of all ranks, in order; no rank continues before all are here."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with _reporting_loss():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreeing(self, *kinds: type[Exception]) -> Iterator[None]:
        """Raise an error of these kinds on every rank if the body raises one on any.

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
        """Synchronise all ranks on exit, also on errors of these kinds, which all ranks raise.

        torchrun ends all ranks soon after one has ended with an error: the others therefore stay
        until the first has written everything.
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

    Signals that ask to stop act on the first rank, which tells the others: torchrun sends them to
    all. A process group that exists already is used, and left as it is.
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
    # Gradients go from GPU to GPU; everything else is small, and waits on the CPU without spinning.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        with _ignoring_signals(not ranks.is_first):
            yield ranks
    finally:
        dist.destroy_process_group()


def average_gradients(ranks: Ranks, model: nn.Module, readings: Tensor) -> None:
    """Average a model's gradients, and numbers that go with them, over all ranks, in place."""
    # One sum of everything rather than DistributedDataParallel, whose wrapped forward rollouts,
    # theaters and the optimizer would have to know; its overlap would hide little here. With the
    # readings in the sum, a loss that is not finite on one rank is not finite on all.
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    ranks.average([*grads, readings])


def share_edits(ranks: Ranks, model: nn.Module, edited: Iterable[Tensor]) -> bool:
    """Give every rank the first rank's values of edited weights; return whether there are any.

    Optimizers are left as they are.

    Args:
        ranks: of the run.
        model: whose weights they are.
        edited: parameters of the first rank's model; those of other ranks are ignored.
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
        DriftError: on every rank, if one has others.
    """
    if ranks.count == 1:
        return
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    if len(set(ranks.gather(digest.digest()))) > 1:
        raise DriftError(
            "weights must be the same on every rank, got others: "
            "processors of several kinds round differently"
        )


def _import_before_a_group_exists() -> None:
    """Import `torch.distributed.nn.functional` before the default process group exists.

    Its functions have the default group as a default argument, so importing it later keeps a
    reference to the group until the process ends. Compiled optimizers import it. A group that is
    still referenced outlives `destroy_process_group` with its threads; if one of them frees a
    tensor while Python shuts down, the process ends with SIGABRT.
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
    """Raise a LostError where torch raises a RuntimeError, its only kind."""
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
    """Return the words of a torchrun command that starts as many processes; none for one."""
    _, count = place()
    if count == 1:
        return []
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    nodes = [] if local == count else ["--nnodes", str(count // local)]
    return ["torchrun", *nodes, "--nproc-per-node", str(local)]


def own_device(name: str) -> str:
    """Return the device that this process uses when `name` is asked for.

    Processes on one machine cannot share a GPU: each uses the one with its local rank.

    Raises:
        ValueError: if several processes are asked to use the same GPU.
    """
    _, count = place()
    if count == 1 or name == "cpu":
        return name
    if ":" in name:
        raise ValueError(f"device must have no number with several processes, got {name!r}")
    return f"{name}:{os.environ.get('LOCAL_RANK', '0')}"
