"""What a folder of transformers may hold, checked before transformers opens it.

A folder is data. Nothing in it may make transformers run code, open a network connection, read
files elsewhere, or build more than there is room for.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

from avatarl_env.files import parse_json, read_regular
from avatarl_env.memory import check_memory

HUB_CONFIG = "config.json"
HUB_WEIGHTS, HUB_INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

_READ = (HUB_CONFIG, "tokenizer_config.json", "generation_config.json")

MOST_HEADER = 10**8
"""Bytes of a header, as safetensors itself has it."""
MOST_JSON = 2**28
"""Bytes of a file of JSON: the largest tokenizers have a tenth of that."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DIMENSIONS = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
)
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_COUNTS = re.compile(r"layers|_layer$|experts|blocks|depth$|_cycles$")
"""Other settings that may say how often a part is built: decoder_layers, num_local_experts, ..."""
_USUAL = 1024
"""What such a setting may say in any model: many are in a configuration without being used."""
_FOREIGN = re.compile(r"\.(bin|pt|pth|pkl|ckpt|gguf|h5|msgpack)$|^shard-\d+-model-.*\.safetensors$")


class StoredTensor(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return what the header of a safetensors file says; the tensors are not read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a safetensors file.
    """
    if not path.is_file():  # opening a pipe takes for ever
        raise ValueError(f"it must have a regular file {path.name}, got none")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, path.stat().st_size):
            raise ValueError(f"{path.name} must begin with a header of safetensors, got none")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} must begin with an object, got {header!r:.40}")  # noqa: TRY004
    header.pop("__metadata__", None)
    return {name: _described(name, entry) for name, entry in header.items()}


def check_hub_folder(folder: Path) -> int:
    """Refuse a folder that is not plain weights, sizes and a tokenizer.

    Returns:
        Tensors in its files.

    Raises:
        OSError: if a file cannot be read.
        ValueError: says what is in the folder that may not be there.
    """
    for entry in folder.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ValueError(f"it must hold files, got {entry.name}, a pipe or a device")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            "it must be a whole model, got an adapter (adapter_config.json): merge it into its "
            "model first"
        )
    content = {name: _read_object(folder / name) for name in _READ if (folder / name).exists()}
    parts = list(_objects(content[HUB_CONFIG]))
    for key in ("quantization_config", "transformers_weights"):
        if any(part.get(key) is not None for part in parts):
            raise ValueError(
                f"it must have plain weights in {HUB_WEIGHTS}, got {key} in its {HUB_CONFIG}"
            )
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        tensors |= stored_tensors(file)
    for part in parts:
        _check_sizes(part, tensors)
    return len(tensors)


def check_skeleton(config: Any, n_stored: int) -> None:
    """Build the model without weights, which takes no memory, and ask whether it has room.

    Args:
        config: of transformers.
        n_stored: tensors in the folder. Nothing is built of many times as many modules.

    Raises:
        ValueError: if the weights would not fit the memory, or are fewer than the model has.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights(), _at_most(_USUAL + 20 * n_stored):
        skeleton = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    parts = (*skeleton.parameters(), *skeleton.buffers())
    check_memory("its weights", sum(part.numel() for part in parts) * 2)  # two bytes at least


@contextmanager
def _at_most(n_parts: int) -> Iterator[None]:
    """Let this thread build so many modules and parameters in the body, and no more.

    It holds whatever the setting is called that asks for more.
    """
    from torch.nn.modules import module

    thread, counter = get_ident(), itertools.count(1)

    def count(*_: object) -> None:
        if get_ident() == thread and next(counter) > n_parts:
            raise ValueError(
                f"its {HUB_CONFIG} must describe a model of the tensors in its files, got one of "
                f"more than {n_parts} parts"
            )

    with ExitStack() as stack:
        stack.callback(module.register_module_module_registration_hook(count).remove)
        stack.callback(module.register_module_parameter_registration_hook(count).remove)
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Let every request of huggingface_hub in the body fail: what is here has to do."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_regular(path, MOST_JSON))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold an object, got {content!r:.40}")  # noqa: TRY004
    return content


def _described(name: str, entry: Any) -> StoredTensor:
    """Return the shape and type of a tensor in the header of a safetensors file."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"tensor {name!r:.80} must have a shape, got {shape!r:.40}")
    return StoredTensor(tuple(shape), str(entry.get("dtype")))


def _objects(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings and those of the parts of a model: text_config, ..."""
    yield settings
    for value in settings.values():
        if isinstance(value, dict):
            yield from _objects(value)


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model.

    Raises:
        ValueError: if there are none, or they lie elsewhere.
    """
    foreign = sorted(entry.name for entry in folder.iterdir() if _FOREIGN.search(entry.name))
    taken = [name for name in foreign if name.startswith("shard-")]  # wins over all other files
    if (folder / HUB_WEIGHTS).is_file() and not taken:
        return [folder / HUB_WEIGHTS]
    if not (folder / HUB_INDEX).is_file() or taken:
        found = f"got {foreign[0]}" if foreign else "got neither"
        raise ValueError(f"it must have its weights in {HUB_WEIGHTS} or {HUB_INDEX}, {found}")
    parts = _read_object(folder / HUB_INDEX).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise ValueError(f"{HUB_INDEX} must hold a weight_map of file names, got none")
    for name in parts.values():
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name) or not _is_inside(folder, name):
            raise ValueError(f"{HUB_INDEX} must name files of its own folder, got {name!r}")
    return [folder / name for name in sorted(set(parts.values()))]


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a file lies in a folder, or where the cache of huggingface_hub keeps its files.

    There a snapshot is a folder of links, MODEL/snapshots/COMMIT/FILE to MODEL/blobs/SHA256.
    """
    home = folder.resolve()
    place = (folder / name).resolve().parent
    is_cache = home.parent.name == "snapshots" and place == home.parents[1] / "blobs"
    return place == home or is_cache


def _check_sizes(settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse sizes that are no sizes, or that the stored tensors cannot have."""
    longest = max((n for tensor in tensors.values() for n in tensor.shape), default=0)
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    # Rotary positions take no weights. Nobody has a model for more of them than weights and these.
    most = dict.fromkeys(_LAYERS, len(tensors)) | dict.fromkeys(_DIMENSIONS, longest)
    most |= dict.fromkeys(_POSITIONS, max(total, 2**30))
    for name in settings.keys() & most.keys():
        value = settings[name]
        if value is None or isinstance(value, list | dict):  # a list has one for each layer
            continue
        if type(value) is not int or not 1 <= value <= most[name]:
            raise ValueError(
                f"{name} must be an integer from 1 to {most[name]}, the most that its weights "
                f"allow, got {value!r:.40}"
            )
    most_parts = max(longest, len(tensors), _USUAL)
    for name, value in settings.items():
        if name not in most and _COUNTS.search(name) and type(value) is int and value > most_parts:
            raise ValueError(
                f"{name} must be at most {most_parts}, the most that its weights allow, "
                f"got {value!r:.40}"
            )
