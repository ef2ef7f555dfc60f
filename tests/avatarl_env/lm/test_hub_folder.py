"""Tests of avatarl_env/lm/hub_folder.py: folders of transformers that nobody should trust."""

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
from avatarl_env.lm.hub_folder import offline
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.fakes import tiny_gpt

TOKENS = torch.arange(16)[None]


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
    edit(
        folder, "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(weights, name)
    )


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(str(folder)).model(TOKENS)
    return found


def refused(folder: Path, rule: str) -> None:
    with pytest.raises(ValueError, match=r"^lm must be a stored model, ") as caught:
        load_model(str(folder))
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


# --- code and the network ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["someone/kernel", {"": "someone/kernel"}, "flash_attention_2", 7]
)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_the_folder_has_no_say_in_how_attention_is_computed(
    key: str, value: Any, folder: Path, sound: Path
) -> None:
    edit(folder, "config.json", **{key: value}, _experts_implementation="someone/kernel")
    stored = load_model(str(folder))
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
    edit(folder, "config.json", model_type=model_type, auto_map=mapped)
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    edit(folder, "generation_config.json", custom_generate="evil")
    if model_type == "arcee":
        load_model(str(folder))
    else:
        refused(folder, "damaged")
    assert not witness.exists()


def test_nothing_is_asked_of_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connect(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    load_model(str(folder))
    edit(folder, "config.json", _name_or_path="someone/model", base_model="someone/model")
    edit(folder, "tokenizer_config.json", name_or_path="someone/model", fix_mistral_regex=True)
    load_model(str(folder))
    with offline(), pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("someone/model", "config.json")
    assert asked == []
    assert not constants.HF_HUB_OFFLINE  # as it was


# --- what the folder holds -----------------------------------------------------------------------


def put(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"\x80\x04.")


def instead(name: str) -> Callable[[Path], object]:
    return lambda folder: os.replace(folder / "model.safetensors", folder / name)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (instead("pytorch_model.bin"), "got pytorch_model.bin"),
        (instead("model.gguf"), "got model.gguf"),
        (instead("weights.safetensors"), "got neither"),
        (put("shard-00001-model-00001-of-00001.safetensors"), "got shard-00001-model"),
        (lambda f: edit(f, "adapter_config.json", base_model_name_or_path="a/b"), "got an adapter"),
        (
            lambda f: edit(f, "config.json", transformers_weights="pytorch_model.bin"),
            "got transformers_weights",
        ),
        (
            lambda f: edit(f, "config.json", quantization_config={"quant_method": "mxfp4"}),
            "got quantization_config",
        ),
        (
            lambda f: edit(f, "config.json", text_config={"quantization_config": {"bits": 4}}),
            "got quantization_config in its config.json",
        ),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json must hold an object"),
        (lambda f: os.mkfifo(f / "special_tokens_map.json"), "a pipe or a device"),
        *[
            (
                lambda f, n=name: (f / n).write_text("[" * 10**5 + "]" * 10**5),
                f"{name}: it must be nested at most",
            )
            for name in ("config.json", "generation_config.json", "tokenizer_config.json")
        ],
    ],
)
def test_what_is_not_plain_weights_is_refused(
    spoil: Callable[[Path], object], rule: str, folder: Path
) -> None:
    spoil(folder)
    refused(folder, rule)


def test_an_index_names_files_of_its_folder(folder: Path, sound: Path) -> None:
    shard(folder)
    assert torch.equal(logits(folder), logits(sound))


@pytest.mark.parametrize("name", ["../part-1.safetensors", "/part-1.safetensors", "", "a/b", ".."])
def test_an_index_that_leaves_its_folder_is_refused(name: str, folder: Path) -> None:
    shard(folder, name)
    shutil.copy(folder / "part-1.safetensors", folder.parent)
    refused(folder, f"must name files of its own folder, got {name!r}")


def test_a_part_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    shard(folder)
    part = folder / "part-1.safetensors"
    os.replace(part, folder.parent / "elsewhere.safetensors")
    part.symlink_to(folder.parent / "elsewhere.safetensors")
    refused(folder, "must name files of its own folder, got 'part-1.safetensors'")


def test_the_cache_of_huggingface_hub_is_a_folder_of_links(folder: Path, sound: Path) -> None:
    shard(folder)
    snapshot, blobs = folder.parent / "snapshots" / "0123", folder.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        os.replace(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert torch.equal(logits(snapshot), logits(sound))


@pytest.mark.parametrize("parts", [None, [], {"a": 3}, {"a": "nowhere.safetensors"}])
def test_a_damaged_index_is_refused(parts: Any, folder: Path) -> None:
    shard(folder)
    edit(folder, "model.safetensors.index.json", weight_map=parts)
    refused(folder, "damaged")


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**9, 10**18, -1, 0, True, 2.0, float("nan"), "2"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim"])
def test_sizes_that_the_weights_cannot_have_are_refused(
    name: str, value: Any, folder: Path
) -> None:
    edit(folder, "config.json", **{name: value})
    refused(folder, f"{name} must be an integer from 1 to ")


def test_sizes_of_a_part_are_checked_too(folder: Path) -> None:
    edit(folder, "config.json", text_config={"n_layer": 10**12})
    refused(folder, "n_layer must be an integer from 1 to ")


@pytest.mark.parametrize(
    "name", ["decoder_layers", "num_encoder_layers", "num_local_experts", "num_blocks", "depth"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_numbers_of_parts_are_bounded(name: str, nested: bool, folder: Path) -> None:
    changes = {name: 10**9}
    edit(folder, "config.json", **({"text_config": changes} if nested else changes))
    refused(folder, f"{name} must be at most 1024, the most that its weights allow")


def test_no_more_modules_are_built_than_tensors_are_stored(tmp_path: Path) -> None:
    """A thousand layers are within the bound of the setting: the building itself is stopped."""
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 8, "decoder_ffn_dim": 8, "decoder_attention_heads": 2, "vocab_size": 16}
    config = BartConfig(decoder_layers=1, **sizes)
    BartForCausalLM(config).save_pretrained(tmp_path)
    edit(tmp_path, "tokenizer.json")
    edit(tmp_path, "config.json", decoder_layers=1000)
    refused(tmp_path, "its config.json must describe a model of the tensors in its files")


def test_positions_are_bounded(folder: Path) -> None:
    edit(folder, "config.json", max_position_embeddings=10**12)
    refused(folder, "max_position_embeddings must be an integer from 1 to ")


def test_a_model_that_does_not_fit_the_memory_is_not_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatarl_env.memory.memory_limit", lambda: 10_000)
    refused(folder, "its weights must fit the memory")
