"""Tests of avatarl_env/lm/storage.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model, model_folder, save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.fakes import fingerprint, tiny_gpt
from tests.patients import global_random_states

TOKENIZER = CharTokenizer("\n abcdefghijklm\ufffd")  # 16 tokens, as many as the tiny GPT's
ABOUT = {"corpus": "playwright", "made_by": "python make.py --seed 7", "note": {"caf\u00e9": [1]}}


@pytest.fixture
def model() -> GPT:
    return tiny_gpt(3)


@pytest.fixture
def folder(tmp_path: Path, model: GPT) -> Path:
    save_model(tmp_path / "model", model, TOKENIZER, ABOUT)
    return tmp_path / "model"


def test_round_trip_is_exact(folder: Path, model: GPT) -> None:
    loaded = load_model(str(folder))
    assert fingerprint(loaded.model) == fingerprint(model)
    assert loaded.model.config == model.config
    assert loaded.tokenizer == TOKENIZER
    assert loaded.about == ABOUT
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), model(tokens))


def test_loaded_model_is_in_eval_mode_on_the_cpu_and_can_learn(folder: Path) -> None:
    loaded = load_model(str(folder)).model
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    loaded(torch.arange(4)[None]).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_tied_weights_are_stored_once_and_stay_tied(folder: Path, model: GPT) -> None:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert names == {name for name, _ in model.named_parameters()}
    assert "embed.weight" in names
    assert "lm_head.weight" not in names
    loaded = load_model(str(folder)).model
    assert loaded.lm_head.weight is loaded.embed.weight


def test_every_bit_pattern_survives(tmp_path: Path, model: GPT) -> None:
    with torch.no_grad():
        model.norm.weight[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    save_model(tmp_path, model, TOKENIZER, {})
    assert fingerprint(load_model(str(tmp_path)).model) == fingerprint(model)


def test_half_precision_comes_back_as_the_same_numbers(tmp_path: Path, model: GPT) -> None:
    model.to(torch.bfloat16)
    save_model(tmp_path, model, TOKENIZER, {})
    loaded = load_model(str(tmp_path)).model
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert fingerprint(loaded.to(torch.bfloat16)) == fingerprint(model)


def test_saving_and_loading_touch_nothing(tmp_path: Path, model: GPT) -> None:
    before, states = fingerprint(model), global_random_states()
    model.train()
    about = dict(ABOUT)
    save_model(tmp_path, model, TOKENIZER, about)
    load_model(str(tmp_path))
    assert fingerprint(model) == before
    assert model.training
    assert about == ABOUT
    assert global_random_states() == states


def test_saving_twice_gives_equal_files(tmp_path: Path, model: GPT, folder: Path) -> None:
    save_model(tmp_path / "again", model, TOKENIZER, ABOUT)
    save_model(tmp_path / "again", model, TOKENIZER, ABOUT)  # and over itself
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_said_about_a_model_cannot_replace_it(tmp_path: Path, model: GPT) -> None:
    save_model(tmp_path, model, TOKENIZER, {"gpt": "mine", "tokenizer": None, "corpus": "x"})
    loaded = load_model(str(tmp_path))
    assert fingerprint(loaded.model) == fingerprint(model)
    assert loaded.about == {"corpus": "x"}


def test_nothing_is_written_if_it_cannot_be_described(tmp_path: Path, model: GPT) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_model(tmp_path / "model", model, TOKENIZER, {"made_by": object()})
    assert not (tmp_path / "model").exists()


# --- folders -------------------------------------------------------------------------------------


def test_a_run_folder_means_its_final_checkpoint(tmp_path: Path, model: GPT) -> None:
    save_model(tmp_path / "checkpoints" / "final", model, TOKENIZER, ABOUT)
    assert model_folder(str(tmp_path)) == tmp_path / "checkpoints" / "final"
    assert fingerprint(load_model(str(tmp_path)).model) == fingerprint(model)
    save_model(tmp_path, tiny_gpt(4), TOKENIZER, ABOUT)  # the run's own model still wins
    assert fingerprint(load_model(str(tmp_path)).model) == fingerprint(model)


def test_bundled_means_the_packages_own() -> None:
    folder = model_folder("bundled")
    assert folder.parts[-2:] == ("avatarl_env", "bundled")


@pytest.mark.parametrize("missing", ["model.safetensors", "model.json", None])
def test_a_folder_without_a_model_is_refused_by_name(missing: str | None, folder: Path) -> None:
    lm = str(folder / "nowhere") if missing is None else str(folder)
    if missing:
        (folder / missing).unlink()
    with pytest.raises(ValueError, match="lm must be 'bundled', a finished run's folder") as caught:
        load_model(lm)
    message = str(caught.value)
    assert repr(lm) in message
    assert "model.json" in message
    assert "model.safetensors" in message
    assert "\n" not in message


def without(key: str) -> Callable[[dict[str, object]], object]:
    return lambda content: {name: x for name, x in content.items() if name != key}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (without("gpt"), "KeyError: 'gpt'"),
        (without("tokenizer"), "KeyError: 'tokenizer'"),
        (lambda content: content | {"gpt": {"vocab_size": 16, "depth": 3}}, "'depth'"),
        (
            lambda content: content | {"gpt": {"vocab_size": 16, "n_heads": 3}},
            "n_heads must divide",
        ),
        (lambda content: content | {"tokenizer": {"type": "bpe"}}, "must be 'char'"),
        (lambda content: [content], "TypeError"),
        (lambda content: "a model", "AttributeError"),
    ],
)
def test_a_damaged_description_is_refused_by_name(
    edit: Callable[[dict[str, object]], object], reason: str, folder: Path
) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"lm must be a stored model, .*{folder.name} .*{reason}"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100], ids=["none", "brace", "binary"])
def test_damaged_files_are_refused_by_name(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"lm must be a stored model, .*{folder.name} is damaged"):
        load_model(str(folder))


def test_a_cut_off_weights_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"lm must be a stored model, .* is damaged"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("sizes", "differs"),
    [
        ({"n_layers": 1}, "blocks.1.attn.c_attn.weight"),  # more than described
        ({"n_layers": 3}, "blocks.2.attn.c_attn.weight"),  # fewer
        ({"width": 64}, "embed.weight"),  # other shapes
    ],
)
def test_weights_that_do_not_fit_the_description_are_named(
    sizes: dict[str, int], differs: str, folder: Path
) -> None:
    content = json.loads((folder / "model.json").read_text())
    content["gpt"] |= sizes
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lm must hold the weights .* differs: .*{differs}"):
        load_model(str(folder))


# --- sizes that nobody has -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**9, 10**18, -1, 0, True, 2.0, float("nan"), "2", None])
@pytest.mark.parametrize("name", ["n_layers", "width", "vocab_size", "n_heads", "context"])
def test_absurd_sizes_are_refused_before_anything_is_built(
    name: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("it was built")

    content = json.loads((folder / "model.json").read_text())
    content["gpt"][name] = value
    (folder / "model.json").write_text(json.dumps(content))
    monkeypatch.setattr("avatarl_env.lm.storage.GPT", built)
    with pytest.raises(ValueError, match=r"^lm must ") as caught:
        load_model(str(folder))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_weights_that_are_integers_are_refused(folder: Path) -> None:
    weights = {
        name: w.to(torch.int8) for name, w in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm must hold floating point weights, .* has I8"):
        load_model(str(folder))


def test_a_vocabulary_of_another_size_is_refused(folder: Path) -> None:
    content = json.loads((folder / "model.json").read_text())
    content["tokenizer"]["characters"] += "z"
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"as many characters as its vocab_size, 16, .* has 17"):
        load_model(str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_pipe_is_no_model(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="lm must be 'bundled'"):
        load_model(str(folder))


def test_a_name_that_no_file_can_have_is_refused() -> None:
    for lm in ("x" * 300, "a\0b", ""):
        with pytest.raises(ValueError, match="lm must be 'bundled'"):
            load_model(lm)


def test_lone_surrogates_are_characters_like_others(tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text("x\udc00y\ud800z")
    save_model(tmp_path, tiny_gpt(vocab_size=tokenizer.vocab_size), tokenizer, {})
    assert load_model(str(tmp_path)).tokenizer == tokenizer


def test_models_are_not_written_through_links(tmp_path: Path, model: GPT) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    (tmp_path / "model").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(precious)
    save_model(tmp_path / "model", model, TOKENIZER, {})
    assert precious.read_text(encoding="utf-8") == "mine"
    assert fingerprint(load_model(str(tmp_path / "model")).model) == fingerprint(model)
