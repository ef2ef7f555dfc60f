"""Language models in folders: save them in our format, load them in ours or transformers'.

Our format is a safetensors file with the weights, and JSON with sizes and vocabulary. The format of
transformers is what `save_pretrained` of a model and of its tokenizer writes. Both are data: no
code in a folder is run, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avatarl_env.errors import check_choice
from avatarl_env.files import read_json, read_regular, write_atomically
from avatarl_env.lm.gpt import GPT, GPTConfig
from avatarl_env.lm.hub import HUB_CONFIG, HubLM, load_hub
from avatarl_env.lm.protocols import Tokenizer
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.memory import check_memory, memory_limit

WEIGHTS, ABOUT = "model.safetensors", "model.json"
BUNDLED = "bundled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUN_FILES = ("config.json", "metrics.jsonl")
"""Files that every run folder has."""


class StoredModel(NamedTuple):
    """Result of `load_model`."""

    model: GPT | HubLM
    tokenizer: Tokenizer
    about: dict[str, Any]
    """Metadata stored with the model, `corpus` and `made_by` at least; {} for transformers."""


def save_model(folder: Path, model: GPT, tokenizer: CharTokenizer, about: dict[str, Any]) -> None:
    """Write a model and its tokenizer.

    Args:
        folder: created if it does not exist.
        model: its weights are stored in their precision, tied ones once.
        tokenizer: the model's.
        about: metadata for JSON; `corpus` names the training text, `made_by` the command.

    Raises:
        TypeError: if JSON cannot represent `about`; nothing is written then.
    """
    from safetensors.torch import save

    sizes = {name: getattr(model.config, name) for name in GPTConfig.__dataclass_fields__}
    content = {**about, "gpt": sizes, "tokenizer": tokenizer.to_dict()}
    text = json.dumps(content, indent=2) + "\n"  # may fail, so before anything is written
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save(weights))
    write_atomically(folder / ABOUT, text)


def model_folder(lm: str) -> Path:
    """Return the folder of the model `lm`: the bundled patient, a run, or a model folder.

    Raises:
        ValueError: if there is no model.
    """
    if lm == BUNDLED:
        return Path(str(files("avatarl_env").joinpath("bundled")))
    checkpoints = Path(lm) / "checkpoints"
    for folder in (checkpoints / "final", Path(lm)):
        if _is_ours(folder) or (os.path.isfile(folder / HUB_CONFIG) and not _is_run(folder)):
            return folder
    if not is_unfinished(Path(lm)):
        raise ValueError(
            f"lm must be {BUNDLED!r}, a finished run's folder, one with {ABOUT} and {WEIGHTS} or "
            f"one that transformers saved with {HUB_CONFIG}, got {lm!r}"
        )
    known = sorted(path.name for path in checkpoints.glob("step-*"))
    advice = "it has no checkpoint yet"
    if known:
        advice = (
            f"its last checkpoint is {known[-1]}, from which `avatarl sample` generates text and "
            "`train.py --resume` resumes"
        )
    if _is_ours(checkpoints / "best"):
        advice += f"; its best model so far is {str(checkpoints / 'best')!r}"
    raise ValueError(f"lm must be a finished run's folder, {lm!r} has not finished: {advice}")


def load_model(lm: str = BUNDLED) -> StoredModel:
    """Load a stored model, on the CPU and in eval mode.

    Args:
        lm: `"bundled"`, a run folder, a folder that `save_model` wrote, or one that transformers
            saved. A folder in both formats is read in ours.

    Raises:
        ValueError: if there is no model, it is damaged, or its files do not fit together.
    """
    folder = model_folder(lm)
    if _is_ours(folder):
        return _load_ours(folder)
    model, tokenizer = load_hub(folder)
    return StoredModel(model, tokenizer, {})


def move_model(model: nn.Module, device: str, dtype: str | None = None) -> None:
    """Move a model to a device and convert its precision, in place.

    Args:
        model: the model.
        device: `"cpu"`, `"cuda"`, ...
        dtype: a name in `DTYPES`; default the current precision.

    Raises:
        ValueError: if the dtype is unknown, or the device is not available.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    model.to(device=find_device(device), dtype=None if dtype is None else DTYPES[dtype])


def find_device(name: str) -> torch.device:
    """Return a device by name, after a test allocation.

    Raises:
        ValueError: if the device is not available.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on "meta", which holds no values
    except torch.OutOfMemoryError:  # a RuntimeError, but the device is there
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch has, got {name!r}: {reason}") from error
    return device


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model's parameters by name, in place.

    Raises:
        ValueError: if one is missing or has another shape; the model is unchanged then.
    """
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if name not in weights:
            raise ValueError(f"weights must have {name!r}, got none")
        if weights[name].shape != p.shape:
            raise ValueError(
                f"weights of {name!r} must have shape {tuple(p.shape)}, "
                f"got {tuple(weights[name].shape)}"
            )
    for name, p in parameters.items():
        p.copy_(weights[name])


def is_unfinished(folder: Path) -> bool:
    """Return whether this is the folder of a run that has no final model yet."""
    return _is_run(folder) and not _is_ours(folder / "checkpoints" / "final")


def build_stored(folder: Path, config: GPTConfig, weights: Mapping[str, Tensor], about: str) -> GPT:
    """Build a model from stored weights, in eval mode.

    Args:
        folder: of the weights, for messages.
        config: the model's sizes, checked against the weights before anything is built.
        weights: by name.
        about: name of the file with the sizes, for messages.

    Raises:
        ValueError: if the weights do not have these sizes, or the model does not fit the memory.
    """
    n_stored = sum(weight.numel() for weight in weights.values())
    if n_stored != config.n_parameters:
        raise ValueError(
            f"lm must hold the {config.n_parameters:,} weights that its {about} describes, "
            f"{folder} has {n_stored:,}"
        )
    kinds = sorted({str(w.dtype) for w in weights.values() if not w.is_floating_point()})
    if kinds:
        raise ValueError(f"lm must hold floating point weights, {folder} has {', '.join(kinds)}")
    check_memory("lm", config.building_bytes)
    model = GPT(config)
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {error}") from error
    return model.eval()


def _is_ours(folder: Path) -> bool:
    # Not Path.is_file, which raises an error for a name that is too long.
    return os.path.isfile(folder / ABOUT) and os.path.isfile(folder / WEIGHTS)


def _is_run(folder: Path) -> bool:
    return all(os.path.isfile(folder / name) for name in RUN_FILES)


def _load_ours(folder: Path) -> StoredModel:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        about = read_json(folder / ABOUT)
        config = GPTConfig(**about.pop("gpt"))
        tokenizer = CharTokenizer.from_dict(about.pop("tokenizer"))
        # Not safetensors' load_file, which cannot open files whose names are not UTF-8.
        weights = load(read_regular(folder / WEIGHTS, memory_limit()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"lm must have as many characters as its vocab_size, {config.vocab_size}, "
            f"{folder} has {tokenizer.vocab_size}"
        )
    return StoredModel(build_stored(folder, config, weights, ABOUT), tokenizer, about)
