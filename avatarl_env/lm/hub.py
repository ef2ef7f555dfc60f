"""Causal language models and tokenizers from transformers, with the interfaces of this package.

A folder that transformers saved is untrusted data. Nothing in it may make transformers run code,
open a network connection, or allocate more memory than there is: see `load_hub`.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avatarl_env.errors import check_integer
from avatarl_env.files import read_json
from avatarl_env.memory import check_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_JSON = (HUB_CONFIG, "tokenizer_config.json", "generation_config.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_FOREIGN = re.compile(r"\.(bin|pt|pth|pkl|ckpt|gguf|h5|msgpack)$|^shard-\d+-model-.*\.safetensors$")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNTS = re.compile(r"layers|_layer$|experts|blocks|depth$|_cycles$")
"""Settings that may count copies of a part: decoder_layers, num_local_experts, ..."""
_MANY = 1024
"""Always allowed for such a setting, since configurations have some that are not used."""


def is_hub_model(model: object) -> TypeGuard[PreTrainedModel]:
    """Return whether this is a transformers model; does not import transformers."""
    return _is_a(model, "transformers.modeling_utils", "PreTrainedModel")


def is_hub_tokenizer(tokenizer: object) -> TypeGuard[PreTrainedTokenizerBase]:
    """Return whether this is a transformers tokenizer; does not import transformers."""
    return _is_a(tokenizer, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase")


class HubCache:
    """A transformers cache with the interface that generation needs."""

    def __init__(self, config: Any) -> None:
        """Start empty; `config` is the model's."""
        self._config = config
        self.reset()

    @property
    def length(self) -> int:
        """Positions seen."""
        return int(self.past.get_seq_length())

    def reset(self) -> None:
        """Forget every position."""
        from transformers import DynamicCache

        self.past = DynamicCache(config=self._config)


class HubLM(nn.Module):
    """A causal language model from transformers: tokens in, logits out.

        model = HubLM(AutoModelForCausalLM.from_pretrained(folder))
        generation = generate(model, prompts, uniforms)

    The model is shared, not copied; the names of its parameters begin with `model.`.
    """

    def __init__(
        self, model: PreTrainedModel, context: int | None = None, *, vocab_size: int | None = None
    ) -> None:
        """Wrap a model; train/eval mode is the model's.

        Args:
            model: any with `input_ids`, `past_key_values` and logits.
            context: longest window, tokens; default that of the model's configuration.
            vocab_size: V, if the model has more logits than tokens: the rest is cut off. Default
                that of the model's configuration.

        Raises:
            ValueError: if no context is given or configured, or it is not a positive integer.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        if context is None:
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            raise ValueError(
                f"context must be given, {type(model).__name__} has none: wrap it, "
                "HubLM(model, context=...)"
            )
        self._context = check_integer("context", context, 1)
        self._vocab_size = vocab_size

    def forward(self, tokens: Tensor, cache: HubCache | None = None) -> Tensor:
        """Return the next-token logits (B, T, V) after every position; see `GPT.forward`.

        Raises:
            ValueError: if the positions exceed the context.
        """
        stop = tokens.size(1) + (0 if cache is None else cache.length)
        if stop > self._context:
            raise ValueError(f"tokens must end within context={self._context}, got {stop}")
        output = self.model(
            input_ids=tokens,
            past_key_values=None if cache is None else cache.past,
            use_cache=cache is not None,
        )
        logits: Tensor = output.logits
        return logits if self._vocab_size is None else logits[..., : self._vocab_size]

    @property
    def context(self) -> int:
        """Longest window the model can read, tokens."""
        return self._context

    @property
    def vocab_size(self) -> int:
        """Logits at every position, V."""
        if self._vocab_size is not None:
            return self._vocab_size
        return int(self.model.config.get_text_config().vocab_size)

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> HubCache:
        """Return an empty cache, which grows with its rows and positions."""
        return HubCache(self.model.config)

    def get_output_embeddings(self) -> nn.Module:
        """Return the module that turns the final hidden state into logits; None without one."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head


