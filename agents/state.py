"""States: trees of dicts and lists whose leaves are tensors, arrays, numbers, strings and None.

Learners, surgeons and loggers return them from `get_state`; checkpoints store them and ranks
exchange them as JSON values beside a flat dict of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Any]

_PLACE = "$tensor"


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into JSON values and tensors by path; `unflatten` joins them.

    Arrays become tensors, tuples become lists. Tensors are copied to the CPU.
    """
    tensors: dict[str, Tensor] = {}
    return _take(state, "", tensors), tensors


def unflatten(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that `flatten` split.

    Raises:
        KeyError: if a tensor is missing.
    """
    if isinstance(values, dict):
        if values.keys() == {_PLACE}:
            return tensors[values[_PLACE]]
        return {key: unflatten(item, tensors) for key, item in values.items()}
    if isinstance(values, list):
        return [unflatten(item, tensors) for item in values]
    return values


def _take(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, order="C"))
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_PLACE: path}
    if isinstance(value, Mapping):
        return {key: _take(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value.item() if isinstance(value, np.generic) else value
