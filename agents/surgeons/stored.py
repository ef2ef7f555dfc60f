"""What a Stable-Baselines3 surgeon stored, read without running any code that came with it.

`BaseAlgorithm.load` unpickles the zip's `data`. Here only the networks and optimizers are read,
as tensors, and only if each has the very layout that the algorithm itself has.
"""

from __future__ import annotations

import copy
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from avatarl_env.files import read_json

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
STATISTICS = ("mean", "var", "count", "return_mean", "return_var", "return_count")
ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
VARIABLES = "pytorch_variables"


def read_into(model: BaseAlgorithm, path: Path) -> None:
    """Give an algorithm the networks and optimizers that another of its kind saved.

    The optimizers' settings stay the algorithm's own.

    Args:
        model: as freshly built.
        path: the zip file of `BaseAlgorithm.save`.

    Raises:
        ValueError: if the file is damaged or compressed, or holds anything but tensors of the
            algorithm's layout; the algorithm is as it was then.
    """
    names, variables = model._get_torch_save_params()
    parts = {name: _part(model, name) for name in names}
    wanted = [*names, VARIABLES] if variables else names
    try:
        found = _read(path, wanted)
        states = {
            name: _checked_optimizer(found[name], part, name)
            if isinstance(part, torch.optim.Optimizer)
            else _checked(found[name], part.state_dict(), name)
            for name, part in parts.items()
        }
        tensors = {name: _part(model, name) for name in variables}
        if variables:
            _checked(found[VARIABLES], tensors, VARIABLES)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"surgeon must be stored as one of the same kind and size is, got {path}: {reason}"
        ) from error
    for name, part in parts.items():
        part.load_state_dict(states[name])
    for name, tensor in tensors.items():
        tensor.data.copy_(found[VARIABLES][name])


def filled(buffer: ReplayBuffer) -> dict[str, Any]:
    """Return what a replay buffer holds."""
    arrays = {name: getattr(buffer, name)[: buffer.size()] for name in ARRAYS}
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def fill(buffer: ReplayBuffer, stored: Mapping[str, Any]) -> None:
    """Let a replay buffer hold what another of its size held.

    Raises:
        ValueError: if it is of another size, or not whole.
    """
    full, pos = stored["full"], stored["pos"]
    size = buffer.buffer_size
    if type(full) is not bool or type(pos) is not int or not 0 <= pos < size:
        raise ValueError(
            f"replay buffer must have its next step at a position from 0 to {size - 1}, "
            f"got {pos!r:.40}, full: {full!r:.40}"
        )
    n = size if full else pos
    for name in ARRAYS:
        rows, goal = np.asarray(stored["arrays"][name]), getattr(buffer, name)
        if rows.shape != (n, *goal.shape[1:]) or rows.dtype != goal.dtype:
            raise ValueError(
                f"replay buffer's {name} must have shape {(n, *goal.shape[1:])} and type "
                f"{goal.dtype}, got {rows.shape} and {rows.dtype}"
            )
        goal[:n] = rows
    buffer.pos, buffer.full = pos, full


def read_normalisation(path: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the running statistics and counters in a file.

    Raises:
        ValueError: if the file cannot be read, or is of an earlier format or of a surgeon of other
            sizes.
    """
    try:
        content: dict[str, Any] = read_json(path)
        stored = {name: content["sizes"][name] for name in sizes} if "sizes" in content else None
        if stored == sizes:
            _check_normalisation(content, sizes["observation"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"surgeon must hold a readable {path.name}, got {path}: {reason}"
        ) from error
    if stored is None:
        raise ValueError(
            "surgeon must be of the present format, got one of an earlier format, which had to be "
            f"unpickled, in {path.parent}: train it anew"
        )
    if stored != sizes:
        raise ValueError(
            f"surgeon must be one for observations of {sizes['observation']} numbers and actions "
            f"of {sizes['action']}, got one for {stored['observation']} and {stored['action']} in "
            f"{path.parent}"
        )
    return content


def _read(path: Path, names: list[str]) -> dict[str, Any]:
    """Return the named parts of a zip file."""
    with zipfile.ZipFile(path) as archive:
        return {name: _load(_content(archive, f"{name}.pth")) for name in names}


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    if name not in archive.namelist():
        raise ValueError(f"it lacks {name}")
    _refuse_compressed(archive)
    return archive.read(name)


def _load(content: bytes) -> Any:
    """Return what torch saved; tensors and plain containers only."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # as torch writes it, a zip in the zip
        _refuse_compressed(archive)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _refuse_compressed(archive: zipfile.ZipFile) -> None:
    """Refuse entries that could be larger than the file they are in."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename} must not be compressed")


def _part(model: BaseAlgorithm, name: str) -> Any:
    """Return the module, optimizer or tensor of a dotted name."""
    part: Any = model
    for attribute in name.split("."):
        part = getattr(part, attribute)
    return part


def _checked(found: Any, own: Any, where: str) -> Any:
    """Return a tree of tensors and numbers if it is laid out like the algorithm's own.

    Raises:
        ValueError: if it is not, or a number in it is not finite.
    """
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.layout != torch.strided:
            raise ValueError(f"{where} must be a tensor, got {type(found).__name__}")
        if found.shape != own.shape or found.dtype != own.dtype:
            raise ValueError(
                f"{where} must have shape {tuple(own.shape)} and type {own.dtype}, "
                f"got {tuple(found.shape)} and {found.dtype}"
            )
        if not found.isfinite().all():
            raise ValueError(f"{where} must be finite")
        return found
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping) or found.keys() != own.keys():
            raise ValueError(f"{where} must hold {sorted(map(str, own))}")
        return {key: _checked(found[key], own[key], f"{where}/{key}") for key in own}
    if type(found) is not type(own):
        raise ValueError(f"{where} must be {type(own).__name__}, got {type(found).__name__}")
    return found


def _checked_optimizer(found: Any, optimizer: torch.optim.Optimizer, where: str) -> dict[str, Any]:
    """Return an optimizer's state: the stored moments under the optimizer's own settings."""
    layout, stored = _layout(optimizer), found["state"]
    if unknown := stored.keys() - layout.keys():  # who had no gradient yet has no state
        raise ValueError(f"{where} must know {len(layout)} parameters, got {min(unknown)!r}")
    state = {
        number: _checked(moments, layout[number], f"{where}/{number}")
        for number, moments in stored.items()
    }
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _layout(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Return the state that an optimizer has after a step, by the numbers of its parameters."""
    stepped = copy.deepcopy(optimizer)  # with parameters of its own
    for group in stepped.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    stepped.step()
    layout: dict[int, Any] = stepped.state_dict()["state"]
    return layout


def _check_normalisation(content: Mapping[str, Any], n_observed: int) -> None:
    """Raise a ValueError unless statistics and counters are numbers as a surgeon writes them."""
    for name in STATISTICS:
        shape = (n_observed,) if name in ("mean", "var") else ()
        values = np.asarray(content[name], dtype=np.float64)
        is_low = not name.endswith("mean") and (values < 0).any()
        if values.shape != shape or not np.isfinite(values).all() or is_low:
            raise ValueError(f"{name} must be finite and of shape {shape}, spreads not below 0")
    for name in COUNTERS:
        value = content["counters"][name]
        kind = float if name == "_current_progress_remaining" else int
        if type(value) is not kind or not math.isfinite(value) or (kind is int and value < 0):
            raise ValueError(f"{name} must be a number as a surgeon counts, got {value!r}")
