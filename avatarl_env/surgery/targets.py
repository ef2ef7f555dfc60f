"""Find the attention layers of a causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import overload

from torch import Tensor, nn

from avatarl_env.errors import check_layers
from avatarl_env.surgery.layouts import LAYOUTS, layout_of
from avatarl_env.surgery.parameters import storage_address
from avatarl_env.surgery.projections import AttentionTarget


class Targets(Sequence[AttentionTarget]):
    """Attention layers of a model, in order, and the model they belong to."""

    def __init__(self, model: nn.Module, targets: Iterable[AttentionTarget]) -> None:
        """Combine attention layers of `model`.

        Raises:
            ValueError: if there are none, or one shares a weight with another layer or module of
                the model, so that an operation would change both.
        """
        self.model = model
        self._targets = tuple(targets)
        if not self._targets:
            raise ValueError("targets must hold at least one attention layer, got none")
        _check_unshared(model, self._targets)

    @overload
    def __getitem__(self, index: int) -> AttentionTarget: ...
    @overload
    def __getitem__(self, index: slice) -> Targets: ...
    def __getitem__(self, index: int | slice) -> AttentionTarget | Targets:
        if isinstance(index, slice):
            return Targets(self.model, self._targets[index])
        return self._targets[index]

    def __len__(self) -> int:
        return len(self._targets)


def find_targets(
    model: nn.Module, layers: int | str | Iterable[int | str] | None = None
) -> Targets:
    """Return attention layers of `model`, from first to last.

    Args:
        model: a causal language model with attention modules of a class in `LAYOUTS`.
        layers: which ones: numbers (from 0; -1 is the last), names of attention modules or globs
            of them (`"*.h.[0-3].attn"`), one or several; default all.

    Raises:
        ValueError: if the model has no attention of a known kind, `layers` is of another type or
            an entry matches nothing (the message lists the layers), a layout does not fit its
            module, or a layer shares weights.
    """
    found = [
        (name, module, layout)
        for name, module in model.named_modules()
        if (layout := layout_of(name, module)) is not None
    ]
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"model must have attention of a known kind ({', '.join(LAYOUTS)}), got {kinds}; "
            "describe another with LAYOUTS[class name] = Layout(...)"
        )
    chosen = _chosen(layers, [name for name, _, _ in found])
    return Targets(
        model,
        (
            layout.target(name, number, module)
            for number, (name, module, layout) in enumerate(found)
            if number in chosen
        ),
    )


def _chosen(layers: object, names: list[str]) -> set[int]:
    """Return the numbers of the layers that `layers` selects."""
    if layers is None:
        return set(range(len(names)))
    return {number for entry in check_layers(layers) for number in _matches(entry, names)}


def _matches(entry: int | str, names: list[str]) -> list[int]:
    """Return the numbers of the layers that one entry of `layers` selects."""
    if isinstance(entry, str):
        matched = [i for i, name in enumerate(names) if name == entry or fnmatchcase(name, entry)]
    else:
        matched = [range(len(names))[entry]] if -len(names) <= entry < len(names) else []
    if not matched:
        known = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
        raise ValueError(
            f"layers must match attention layers of the model, got {entry!r} ({known})"
        )
    return matched


def _check_unshared(model: nn.Module, targets: Iterable[AttentionTarget]) -> None:
    """Refuse weights that a target shares with another target or module of the model."""
    owners: dict[object, list[tuple[str, Tensor]]] = {}  # by storage; without one, by parameter
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(storage_address(p) or p, []).append((name, p))
    for target in targets:
        for p in target.parameters():
            others = owners.setdefault(storage_address(p) or p, [])
            sharing = [name for name, other in others if _overlap(p, other)]
            if len(sharing) > 1:
                raise ValueError(
                    "targets must have weights of their own, got "
                    f"{target.name}, whose {tuple(p.shape)} belongs to {sharing}"
                )
            others.append((target.name, p))


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two parameters on one storage have elements in common."""
    if one is other:
        return True
    start, others = one.data_ptr(), other.data_ptr()
    if not (one.is_contiguous() and other.is_contiguous()):
        return start == others  # columns of one matrix lie between each other
    return start < others + other.nbytes and others < start + one.nbytes
