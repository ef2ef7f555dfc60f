"""Many operations in one forward: the operators' edits, applied to the rows of a batch instead.

With N operations on a batch of N * M rows, rows `i * M ... (i + 1) * M - 1` pass through the
model as operation i would have left it. No parameter is touched or copied: the edits act on what
the edited modules read and make (the idea of batched low-rank perturbations, EGGROLL, arXiv
2511.16652, and of batched adapters, S-LoRA, arXiv 2311.03285).

Shapes: N operations, M rows each, R = M * tokens, H heads, D head dim, F the width on a
projection's other side, r rank, A coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avatarl_env.surgery.projections import Projection


class RowEdit(NamedTuple):
    """What an operation does to one module's rows; both functions see rows grouped by operation."""

    module: nn.Module
    """Batch first: its input is (N * M, ..., channels)."""
    before: Callable[[Tensor], Tensor] | None = None
    """Maps the module's input (N, R, in) to the input that it gets instead."""
    after: Callable[[Tensor, Tensor], Tensor] | None = None
    """Maps its input and output, (N, R, in) and (N, R, out), to the output given instead."""


@runtime_checkable
class Overlayable(Protocol):
    """An operator that can act on rows."""

    def row_edits(self, coefficients: ArrayLike) -> Iterable[RowEdit]:
        """Return the edits that `coefficients` (N, A) stand for, for the weights as they are."""


def scale_heads(projection: Projection, gains: Tensor) -> RowEdit:
    """Multiply each head's channels, of the side that the heads are on, by `gains` (N, H)."""
    factor = gains.to(projection.weight)[:, None, :, None]  # (N, 1, H, 1)

    def scale(rows: Tensor) -> Tensor:
        projection.heads(rows).mul_(factor)
        return rows

    if projection.reads_heads:
        return RowEdit(projection.module, before=lambda read: scale(read.clone()))
    return RowEdit(projection.module, after=lambda read, made: scale(made))


def scale_made(module: nn.Module, gains: Tensor) -> RowEdit:
    """Multiply the module's whole output by `gains` (N,)."""
    factor = gains.to(module.weight)[:, None, None]  # type: ignore[arg-type]
    return RowEdit(module, after=lambda read, made: made.mul_(factor))


def add_low_rank(projection: Projection, left: Tensor, middle: Tensor, right: Tensor) -> RowEdit:
    """Act as if `left @ diag(middle[i]) @ right` were added to the projection's matrix.

    Args:
        projection: (F, H * D) in the orientation of `Projection.matrix`.
        left: (F, r).
        middle: (N, r).
        right: (r, H * D).
    """
    left, middle, right = (x.to(projection.weight) for x in (left, middle[:, None], right))

    def after(read: Tensor, made: Tensor) -> Tensor:
        if projection.reads_heads:
            heads = projection.heads(read).flatten(-2)  # (N, R, H * D)
            return made.add_((heads @ right.mT * middle) @ left.mT)
        change = (read @ left * middle) @ right  # (N, R, H * D)
        heads = projection.heads(made)
        heads.add_(change.view_as(heads))
        return made

    return RowEdit(projection.module, after=after)


class Overlay:
    """Context manager: inside, forwards of the model see N operations at once.

    ::

        with Overlay(operator, coefficients):  # (N, A)
            logits = model(tokens)  # (N * M, T): M rows for each operation
        # no weight has changed at any time

    Cached generation works as it is, ours and that of transformers. Operations are relative to the
    weights at entry, so inside a theater to the operated ones. Overlays of one model nest: each is
    made from the weights, which the others do not change. Modules that torch.compile compiled
    before do not notice an overlay; that is an error on exit. A backward that computes activations
    anew (checkpointing) belongs inside.
    """

    def __init__(self, operator: Overlayable, coefficients: ArrayLike) -> None:
        """Choose the operations; nothing is computed and no hook set before entry.

        Args:
            operator: one that has `row_edits`; all of ours have.
            coefficients: (N, A), N >= 1.

        Raises:
            TypeError: if the operator has no `row_edits`.
            ValueError: if the coefficients have another shape.
        """
        if not isinstance(operator, Overlayable):
            raise TypeError(f"operator must have row_edits, got {type(operator).__name__}")
        shape = np.shape(coefficients)
        if len(shape) != 2 or shape[0] < 1:
            raise ValueError(f"coefficients must have shape (N, A) with N >= 1, got {shape}")
        self._operator = operator
        self._coefficients = coefficients
        self._n: int = shape[0]
        self._edits: tuple[RowEdit, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._fired: set[int] = set()
        self._is_open = False

    def __enter__(self) -> Self:
        """Make the edits and set the hooks.

        Raises:
            RuntimeError: if this overlay is open already.
            ValueError: if the operator has another number of coefficients, or one is not finite.
        """
        if self._is_open:
            raise RuntimeError("this Overlay is open already; to nest, make another")
        self._edits = tuple(self._operator.row_edits(self._coefficients))
        self._fired.clear()
        try:
            for index, edit in enumerate(self._edits):
                self._set_hooks(index, edit)
        except BaseException:
            self._close()
            raise
        self._is_open = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks.

        Raises:
            RuntimeError: if the body ended well but an edited module was never called, so that the
                body did not compute the operations.
        """
        self._close()
        edits, self._edits = self._edits, ()
        missed = [edit for index, edit in enumerate(edits) if index not in self._fired]
        if missed and exc_type is None:
            kinds = ", ".join(sorted({type(edit.module).__name__ for edit in missed}))
            raise RuntimeError(
                f"the overlay never took effect on {len(missed)} of {len(edits)} places ({kinds}): "
                "no forward went through these modules, or the model bypasses them or was "
                "compiled before"
            )

    def _close(self) -> None:
        # From here on hooks do nothing, wherever they are: a deepcopy of the model keeps them.
        self._is_open = False
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _set_hooks(self, index: int, edit: RowEdit) -> None:
        """Set the hooks of one edit, which only act while the overlay has handles."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if edit.before is None or not self._handles:
                return None
            self._fired.add(index)
            read = _input(args, kwargs)
            edited = edit.before(self._grouped(read)).reshape(read.shape)
            if args:
                return (edited, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): edited}

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tensor
        ) -> Tensor | None:
            if edit.after is None or not self._handles:
                return None
            self._fired.add(index)
            read = self._grouped(_input(args, kwargs))
            return edit.after(read, self._grouped(made)).reshape(made.shape)

        module = edit.module
        if edit.before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if edit.after is not None:
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _grouped(self, rows: Tensor) -> Tensor:
        """View (N * M, ..., channels) as (N, R, channels)."""
        if rows.size(0) % self._n:
            raise ValueError(
                f"the batch must hold as many rows for each of {self._n} operations, "
                f"got {rows.size(0)} rows"
            )
        return rows.reshape(self._n, rows.shape[:-1].numel() // self._n, rows.size(-1))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a module's first argument, passed by position or by keyword."""
    read: Tensor = args[0] if args else next(iter(kwargs.values()))
    return read
