"""Many operations in one forward: the edits act on the rows of a batch instead of the weights.

With N operations on a batch of N * M rows, rows `i * M ... (i + 1) * M - 1` pass through the
model that operation i would have made. No parameter is touched or copied: the edits act on the
inputs and outputs of the edited modules (the idea of batched low-rank perturbations, EGGROLL, arXiv
2511.16652, and of batched adapters, S-LoRA, arXiv 2311.03285).

Shapes: N operations, M rows each, R = M * tokens, H heads, D head dim, F the width on a
projection's other side, r rank, A coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avatarl_env.surgery.projections import Projection


class RowEdit(NamedTuple):
    """What an operation does to one module's rows; both functions get rows grouped by operation."""

    module: nn.Module
    """Batch first: its input is (N * M, ..., channels)."""
    before: Callable[[Tensor], Tensor] | None = None
    """Maps the module's input (N, R, in) to the one that replaces it."""
    after: Callable[[Tensor, Tensor], Tensor] | None = None
    """Maps its input (N, R, in) and output (N, R, out) to the output that replaces it."""


@runtime_checkable
class Overlayable(Protocol):
    """An operator that can act on rows."""

    def row_edits(self, coefficients: ArrayLike) -> Iterable[RowEdit]:
        """Return the edits of the current weights that `coefficients` (N, A) stand for."""


def scale_heads(projection: Projection, gains: Tensor) -> RowEdit:
    """Multiply the channels of each head by its gain, `gains` (N, H)."""
    factor = gains.to(projection.weight)[:, None, :, None]  # (N, 1, H, 1)

    def scale(rows: Tensor) -> Tensor:
        projection.heads(rows).mul_(factor)
        return rows

    if projection.reads_heads:
        return RowEdit(projection.module, before=lambda x: scale(x.clone()))
    return RowEdit(projection.module, after=lambda x, y: scale(y))


def scale_output(module: nn.Module, gains: Tensor) -> RowEdit:
    """Multiply the module's whole output by `gains` (N,)."""
    factor = gains.to(module.weight)[:, None, None]  # type: ignore[arg-type]
    return RowEdit(module, after=lambda x, y: y.mul_(factor))


def add_low_rank(projection: Projection, left: Tensor, middle: Tensor, right: Tensor) -> RowEdit:
    """Act as if `left @ diag(middle[i]) @ right` were added to the projection's matrix.

    Args:
        projection: (F, H * D) in the orientation of `Projection.matrix`.
        left: (F, r).
        middle: (N, r).
        right: (r, H * D).
    """
    left, middle, right = (x.to(projection.weight) for x in (left, middle[:, None], right))

    def after(x: Tensor, y: Tensor) -> Tensor:
        if projection.reads_heads:
            heads = projection.heads(x).flatten(-2)  # (N, R, H * D)
            return y.add_((heads @ right.mT * middle) @ left.mT)
        change = (x @ left * middle) @ right  # (N, R, H * D)
        heads = projection.heads(y)
        heads.add_(change.view_as(heads))
        return y

    return RowEdit(projection.module, after=after)


class Overlay:
    """Context manager: inside, forwards of the model see N operations at once.

    ::

        with Overlay(operator, coefficients):  # (N, A)
            logits = model(tokens)  # (N * M, T): M rows for each operation
        # no weight has changed at any time

    Cached generation works inside, ours and that of transformers. Operations are relative to the
    weights at entry; inside a theater, to the operated ones. Overlays of one model nest: each is
    made from the weights, which the others do not change. Modules that torch.compile has compiled
    before ignore an overlay, which is an error on exit. A backward that recomputes activations
    (checkpointing) belongs inside.
    """

    def __init__(self, operator: Overlayable, coefficients: ArrayLike) -> None:
        """Choose the operations; nothing is computed and no hook is set before entry.

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

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Remove the hooks.

        Raises:
            RuntimeError: if the body raised nothing but an edited module was never called, so that
                the body did not perform the operations.
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
        # Hooks do nothing without handles: a deepcopy of the model in the body keeps its hooks.
        self._is_open = False
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _set_hooks(self, index: int, edit: RowEdit) -> None:
        """Set the hooks of one edit, which act only while the overlay has handles."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if edit.before is None or not self._handles:
                return None
            self._fired.add(index)
            x = _input(args, kwargs)
            edited = edit.before(self._grouped(x)).reshape(x.shape)
            if args:
                return (edited, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): edited}

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
        ) -> Tensor | None:
            if edit.after is None or not self._handles:
                return None
            self._fired.add(index)
            x = self._grouped(_input(args, kwargs))
            return edit.after(x, self._grouped(y)).reshape(y.shape)

        module = edit.module
        if edit.before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if edit.after is not None:
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _grouped(self, rows: Tensor) -> Tensor:
        """View (N * M, ..., channels) as (N, R, channels)."""
        if rows.size(0) % self._n:
            raise ValueError(
                f"the batch must have the same number of rows for each of {self._n} operations, "
                f"got {rows.size(0)} rows"
            )
        return rows.reshape(self._n, rows.shape[:-1].numel() // self._n, rows.size(-1))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a module's first argument, passed by position or by keyword."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
