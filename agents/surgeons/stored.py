"""Read stored Stable-Baselines3 algorithms without running code from their files.

`BaseAlgorithm.load` unpickles the zip's `data`. This module reads only tensors, of networks and
optimizers, and only if their layout is that of the algorithm itself.
"""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer

ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
VARIABLES = "pytorch_variables"


def read_into(model: BaseAlgorithm, path: Path) -> None:
    """Load the networks and optimizers of a saved algorithm; optimizer settings are not changed.

    Args:
        model: a new algorithm of the same kind.
        path: zip file of `BaseAlgorithm.save`.

    Raises:
        Exception: of any type if the file is damaged, compressed, or holds anything but tensors of
            the algorithm's layout; the algorithm is unchanged then.
    """
    names, variables = model._get_torch_save_params()
    parts = {name: attrgetter(name)(model) for name in names}
    tensors = {name: attrgetter(name)(model) for name in variables}
    found = _read(path, [*names, VARIABLES] if variables else names)
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            found[name] = _checked_optimizer(found[name], part, name)
        else:
            check_like(found[name], part.state_dict(), name)
    if variables:
        check_like(found[VARIABLES], tensors, VARIABLES)
    for name, part in parts.items():
        part.load_state_dict(found[name])
    for name, tensor in tensors.items():
        tensor.data.copy_(found[VARIABLES][name])


def check_like(found: Any, own: Any, where: str) -> None:
    """Raise a ValueError unless `found` has the layout of `own` and finite numbers only.

    Args:
        found: nested mappings with tensors, arrays, lists and numbers as leaves.
        own: has the expected keys, types and shapes.
        where: name of `found`, for the message.
    """
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping) or found.keys() != own.keys():
            raise ValueError(f"{where} must hold {sorted(map(str, own))}")
        for key in own:
            check_like(found[key], own[key], f"{where}/{key}")
        return
    if _form(found) != _form(own):
        raise ValueError(f"{where} must be {_form(own)}, got {_form(found)}")
    is_finite = found.isfinite() if isinstance(found, Tensor) else np.isfinite(found)
    if not is_finite.all():
        raise ValueError(f"{where} must be finite")


def filled(buffer: ReplayBuffer) -> dict[str, Any]:
    """Return the contents of a replay buffer."""
    arrays = {name: getattr(buffer, name)[: buffer.size()] for name in ARRAYS}
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def fill(buffer: ReplayBuffer, stored: Mapping[str, Any]) -> None:
    """Restore the contents of a replay buffer.

    Raises:
        ValueError: if they do not fit or are incomplete; the buffer is unchanged then.
    """
    full, pos, size = stored["full"], stored["pos"], buffer.buffer_size
    if type(full) is not bool or type(pos) is not int or not 0 <= pos < size:
        raise ValueError(
            f"replay buffer must have a position from 0 to {size - 1}, "
            f"got {pos!r:.40}, full: {full!r:.40}"
        )
    arrays = {name: np.asarray(stored["arrays"][name]) for name in ARRAYS}
    places = {name: getattr(buffer, name)[: size if full else pos] for name in ARRAYS}
    for name, place in places.items():
        if _form(arrays[name]) != _form(place):
            raise ValueError(
                f"replay buffer's {name} must be {_form(place)}, got {_form(arrays[name])}"
            )
    for name, place in places.items():
        place[:] = arrays[name]
    buffer.pos, buffer.full = pos, full


def _read(path: Path, names: list[str]) -> dict[str, Any]:
    """Return the named parts of a zip file: tensors and plain containers only."""
    with zipfile.ZipFile(path) as archive:
        _refuse_compressed(archive)
        contents = {name: archive.read(f"{name}.pth") for name in names}
    for content in contents.values():
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch writes a zip within the zip
            _refuse_compressed(archive)
    return {
        name: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        for name, content in contents.items()
    }


def _refuse_compressed(archive: zipfile.ZipFile) -> None:
    """Refuse compressed entries, which could be larger than the file itself."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename} must not be compressed")


def _form(leaf: Any) -> str:
    """Describe a leaf's type and shape."""
    if isinstance(leaf, Tensor | np.ndarray):
        layout = leaf.layout if isinstance(leaf, Tensor) else "an array"
        return f"{layout} of shape {tuple(leaf.shape)} and type {leaf.dtype}"
    return f"{type(leaf).__name__} of shape {np.shape(leaf)}"


def _checked_optimizer(found: Any, optimizer: torch.optim.Optimizer, where: str) -> dict[str, Any]:
    """Return an optimizer's state: the stored moments with the optimizer's own settings."""
    moments, layout = found["state"], _layout(optimizer)
    # Fewer are allowed: parameters without a gradient have no moments.
    if unknown := moments.keys() - layout.keys():
        raise ValueError(f"{where} must have {len(layout)} parameters, got {min(unknown)!r}")
    check_like(moments, {number: layout[number] for number in moments}, where)
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}


def _layout(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Return the state that an optimizer has after a step, by parameter number."""
    stepped = copy.deepcopy(optimizer)  # copies the parameters too
    for group in stepped.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    stepped.step()
    layout: dict[int, Any] = stepped.state_dict()["state"]
    return layout
