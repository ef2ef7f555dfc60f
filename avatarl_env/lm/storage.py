"""A language model in a folder: ours, or one of transformers.

Ours has its weights as safetensors, sizes and vocabulary as JSON. A folder of transformers is what
``save_pretrained`` of a model and of its tokenizer wrote; it is read without a network, and code
that lies in it is not run.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from avatarl_env.lm.gpt import GPT, GPTConfig
from avatarl_env.lm.hub import HubLM, HubTokenizer
from avatarl_env.lm.interface import Tokenizer
from avatarl_env.lm.tokenizer import CharTokenizer

WEIGHTS, ABOUT = "model.safetensors", "model.json"
BUNDLED = "bundled"
HUB_CONFIG = "config.json"
HUB_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class StoredModel(NamedTuple):
    """What :func:`load_model` found."""

    model: GPT | HubLM
    tokenizer: Tokenizer
    about: dict[str, Any]
    """What its maker wrote beside it: ``corpus`` and ``made_by`` at least; nothing beside one of
    transformers."""


def save_model(folder: Path, model: GPT, tokenizer: CharTokenizer, about: dict[str, Any]) -> None:
    """Write a model into ``folder``, made if need be.

    Args:
        folder: where to.
        model: its weights are stored as they are, tied ones once.
        tokenizer: stored beside them.
        about: JSON-able; ``corpus`` names the text it learned, ``made_by`` the command.
    """
    from safetensors.torch import save

    sizes = {name: getattr(model.config, name) for name in GPTConfig.__dataclass_fields__}
    content = {**about, "gpt": sizes, "tokenizer": tokenizer.to_dict()}
    text = json.dumps(content, indent=2) + "\n"  # before anything is written: this can fail
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(weights))
    (folder / ABOUT).write_text(text, encoding="utf-8")


def model_folder(lm: str) -> Path:
    """Return the folder that ``lm`` means: the bundled patient, a run folder, or a model folder.

    Raises:
        ValueError: if there is no model.
    """
    if lm == BUNDLED:
        return Path(str(files("avatarl_env").joinpath("bundled")))
    for folder in (Path(lm) / "checkpoints" / "final", Path(lm)):
        if _is_ours(folder) or (folder / HUB_CONFIG).is_file():
            return folder
    raise ValueError(
        f"lm must be {BUNDLED!r}, a finished run's folder, one with {ABOUT} and {WEIGHTS} or one "
        f"of transformers with {HUB_CONFIG}, got {lm!r}"
    )


def load_model(lm: str = BUNDLED) -> StoredModel:
    """Load a stored model, on the CPU and in eval mode.

    Args:
        lm: ``"bundled"``, a run folder, a folder that :func:`save_model` wrote, or one of
            transformers. A folder that is both is taken for ours.

    Raises:
        ValueError: if there is no model, or its files do not fit together.
    """
    folder = model_folder(lm)
    return _load_ours(folder) if _is_ours(folder) else _load_hub(folder)


def _is_ours(folder: Path) -> bool:
    return (folder / ABOUT).is_file() and (folder / WEIGHTS).is_file()


def _load_ours(folder: Path) -> StoredModel:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        model = GPT(GPTConfig(**about.pop("gpt")))
        tokenizer = CharTokenizer.from_dict(about.pop("tokenizer"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    expected = dict(model.named_parameters())
    wrong = sorted(set(weights) ^ set(expected)) or sorted(
        name for name, p in expected.items() if p.shape != weights[name].shape
    )
    if wrong:
        raise ValueError(
            f"lm must hold the weights its {ABOUT} describes, {folder} differs: {wrong}"
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(weights[name])
    return StoredModel(model.eval(), tokenizer, about)


def _load_hub(folder: Path) -> StoredModel:
    """Load a model and tokenizer of transformers; the weights keep the precision they have."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not any((folder / name).is_file() for name in HUB_VOCABULARIES):
        raise ValueError(
            f"lm must have a tokenizer beside its weights ({', '.join(HUB_VOCABULARIES)}), "
            f"{folder} has none"
        )
    offline: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        # Some models draw weights that are then replaced; nobody else's dice are to change by it.
        with torch.random.fork_rng(devices=[]):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **offline
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, **offline)
    except Exception as error:  # whatever transformers raises, which differs between versions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # they would be random
        raise ValueError(f"lm must hold all weights of its {HUB_CONFIG}, {folder} lacks: {missing}")
    return StoredModel(HubLM(model.eval()), HubTokenizer(tokenizer), {})
