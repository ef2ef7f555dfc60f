"""Tests of avatarl_env/lm/storage.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model, load_weights, model_folder, save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.fakes import fingerprint, tiny_gpt

TOKENIZER = CharTokenizer("\n abcdefghijklm\ufffd")  # 16 tokens, as many as the tiny GPT's
ABOUT = {"corpus": "playwright", "made_by": "python make.py --seed 7", "note": {"caf\u00e9": [1]}}
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


@pytest.fixture
def model() -> GPT:
    return tiny_gpt(3)


@pytest.fixture
def folder(tmp_path: Path, model: GPT) -> Path:
    save_model(tmp_path / "model", model, TOKENIZER, ABOUT)
    return tmp_path / "model"


def refused(lm: Path | str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^lm must [^\n]*{rule}") as caught:
        load_model(str(lm))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- round trips ---------------------------------------------------------------------------------


def test_round_trip_is_exact(folder: Path, model: GPT) -> None:
    stored = load_model(str(folder))
    loaded = stored.model
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.config == model.config
    assert (stored.tokenizer, stored.about) == (TOKENIZER, ABOUT)
    assert not any(module.training for module in loaded.modules())
    assert loaded.lm_head.weight is loaded.embed.weight
    assert load_file(folder / WEIGHTS).keys() == dict(model.named_parameters()).keys()
    tokens = torch.arange(16)[None]
    logits = loaded(tokens)
    assert torch.equal(logits, model(tokens))
    logits.sum().backward()  # it can be trained
    assert all(p.grad is not None and p.device.type == "cpu" for p in loaded.parameters())


def test_every_bit_pattern_survives(tmp_path: Path, model: GPT) -> None:
    with torch.no_grad():
        model.norm.weight[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    save_model(tmp_path, model, TOKENIZER, {})
    assert fingerprint(load_model(str(tmp_path)).model) == fingerprint(model)


def test_weights_are_loaded_in_place_or_not_at_all(model: GPT) -> None:
    other = tiny_gpt(4)
    weights = {name: p.detach() for name, p in other.named_parameters()}
    before, places = fingerprint(model), [p.data_ptr() for p in model.parameters()]
    for bad in ({**weights, "norm.weight": torch.ones(3)}, {"embed.weight": torch.ones(16, 32)}):
        with pytest.raises(ValueError, match=r"weights .*'(norm|blocks)"):
            load_weights(model, bad)
        assert fingerprint(model) == before
    load_weights(model, weights)
    assert fingerprint(model) == fingerprint(other)
    assert [p.data_ptr() for p in model.parameters()] == places


# --- which folder --------------------------------------------------------------------------------


def test_a_run_folder_means_its_final_model(tmp_path: Path, model: GPT) -> None:
    save_model(tmp_path / "checkpoints" / "final", model, TOKENIZER, ABOUT)
    save_model(tmp_path, tiny_gpt(4), TOKENIZER, ABOUT)  # the run's own model wins
    assert model_folder(str(tmp_path)) == tmp_path / "checkpoints" / "final"
    assert fingerprint(load_model(str(tmp_path)).model) == fingerprint(model)
    assert model_folder("bundled").parts[-2:] == ("avatarl_env", "bundled")


def test_an_unfinished_run_is_refused_with_advice(tmp_path: Path, model: GPT) -> None:
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    refused(tmp_path, "finished.*no checkpoint yet")
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    save_model(tmp_path / "checkpoints" / "best", model, TOKENIZER, {})
    refused(tmp_path, "last checkpoint is step-000003, .*best model so far is '.*best'")


@pytest.mark.parametrize("missing", [WEIGHTS, DESCRIPTION])
def test_a_folder_without_a_model_is_refused(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    refused(folder, f"be 'bundled', .*{DESCRIPTION} and {WEIGHTS}.*, got '{folder}'")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / missing)
        refused(folder, "be 'bundled'")


@pytest.mark.parametrize("lm", ["x" * 300, "a\0b", "", "no/such/folder"])
def test_a_name_without_a_folder_is_refused(lm: str) -> None:
    refused(lm, "be 'bundled'")


# --- damage --------------------------------------------------------------------------------------


def describe(folder: Path, **changes: Any) -> None:
    """Change entries of the description, and sizes in it; None removes one."""
    content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    for name, value in changes.items():
        place = content if name in content else content["gpt"]
        place[name] = value
        if value is None:
            del place[name]
    (folder / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"gpt": None}, "'gpt'"),
        ({"tokenizer": None}, "'tokenizer'"),
        ({"gpt": {"vocab_size": 16, "depth": 3}}, "'depth'"),
        ({"n_heads": 3}, "n_heads must divide"),
        ({"tokenizer": {"type": "bpe"}}, "must be 'char'"),
        ({"tokenizer": TOKENIZER.to_dict() | {"characters": "\ufffdz"}}, "vocab_size, 16, .* 2"),
        ({"n_layers": 1}, "hold the .* weights .* has 25,248"),  # fewer than stored
        ({"n_layers": 3}, "hold the .* weights .* has 25,248"),
        ({"width": 64}, "hold the .* weights .* has 25,248"),
        ({"context": 10**12}, "fit the memory"),
        *[
            ({name: value}, "(damaged|hold the|fit the memory)")
            for name in ("n_layers", "width", "vocab_size", "n_heads", "context")
            for value in (10**18, -1, 0, 2.0, float("nan"), "2")
        ],
    ],
)
def test_a_damaged_description_is_refused(changes: dict[str, Any], rule: str, folder: Path) -> None:
    describe(folder, **changes)
    refused(folder, rule)


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 100])
def test_damaged_files_are_refused(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    refused(folder, f"be a stored model, .*{folder.name} is damaged")


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    weights = load_file(path)
    renamed = {name.replace("norm_1", "norm_3"): w for name, w in weights.items()}
    save_file(renamed, path)
    refused(folder, "damaged: weights must have '.*norm_1")
    save_file({name: w.to(torch.int8) for name, w in weights.items()}, path)
    refused(folder, "floating point weights, .* has torch.int8")
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "is damaged")


def test_half_precision_comes_back_as_the_same_numbers(tmp_path: Path, model: GPT) -> None:
    model.to(torch.bfloat16)
    save_model(tmp_path, model, TOKENIZER, {})
    loaded = load_model(str(tmp_path)).model
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert fingerprint(loaded.to(torch.bfloat16)) == fingerprint(model)


def test_metadata_cannot_replace_the_model(tmp_path: Path, model: GPT) -> None:
    save_model(tmp_path, model, TOKENIZER, {"gpt": "mine", "tokenizer": None, "corpus": "x"})
    loaded = load_model(str(tmp_path))
    assert fingerprint(loaded.model) == fingerprint(model)
    assert loaded.about == {"corpus": "x"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_model(tmp_path / "other", model, TOKENIZER, {"made_by": object()})
    assert not (tmp_path / "other").exists()


def test_models_are_not_written_through_links(tmp_path: Path, model: GPT) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    (tmp_path / "model").mkdir()
    for name in (DESCRIPTION, WEIGHTS):
        (tmp_path / "model" / name).symlink_to(precious)
    save_model(tmp_path / "model", model, TOKENIZER, {})
    assert precious.read_text(encoding="utf-8") == "mine"
    assert fingerprint(load_model(str(tmp_path / "model")).model) == fingerprint(model)
