"""A language model in a folder: ours, or one of transformers.

Ours has its weights as safetensors, sizes and vocabulary as JSON. A folder of transformers is what
`save_pretrained` of a model and of its tokenizer wrote; it is read without a network, and code
that lies in it is not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avatarl_env.errors import check_choice
from avatarl_env.files import read_json, write_atomically
from avatarl_env.lm.gpt import GPT, GPTConfig, parameter_shapes
from avatarl_env.lm.hub import HubLM, HubTokenizer
from avatarl_env.lm.hub_folder import (
    HUB_CONFIG,
    HUB_VOCABULARIES,
    StoredTensor,
    check_hub_folder,
    check_skeleton,
    offline,
    stored_tensors,
)
from avatarl_env.lm.protocols import Tokenizer
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.memory import check_memory

WEIGHTS, ABOUT = "model.safetensors", "model.json"
BUNDLED = "bundled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUN_FILES = ("config.json", "metrics.jsonl")  # what every run's folder has from its start


class StoredModel(NamedTuple):
    """What `load_model` found."""

    model: GPT | HubLM
    tokenizer: Tokenizer
    about: dict[str, Any]
    """What its maker wrote beside it: `corpus` and `made_by` at least; nothing beside one of
    transformers."""


def save_model(folder: Path, model: GPT, tokenizer: CharTokenizer, about: dict[str, Any]) -> None:
    """Write a model into `folder`, made if need be.

    Args:
        folder: where to.
        model: its weights are stored as they are, tied ones once.
        tokenizer: stored beside them.
        about: JSON-able; `corpus` names the text it learned, `made_by` the command.
    """
    from safetensors.torch import save

    sizes = {name: getattr(model.config, name) for name in GPTConfig.__dataclass_fields__}
    content = {**about, "gpt": sizes, "tokenizer": tokenizer.to_dict()}
    text = json.dumps(content, indent=2) + "\n"  # before anything is written: this can fail
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save(weights))
    write_atomically(folder / ABOUT, text)


def model_folder(lm: str) -> Path:
    """Return the folder that `lm` means: the bundled patient, a run folder, or a model folder.

    Raises:
        ValueError: if there is no model.
    """
    if lm == BUNDLED:
        return Path(str(files("avatarl_env").joinpath("bundled")))
    final = Path(lm) / "checkpoints" / "final"
    for folder in (final, Path(lm)):
        if _is_ours(folder) or (os.path.isfile(folder / HUB_CONFIG) and not _is_run(folder)):
            return folder
    if is_unfinished(Path(lm)):
        known = sorted(path.name for path in final.parent.glob("step-*"))
        advice = (
            f"its last checkpoint is {known[-1]}, which `avatarl sample` writes with and "
            "`train.py --resume` goes on from"
            if known
            else "it has no checkpoint yet"
        )
        best = final.parent / "best"
        if _is_ours(best):
            advice += f"; its best model so far is {str(best)!r}"
        raise ValueError(f"lm must be a finished run's folder, {lm!r} has not finished: {advice}")
    raise ValueError(
        f"lm must be {BUNDLED!r}, a finished run's folder, one with {ABOUT} and {WEIGHTS} or one "
        f"of transformers with {HUB_CONFIG}, got {lm!r}"
    )


def load_model(lm: str = BUNDLED) -> StoredModel:
    """Load a stored model, on the CPU and in eval mode.

    Args:
        lm: `"bundled"`, a run folder, a folder that `save_model` wrote, or one of
            transformers. A folder that is both is taken for ours.

    Raises:
        ValueError: if there is no model, or its files do not fit together.
    """
    folder = model_folder(lm)
    return _load_ours(folder) if _is_ours(folder) else _load_hub(folder)


def move_model(model: nn.Module, device: str, dtype: str | None = None) -> None:
    """Move a model to a device and into a precision, in place.

    Args:
        model: to be moved.
        device: `"cpu"`, `"cuda"`, ...
        dtype: a name in `DTYPES`; default the precision that it has.

    Raises:
        ValueError: if there is no such dtype, or the device is not there.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    model.to(device=find_device(device), dtype=None if dtype is None else DTYPES[dtype])


