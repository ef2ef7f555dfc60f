"""Tests of `load_hub` in avatarl_env/lm/hub.py: untrusted folders of transformers."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from avatarl_env.lm.export import export_model
from avatarl_env.lm.hub import HubLM, offline
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.fakes import tiny_gpt

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    export_model(folder, tiny_gpt(3), CharTokenizer("\n abcdefghijklm\ufffd"))
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def shard(folder: Path, name: str = "part-1.safetensors") -> None:
    """Turn a folder into one whose index names one part."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "part-1.safetensors", {"format": "pt"})
    edit(folder, INDEX, metadata={}, weight_map=dict.fromkeys(weights, name))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(str(folder)).model(torch.arange(16)[None])
    return found


def refused(folder: Path, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^lm must be a stored model, [^\n]*{rule}") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


# --- code and the network ------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel"}, 7])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_the_folder_does_not_choose_how_attention_is_computed(
    key: str, value: Any, folder: Path, sound: Path
) -> None:
    edit(folder, CONFIG, **{key: value}, _experts_implementation="someone/kernel")
    stored = load_model(str(folder))
    assert isinstance(stored.model, HubLM)
    assert stored.model.model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(folder), logits(sound))


@pytest.mark.parametrize("model_type", ["arcee", "unheard_of"])
def test_code_in_the_folder_is_not_run(model_type: str, folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    code = f"open({str(witness)!r}, 'w').close()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    mapped = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    edit(folder, CONFIG, model_type=model_type, auto_map=mapped)
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    edit(folder, "generation_config.json", custom_generate="evil")
    if model_type == "arcee":
        load_model(str(folder))
    else:
        refused(folder, "damaged")
    assert not witness.exists()


def test_the_network_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connect(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    edit(folder, CONFIG, _name_or_path="someone/model", base_model="someone/model")
    edit(folder, "tokenizer_config.json", name_or_path="someone/model", fix_mistral_regex=True)
    load_model(str(folder))
    with offline(), pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("someone/model", "config.json")
    assert asked == []
    assert not constants.HF_HUB_OFFLINE  # as it was


def put(name: str, content: bytes = b"\x80\x04.") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def instead(name: str) -> Callable[[Path], object]:
    return lambda folder: os.replace(folder / "model.safetensors", folder / name)


def set_in(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, name, **changes)


def sharded(name: str) -> Callable[[Path], object]:
    return lambda folder: shard(folder, name)


def sharded_as(parts: Any) -> Callable[[Path], object]:
    return lambda folder: (shard(folder), edit(folder, INDEX, weight_map=parts))


@pytest.mark.parametrize(
    ("name", "spoil", "rule"),
    [
        ("pickle", instead("pytorch_model.bin"), "got pytorch_model.bin"),
        ("gguf", instead("model.gguf"), "got model.gguf"),
        ("no weights", instead("weights.safetensors"), "got neither"),
        ("shards", put("shard-00001-model-00001-of-00001.safetensors"), "got shard-00001-model"),
        ("adapter", set_in("adapter_config.json", base_model_name_or_path="a/b"), "an adapter"),
        ("elsewhere", set_in(CONFIG, transformers_weights="x.bin"), "got transformers_weights"),
        ("quantised", set_in(CONFIG, quantization_config={"a": 4}), "got quantization_config"),
        ("part", set_in(CONFIG, text_config={"quantization_config": {}}), "quantization_config"),
        ("no object", put(CONFIG, b"[1]"), "config.json must hold an object"),
        ("pipe", lambda folder: os.mkfifo(folder / "special_tokens_map.json"), "a pipe"),
        ("no weights in it", put("model.safetensors"), "damaged"),
        *[
            (f"deep {name}", put(name, b"[" * 10**5 + b"]" * 10**5), f"{name}.* nested at most")
            for name in (CONFIG, "generation_config.json", "tokenizer_config.json")
        ],
        *[
            (f"index: {name!r}", sharded(name), f"must name files of its own folder, got {name!r}")
            for name in ("../part-1.safetensors", "/part-1.safetensors", "", "a/b", "..", "none")
        ],
        *[(f"map: {parts}", sharded_as(parts), "weight_map") for parts in (None, [], {"a": 3})],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_formats_and_damaged_folders_are_refused(
    name: str, spoil: Callable[[Path], object], rule: str, folder: Path
) -> None:
    spoil(folder)
    if name.startswith("index: '../"):
        shutil.copy(folder / "part-1.safetensors", folder.parent)
    refused(folder, rule)


def test_weights_may_be_in_parts_and_in_the_cache_of_huggingface_hub(
    folder: Path, sound: Path
) -> None:
    """The cache is a folder of links, MODEL/snapshots/COMMIT/FILE to MODEL/blobs/SHA256."""
    shard(folder)
    assert torch.equal(logits(folder), logits(sound))
    snapshot, blobs = folder.parent / "snapshots" / "0123", folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        os.replace(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert torch.equal(logits(snapshot), logits(sound))


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**9, 10**18, -1, 0, 2.0, float("nan"), "2"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim"])
def test_sizes_that_the_weights_do_not_have_are_refused(
    name: str, value: Any, folder: Path
) -> None:
    edit(folder, CONFIG, **{name: value})
    refused(folder, "damaged")


def test_a_model_that_does_not_fit_the_memory_is_not_built(folder: Path) -> None:
    edit(folder, CONFIG, intermediate_size=10**13)
    refused(folder, "its weights must fit the memory, .* GiB")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"decoder_layers": 10**9},
        {"num_local_experts": 10**9},
        {"text_config": {"n_layer": 10**12}},
        {"text_config": {"depth": 10**12}},
    ],
)
def test_numbers_of_parts_are_bounded(changes: dict[str, Any], folder: Path) -> None:
    edit(folder, CONFIG, **changes)
    refused(folder, r"must be an integer from 1 to \d+, .* got 10000")


def test_no_more_modules_are_built_than_tensors_are_stored(tmp_path: Path) -> None:
    """A thousand layers are within the bound of the setting: the building itself is stopped."""
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 8, "decoder_ffn_dim": 8, "decoder_attention_heads": 2, "vocab_size": 16}
    with torch.random.fork_rng(devices=[]):
        BartForCausalLM(BartConfig(decoder_layers=1, **sizes)).save_pretrained(tmp_path)
    edit(tmp_path, "tokenizer.json")
    edit(tmp_path, CONFIG, decoder_layers=1000)
    refused(tmp_path, "config.json must describe a model of the tensors in its files")


def test_a_context_beyond_all_numbers_is_refused(folder: Path) -> None:
    edit(folder, CONFIG, max_position_embeddings=10**18)
    with pytest.raises(ValueError, match=r"context must be at most \d+, got 1000"):
        load_model(str(folder))