class HubTokenizer:
    """A tokenizer from transformers: text in, ids out, without special tokens around them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a tokenizer; it is shared, not copied."""
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self.tokenizer)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text, (T,)."""
        # Not verbose: it would warn that a corpus is longer than the context.
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]] | Tensor) -> str:
        """Return the text of tokens (T,), without special tokens."""
        text = self.tokenizer.decode(
            [int(token) for token in ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)  # it would be a list for a list of rows
        return text


def load_hub(folder: Path) -> tuple[HubLM, HubTokenizer]:
    """Load a model and tokenizer that transformers saved, on the CPU and in eval mode.

    The weights keep their precision. Only plain safetensors are read, offline and without remote
    code, after the model's sizes were checked against them and the memory.

    Raises:
        ValueError: if the folder is damaged, incomplete, or of another format.
    """
    if not any(os.path.isfile(folder / name) for name in _VOCABULARIES):
        raise ValueError(
            f"lm must have a tokenizer beside its weights ({', '.join(_VOCABULARIES)}), "
            f"{folder} has none"
        )
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        n_stored = _check_folder(folder)
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        # Some constructors draw weights, which are then replaced, from the global generator.
        with offline(), torch.random.fork_rng(devices=[]):
            config: Any = AutoConfig.from_pretrained(folder, **safe)
            # A folder must not choose these: they may name code to be downloaded and run.
            config._attn_implementation = config._experts_implementation = None
            _check_skeleton(config, n_stored)
            options = {"config": config, "use_safetensors": True, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options, **safe)
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except Exception as error:  # transformers' own exceptions, which differ between versions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"lm must be a stored model, {folder} is damaged: {reason}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # they would be random
        raise ValueError(f"lm must hold all weights of its {HUB_CONFIG}, {folder} lacks: {missing}")
    return HubLM(model.eval()), HubTokenizer(tokenizer)


@contextmanager
def offline() -> Iterator[None]:
    """Make every request of huggingface_hub in the body fail."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _check_folder(folder: Path) -> int:
    """Refuse a folder of anything but plain weights, sizes and a tokenizer; count its tensors."""
    from safetensors import safe_open

    for entry in folder.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ValueError(f"it must hold files, got {entry.name}, a pipe or a device")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            "it must be a whole model, got an adapter (adapter_config.json): merge it into its "
            "model first"
        )
    content = {name: _read_object(folder / name) for name in _JSON if (folder / name).exists()}
    parts = list(_nested(content[HUB_CONFIG]))
    for key in ("quantization_config", "transformers_weights"):
        if any(part.get(key) is not None for part in parts):
            raise ValueError(f"it must have plain weights in {_WEIGHTS}, got {key}")
    n_stored = 0
    for file in _weight_files(folder):
        with safe_open(file, "pt") as tensors:
            n_stored += len(tensors.keys())
    for part in parts:
        _check_counts(part, n_stored)
    return n_stored


def _check_counts(settings: Mapping[str, Any], n_stored: int) -> None:
    """Refuse more layers or parts than tensors, which would make transformers build huge lists."""
    for name, value in settings.items():
        if isinstance(value, int) and _COUNTS.search(name):
            is_depth = name in _LAYERS
            most = n_stored if is_depth else max(n_stored, _MANY)
            if value > most or (is_depth and value < 1):
                raise ValueError(
                    f"{name} must be an integer from 1 to {most}, the most that its weights "
                    f"allow, got {value}"
                )


def _check_skeleton(config: Any, n_stored: int) -> None:
    """Build the model without weights, with a limit of parts, to check that it fits the memory."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights(), _at_most(_MANY + 20 * n_stored):
        skeleton = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    parts = (*skeleton.parameters(), *skeleton.buffers())
    check_memory("its weights", sum(part.numel() for part in parts) * 2)  # two bytes at least


@contextmanager
def _at_most(n_parts: int) -> Iterator[None]:
    """Limit the modules and parameters that this thread may build in the body.

    Unlike `_check_counts`, this does not depend on the names of settings.
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


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load."""
    foreign = sorted(entry.name for entry in folder.iterdir() if _FOREIGN.search(entry.name))
    taken = [name for name in foreign if name.startswith("shard-")]  # loaded before other files
    if (folder / _WEIGHTS).is_file() and not taken:
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file() or taken:
        found = f"got {foreign[0]}" if foreign else "got neither"
        raise ValueError(f"it must have its weights in {_WEIGHTS} or {_INDEX}, {found}")
    parts = _read_object(folder / _INDEX).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise ValueError(f"{_INDEX} must hold a weight_map of file names, got {parts!r:.40}")
    names = sorted(set(parts.values()))
    for name in names:
        if not os.path.isfile(folder / name) or re.search(r"[/\\]", name):
            raise ValueError(f"{_INDEX} must name files of its own folder, got {name!r}")
    return [folder / name for name in names]


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold an object, got {content!r:.40}")  # noqa: TRY004
    return content


def _nested(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings and those nested in them: text_config, ..."""
    yield settings
    for value in settings.values():
        if isinstance(value, dict):
            yield from _nested(value)


def _is_a(value: object, module: str, name: str) -> bool:
    """Return whether `value` is of a class, without importing its module."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))