def find_device(name: str) -> torch.device:
    """Return the device of a name, once it has held a number.

    Raises:
        ValueError: if there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta", which holds no numbers, raises too
    except torch.OutOfMemoryError:  # a RuntimeError, but there is such a device
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch has, got {name!r}: {reason}") from error
    return device


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model's parameters, by name, the values of others; their storage stays in place.

    Raises:
        ValueError: if one is missing or has another shape; the model is as it was then.
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


def _is_ours(folder: Path) -> bool:
    # Not Path.is_file, which raises an error for a name that is too long.
    return os.path.isfile(folder / ABOUT) and os.path.isfile(folder / WEIGHTS)


def is_unfinished(folder: Path) -> bool:
    """Whether it is the folder of a run that has no model yet but, perhaps, in its checkpoints."""
    return _is_run(folder) and not _is_ours(folder / "checkpoints" / "final")


def _is_run(folder: Path) -> bool:
    return all(os.path.isfile(folder / name) for name in RUN_FILES)


def _load_ours(folder: Path) -> StoredModel:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        about = read_json(folder / ABOUT)
        config = GPTConfig(**about.pop("gpt"))
        tokenizer = CharTokenizer.from_dict(about.pop("tokenizer"))
        found = stored_tensors(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    check_stored(folder, config, found, ABOUT)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"lm must have as many characters as its vocab_size, {config.vocab_size}, "
            f"{folder} has {tokenizer.vocab_size}"
        )
    check_memory("lm", config.building_bytes)
    try:  # read by us: safetensors opens no file whose name is not UTF-8
        weights = load((folder / WEIGHTS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {error}") from error
    model = GPT(config)
    load_weights(model, weights)
    return StoredModel(model.eval(), tokenizer, about)


def check_stored(
    folder: Path, config: GPTConfig, found: Mapping[str, StoredTensor], about: str
) -> None:
    """Refuse weights that are not those of the description, before anything is built.

    Args:
        folder: where they are, for the message.
        config: sizes that they should have.
        found: what the header of their file says.
        about: name of the file with the sizes, for the message.

    Raises:
        ValueError: names what differs.
    """
    expected = dict(islice(parameter_shapes(config), len(found) + 7))  # there may be billions
    wrong = sorted(set(found) ^ set(expected)) or [
        name for name, shape in expected.items() if found[name].shape != shape
    ]
    if wrong:
        more = ", ..." if len(wrong) > 8 else ""
        raise ValueError(
            f"lm must hold the weights its {about} describes, {folder} differs: "
            f"{', '.join(wrong[:8])}{more}"
        )
    kinds = sorted({tensor.dtype for tensor in found.values()} - {"F64", "F32", "F16", "BF16"})
    if kinds:
        raise ValueError(f"lm must hold floating point weights, {folder} has {', '.join(kinds)}")


def _load_hub(folder: Path) -> StoredModel:
    """Load a model and tokenizer of transformers; the weights keep the precision they have."""
    if not any(os.path.isfile(folder / name) for name in HUB_VOCABULARIES):
        raise ValueError(
            f"lm must have a tokenizer beside its weights ({', '.join(HUB_VOCABULARIES)}), "
            f"{folder} has none"
        )
    try:
        n_stored = check_hub_folder(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        # Some models draw weights that are then replaced; nobody else's dice are to change by it.
        with offline(), torch.random.fork_rng(devices=[]):
            config: Any = AutoConfig.from_pretrained(folder, **safe)
            # Transformers' own choice: a folder may name code that is to be downloaded and run.
            config._attn_implementation = config._experts_implementation = None
            check_skeleton(config, n_stored)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **safe,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except Exception as error:  # whatever transformers raises, which differs between versions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # they would be random
        raise ValueError(f"lm must hold all weights of its {HUB_CONFIG}, {folder} lacks: {missing}")
    return StoredModel(HubLM(model.eval()), HubTokenizer(tokenizer), {})
