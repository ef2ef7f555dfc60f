"""Tests of avatarl_env/lm/export.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from avatarl_env.lm.export import export_model, to_transformers
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.hub import HubLM, HubTokenizer
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.fakes import tiny_gpt

TOKENIZER = CharTokenizer.from_text("\n !,.?acdehnorstuvwéж😀")
CONTEXT = 48


def trained() -> GPT:
    """A model with varied predictions, and norms that are not all one."""
    model = tiny_gpt(vocab_size=TOKENIZER.vocab_size, context=CONTEXT, n_layers=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def windows(n_rows: int = 4, length: int = CONTEXT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(TOKENIZER.vocab_size - 1, (n_rows, length), generator=generator)


@torch.no_grad()
def test_exported_logits_equal_ours_up_to_the_rounding_of_the_angles() -> None:
    model, read = trained(), windows()
    exported, _ = to_transformers(model, TOKENIZER)
    found, expected = exported(read).logits, model(read)
    assert expected.std() > 1  # otherwise nothing could differ
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    angle = torch.arange(CONTEXT).float()[:, None] * exported.model.rotary_emb.inv_freq
    angle = torch.cat([angle, angle], dim=1)[:, None, None, :]
    model.cos, model.sin = angle.cos(), angle.sin()  # rounded as transformers rounds them
    assert torch.equal(found, model(read))
    model.embed.weight.zero_()  # not shared
    assert torch.equal(exported(read).logits, found)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert sum(p.numel() for p in exported.parameters()) == model.n_parameters
    assert not exported.training


FRESH = r"""
import json, sys, warnings
warnings.simplefilter("error")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, result = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
tokenizer = AutoTokenizer.from_pretrained(folder)
greedy = {"max_new_tokens": 12, "do_sample": False}

def write(prompts, **options):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return model.generate(**batch, **greedy, **options)[:, -12:].tolist()

prompts = ["and now, ", "ah", "the tree has\n"]
read = tokenizer("and now, there was\n", return_tensors="pt")["input_ids"]
write_text = pipeline("text-generation", model=folder, trust_remote_code=True)
with torch.no_grad():
    outcome = {
        "class": type(model).__name__,
        "problems": [str(value) for value in report.values() if value],
        "ours": [name for name in sys.modules if name.split(".")[0] in ("avatarl_env", "agents")],
        "ids": tokenizer("a\nж x").input_ids,
        "logits": model(read).logits.tolist(),
        "cached": write(prompts[0]),
        "uncached": write(prompts[0], use_cache=False),
        "padded": write(prompts),
        "alone": [write(prompt)[0] for prompt in prompts],
        "piped": write_text(prompts[0], **greedy)[0]["generated_text"],
    }
outcome["decoded"] = prompts[0] + tokenizer.decode(outcome["cached"][0])
open(result, "w", encoding="utf-8").write(json.dumps(outcome))
"""


@pytest.mark.slow
def test_a_process_without_this_package_loads_it_and_writes_the_same(tmp_path: Path) -> None:
    model, folder, result = trained(), tmp_path / "out", tmp_path / "result.json"
    export_model(folder, model, TOKENIZER, "a made-up text")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    words = [sys.executable, "-c", FRESH, str(folder), str(result)]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr  # no complaints
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    assert (found["class"], found["problems"], found["ours"]) == ("ArceeForCausalLM", [], [])
    assert found["ids"] == TOKENIZER.encode("a\nж x").tolist()
    assert found["cached"] == found["uncached"]
    assert found["padded"] == found["alone"]
    assert len({tuple(row) for row in found["padded"]}) == 3
    assert found["piped"] == found["decoded"]
    read = torch.from_numpy(TOKENIZER.encode("and now, there was\n"))[None]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(read), atol=5e-5, rtol=0)


def test_an_exported_model_can_be_loaded_again(tmp_path: Path) -> None:
    model = trained()
    export_model(tmp_path, model, TOKENIZER, "a made-up text")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "a made-up text" in card
    assert f"the last {CONTEXT} of them" in card
    assert not list(tmp_path.glob("*.py"))  # no code
    stored = load_model(str(tmp_path))
    assert isinstance(stored.model, HubLM)
    assert isinstance(stored.tokenizer, HubTokenizer)
    assert (stored.model.context, stored.model.vocab_size) == (CONTEXT, TOKENIZER.vocab_size)
    prompts, uniforms = windows(3, 5), torch.rand(3, 2 * CONTEXT, generator=torch.Generator())
    found, expected = (generate(m, prompts, uniforms).tokens for m in (stored.model, model))
    assert torch.equal(found, expected)
    half = tmp_path / "half"
    export_model(half, model.to(torch.bfloat16), TOKENIZER)
    assert next(load_model(str(half)).model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text",
    ["", "sat down,\n\n  and, \n", "xyz", "ea\u0301", "a\ufffdb", "é😀ж", "<pad>\t", "€" * 9],
)
def test_ids_and_text_equal_those_of_our_tokenizer(text: str) -> None:
    _, theirs = to_transformers(trained(), TOKENIZER)
    ids = TOKENIZER.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == TOKENIZER.decode(ids)
    assert (len(theirs), theirs.model_max_length) == (TOKENIZER.vocab_size, CONTEXT)
    theirs.eos_token = "\n"  # so that a line is the end of a text
    assert theirs(text)["input_ids"] == ids
    assert theirs.eos_token_id == TOKENIZER.encode("\n")[0]


@pytest.mark.parametrize(
    ("characters", "start"),
    [("a\n b", "\n"), ("a b", " "), ("ab", "\ufffd"), ("b\ufffd€", "\ufffd")],
)
def test_end_padding_and_start_tokens_are_set(characters: str, start: str, tmp_path: Path) -> None:
    """Libraries for fine-tuning (TRL) need the first two."""
    mine = CharTokenizer.from_text(characters)
    export_model(tmp_path, tiny_gpt(vocab_size=mine.vocab_size), mine)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    start_id, end = mine.encode(start)[0], mine.unknown_id
    assert (theirs.eos_token_id, theirs.pad_token_id, model.config.eos_token_id) == (end, end, end)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.pad_token_id) == (start_id, end)
    assert model.generation_config.eos_token_id is None  # it does not stop there
    with torch.random.fork_rng(devices=[]):
        text = pipeline("text-generation", model=model, tokenizer=theirs)("", max_new_tokens=5)
    assert len(text[0]["generated_text"]) <= 6


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for name, rule in (
        ("", "an empty or new folder"),
        ("notes.txt", "that can be written to"),
        ("notes.txt/out", "that can be written to"),
    ):
        with pytest.raises(ValueError, match=rf"^out must be .*{rule}, got .*notes\.txt"):
            export_model(tmp_path / name, trained(), TOKENIZER)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("n_tokens", "mine", "message"),
    [
        (16, TOKENIZER, "tokenizer must have the model's 16 tokens, got 23"),
        (3, CharTokenizer("a\ud800\ufffd"), "UTF-8"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    n_tokens: int, mine: CharTokenizer, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "out", tiny_gpt(vocab_size=n_tokens), mine)
    assert not (tmp_path / "out").exists()
