"""The processes of a run: who one is among them, and what they tell one another.

`torchrun` starts several copies of a program, each with its *rank*; rank 0 is the first process.
Started otherwise there is one process, which is alone: all of this does nothing then.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.errors import STOPPING
from avatarl_env.surgery import Operator, SurgicalTheater

Rows = TypeVar("Rows", bound=np.generic)

# The others wait while the first operates, evaluates and writes: minutes, and nobody knows how
# many. Who waits by gloo for a process that has ended learns of it at once, whatever the limit;
# among GPUs gradients go by NCCL, where torchrun ends all processes soon after one has.
PATIENCE = timedelta(hours=12)
_groups = iter(range(2**31))


class LostError(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


class DriftError(RuntimeError):
    """The processes of the run no longer have the same model."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. Every process has to make the same calls in turn."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that operates, evaluates and writes."""
        return self.rank == 0

    def shard(self, rows: NDArray[Rows]) -> NDArray[Rows]:
        """Return this process's share of a batch's rows: the rank-th of as many equal parts."""
        n = len(rows) // self.count
        return rows[self.rank * n : (self.rank + 1) * n]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their means over all processes: the same bits in each."""
        if self.count == 1:
            return
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _losing():
            dist.all_reduce(flat)
        flat /= self.count
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, parts, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def broadcast(self, value: Any = None) -> Any:
        """Return the first process's value, or raise its error; tensors are to be on the CPU."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _losing():
            dist.broadcast_object_list(box)
        if isinstance(box[0], Exception) and not self.is_first:
            raise box[0]
        return box[0]

    def gather(self, value: Any = None) -> list[Any]:
        """Return what all processes gave, by rank; none goes on before all are here."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with _losing():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreeing(self, *kinds: type[Exception]) -> Iterator[None]:
        """Let an error of these kinds in one process's body be one in all, with its message.

        Raises:
            Exception: the process's own, or else one of the first kind for that of another.
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
    def telling(self, *kinds: type[Exception]) -> Iterator[None]:
        """Let an error of these kinds in the first process's body be what the others are told."""
        try:
            yield
        except kinds as error:
            self.broadcast(type(error)(str(error)))
            raise

    @contextmanager
    def together(self, *alike: type[BaseException]) -> Iterator[None]:
        """Leave the body together, also by errors of kinds that all processes raise alike.

        What started the processes ends all of them soon after one has ended with an error: until
        the first has written what it has to write, the others therefore stay.
        """
        try:
            yield
        except alike:
            with suppress(LostError):  # the error is what is to be told
                self.gather()
            raise
        self.gather()


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Let this process reach the others of its run while the body runs.

    Only the first is stopped by a signal, and tells the others when to: whoever started them sends
    it to all. A group of processes that exists already is used, and left as it is.
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
    # A second group of the same processes would trip over what the first left in the store.
    store = PrefixStore(f"avatarl-{next(_groups)}", common)
    # Gradients go from GPU to GPU; all else is little, and waits on the CPU without spinning.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        with _deaf(not ranks.is_first):
            yield ranks
    finally:
        dist.destroy_process_group()


def average_gradients(ranks: Ranks, model: nn.Module, readings: Tensor) -> None:
    """Average a model's gradients, and numbers that go with them, over all processes, in place."""
    # One sum of everything, not DistributedDataParallel: that wraps a forward, which rollouts,
    # theaters and the optimizer would have to know; what its overlap hides is little here. With
    # the readings in it, a loss that is no number in one process is none in all.
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    ranks.average([*grads, readings])


def share_edits(ranks: Ranks, model: nn.Module, operator: Operator | None) -> None:
    """Tell the others which weights an operation has changed for good; None for no operation."""
    if ranks.count == 1:
        return
    edited = {id(p) for p in (operator.parameters() if operator is not None else ())}
    ranks.broadcast(on_cpu({name: p for name, p in model.named_parameters() if id(p) in edited}))


def take_edits(ranks: Ranks, model: nn.Module) -> bool:
    """Give a model the very bits that the first process shared; return whether there were any.

    Optimizers stay as they are.
    """
    edits: dict[str, Tensor] = ranks.broadcast()
    if not edits:
        return False
    with SurgicalTheater(model, list(edits)) as theater:
        for name, weight in edits.items():
            theater.write(model.get_parameter(name), weight)
        theater.commit()
    return True


def require_same(ranks: Ranks, model: nn.Module) -> None:
    """Make sure that all processes have the same weights, to the last bit.

    Raises:
        DriftError: in every process, if one of them has others.
    """
    if ranks.count == 1:
        return
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    if len(set(ranks.gather(digest.digest()))) > 1:
        raise DriftError(
            "weights must be the same in every process, got others: "
            "processors of several kinds round differently"
        )


def on_cpu(state: Any) -> Any:
    """Copy a tree of dicts and lists with the tensors in it on the CPU, as plain tensors."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, list) else state


def _import_before_a_group_exists() -> None:
    """Import `torch.distributed.nn.functional` before the default process group exists.

    Its functions have the default group as a default argument, so importing it later keeps a
    reference to the group until the process ends. Compiled optimizers import it. A group that is
    still referenced outlives `destroy_process_group` with its threads; if one of them frees a
    tensor while Python shuts down, the process ends with SIGABRT.
    """
    import torch.distributed.nn.functional  # noqa: F401


@contextmanager
def _deaf(deaf: bool) -> Iterator[None]:
    """Ignore the signals that ask to stop while the body runs, if so."""
    if not deaf or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _losing() -> Iterator[None]:
    """Say in our words that a process is gone; torch has one kind of error for it and the rest."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostError(f"another process of this run cannot be reached: {reason}") from error


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
