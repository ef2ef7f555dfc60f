"""Tests of agents/cli/sample.py and agents/cli/operation.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.cli.main import avatarl
from agents.training import checkpoint
from agents.training.loop import train
from avatarl_env.lm.export import export_model
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.surgery import SurgicalTheater, find_targets, make_operator
from avatarl_env.text.corpus import load_corpus
from tests.patients import store_tiny_patient
from tests.training_runs import small_config, write_text

C = [0.9, -0.8, 0.7, -0.6]  # head_gain on two heads


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Return a stored model, untrained, with a context of 64."""
    return store_tiny_patient(tmp_path / "model")


def written(
    run: str,
    prompt: str = "\n",
    length: int = 300,
    seed: int = 0,
    temperature: float = 1.0,
    coefficients: list[float] | None = None,
    operator: str = "head_gain",
) -> str:
    """Write with the library what the command should."""
    model, tokenizer, _ = load_model(run)
    prompts = torch.from_numpy(tokenizer.encode(prompt))[None]
    dice = torch.from_numpy(np.random.default_rng(seed).random((1, length), np.float32))
    if coefficients is not None:
        surgery = make_operator(operator, find_targets(model))
        with SurgicalTheater(model, [surgery]) as theater:
            surgery.apply(theater, coefficients)
            theater.commit()
    tokens = generate(model, prompts, dice, temperature=temperature).tokens
    return tokenizer.decode(tokens[0])


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert avatarl(["sample", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.removesuffix("\n")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert avatarl(["sample", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("avatarl sample: error: ").rstrip("\n")


def save(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def as_run(tmp_path: Path, operator: str) -> tuple[str, Path]:
    """Store a model as a finished run has it; return it and the run's folder."""
    folder = tmp_path / "run"
    store_tiny_patient(folder / "checkpoints" / "final")
    save(folder / "config.json", {"operator": operator, "operation": {}})
    return str(folder), folder


def both(run: str, length: int, **operation: Any) -> str:
    plain, operated = written(run, length=length), written(run, length=length, **operation)
    assert plain != operated
    return f"--- text\n{plain}\n--- text of the operated model\n{operated}"


def test_it_writes_far_beyond_the_context(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run)
    assert len(text) == 301
    assert text == written(run)


def test_everything_can_be_chosen(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a ten", "--length", "20", "--seed", "4", "--temperature", "0.5"]
    assert shown(capsys, run, *words) == written(run, "a ten", 20, 4, 0.5)


def test_several_texts_have_dice_of_their_own(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run, "--n", "2", "--length", "30", "--prompt", "a")
    first, second = text.removeprefix("=== 1\n").split("\n\n=== 2\n")
    assert first == written(run, "a", 30)
    assert second != first
    assert len(second) == 31


def test_the_bundled_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "bundled", "--length", "40", "--prompt", "KING:\n")
    assert text.startswith("KING:\n")
    assert len(text) == 46


def test_an_exported_model_writes_the_same(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_model(run)
    assert isinstance(stored.model, GPT)
    export_model(tmp_path / "out", stored.model, stored.tokenizer)  # type: ignore[arg-type]
    assert avatarl(["sample", str(tmp_path / "out"), "--length", "90"]) == 0
    expected = written(run, length=90)
    assert expected.count("\ufffd") < 5  # a special token there, which is no text
    assert capsys.readouterr().out == expected.replace("\ufffd", "") + "\n"
    line = refused_prompt(str(tmp_path / "out"), capsys)
    assert line == "prompt must be of characters that the model knows, got 'aéÜé'"


def refused_prompt(run: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert avatarl(["sample", run, "--prompt", "aéÜé"]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("avatarl sample: error: ")


def test_characters_that_the_model_does_not_know_are_named(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused_prompt(run, capsys)
    assert line == "prompt must be of characters that the model knows, got 'Üé'"


# --- operations ----------------------------------------------------------------------------------


def test_an_operation_is_performed_on_the_same_dice(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--length", "80", "--coefficients", *map(str, C)]
    assert shown(capsys, run, *words) == both(run, 80, coefficients=C)


def test_no_operation_changes_nothing(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run, "--coefficients", "0", "0", "0", "0", "--n", "2")
    for part in text.removeprefix("=== 1\n").split("\n\n=== 2\n"):
        plain, operated = part.removeprefix("--- text\n").split(
            "\n--- text of the operated model\n"
        )
        assert plain == operated


def test_an_operator_may_be_named(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--length", "80", "--operator", "output_temperature", "--coefficients", "-1"]
    expected = both(run, 80, coefficients=[-1], operator="output_temperature")
    assert shown(capsys, run, *words) == expected


def test_an_operation_in_a_file_says_all_of_itself(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "operator": "head_gain",
        "operator_options": {"tied": False},
        "coefficients": [0, 0, 0, 0, 1, -1, 1, -1],
    }
    path = save(tmp_path / "operation.json", content)
    text = shown(capsys, run, "--operation", path, "--length", "80")
    plain, operated = text.removeprefix("--- text\n").split("\n--- text of the operated model\n")
    assert plain == written(run, length=80) != operated
    content["operator_options"] = {"tid": False}
    line = refused(capsys, run, "--operation", save(tmp_path / "operation.json", content))
    assert "tid" in line


def test_the_operator_is_the_runs_where_the_operation_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = as_run(tmp_path, "output_temperature")
    expected = both(run, 60, coefficients=[0.5], operator="output_temperature")
    words = [run, "--length", "60"]
    assert shown(capsys, *words, "--coefficients", "0.5") == expected
    final = str(folder / "checkpoints" / "final")
    assert shown(capsys, final, "--length", "60", "--coefficients", "0.5") == expected
    record = {"commits": {"operations": [{"coefficients": [0.1]}, {"coefficients": [0.5]}]}}
    path = save(folder / "summary.json", record)
    assert shown(capsys, *words, "--operation", path) == expected
    rows = [
        {"kind": "operation", "surgeon/coefficients": [0.1]},
        {"kind": "commit", "commit/coefficients": [0.5], "commit/kept": False},
        {"kind": "grpo", "grpo/loss": 1.0},
    ]
    path = str(folder / "metrics.jsonl")
    lines = "\n".join(map(json.dumps, rows)) + '\n{"kind": "oper'  # it goes on, or broke off
    Path(path).write_text(lines, encoding="utf-8")
    assert shown(capsys, *words, "--operation", path) == expected


@pytest.mark.filterwarnings("default")
def test_an_operation_that_was_kept_is_performed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = as_run(tmp_path, "output_temperature")
    record = {"commits": {"operations": [{"coefficients": [0.5], "kept": True}]}}
    path = save(folder / "summary.json", record)
    assert avatarl(["sample", run, "--operation", path, "--length", "60"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("avatarl sample: warning: this operation was kept, so it is in its run's")
    assert err.count("\n") == 1
    assert out == both(run, 60, coefficients=[0.5], operator="output_temperature") + "\n"


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        (["--prompt", ""], "prompt must not be empty", "something"),
        (["--length", "0"], "length must be at least 1, got 0", ""),
        (["--n", "-2"], "n must be at least 1, got -2", ""),
        (["--temperature", "0"], "temperature must be positive and finite, got 0.0", ""),
        (["--temperature", "nan"], "temperature must be positive and finite, got nan", ""),
        (["--coefficients", "1", "2"], "coefficients must be 4 numbers for head_gain", "got 2"),
        (
            ["--coefficients", "1", "2", "nan", "3"],
            "coefficients must be finite, got [1.0, 2.0, nan, 3.0]",
            "",
        ),
        (
            ["--coefficients", "1", "--operator", "headgain"],
            "operator must be one of",
            "did you mean 'head_gain'?",
        ),
        (["--operator", "head_gain"], "operator must come with coefficients or an operation", ""),
        (
            ["--coefficients", "1", "--operation", "x.json"],
            "operation must not be given beside",
            "",
        ),
        (["--operation", "x.json"], "file 'x.json' must be readable: No such file", ""),
    ],
)
def test_bad_input_gets_one_line(
    run: str, words: list[str], start: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, run, *words)
    assert line.startswith(start)
    assert line.endswith(end)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.json", "{", "must hold JSON: "),
        ("a.json", "[1, 2]", "must hold coefficients, a list of numbers; got none"),
        (
            "a.json",
            '{"coefficients": ["1"]}',
            "must hold coefficients, a list of numbers; got none",
        ),
        ("a.json", '{"commits": {"operations": []}}', "must hold coefficients"),
        ("a.json", '{"coefficients": [1], "operator_options": 3}', "operator_options must be an"),
        ("a.jsonl", '{"kind": "grpo"}\n', "must hold coefficients"),
        ("a.jsonl", 'x\n{"coefficients": [1]}\n', "must hold JSON in line 1"),
    ],
)
def test_a_file_that_holds_no_operation_is_refused(
    run: str,
    name: str,
    content: str,
    rule: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    line = refused(capsys, run, "--operation", str(path))
    assert rule in line
    assert str(path) in line


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c"])
def test_line_separators_in_a_sampled_text_end_no_line(
    mark: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"kind": "sample", "text": f"a{mark}b"}, {"surgeon/coefficients": C}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines, encoding="utf-8", newline="\n")
    text = shown(capsys, run, "--operation", str(path), "--length", "60")
    assert text == both(run, 60, coefficients=C)


# --- what to begin with, and where and how to compute -------------------------------------------


def test_only_the_most_probable_characters_are_drawn(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = {shown(capsys, run, "--top-k", "1", "--seed", seed) for seed in "012"}
    assert len(greedy) == 1
    whole = shown(capsys, run, "--length", "40")
    assert shown(capsys, run, "--length", "40", "--top-k", "1000") == whole
    assert shown(capsys, run, "--length", "40", "--top-k", "2") != whole


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_prompt_may_come_from_a_file_or_standard_input(
    start: str,
    run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = "a\nten\n"
    path = tmp_path / "prompt.txt"
    path.write_bytes((start + prompt).encode())
    expected = written(run, prompt, 20)
    assert shown(capsys, run, "--length", "20", "--prompt-file", str(path)) == expected
    with path.open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert shown(capsys, run, "--length", "20", "--prompt-file", "-") == expected


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "must have 1 to 16,777,216 bytes, got 0"),
        (b"\xff\xfe", "must be UTF-8 text"),
        (b"a" * (2**24 + 1), "must have 1 to 16,777,216 bytes, got more"),
        (None, "must be readable: No such file or directory"),
    ],
    ids=["empty", "binary", "long", "missing"],
)
def test_a_file_that_is_no_prompt_is_refused(
    content: bytes | None,
    rule: str,
    run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, run, "--prompt-file", str(path))
    assert line.startswith(f"prompt_file {str(path)!r} {rule}")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--prompt", "a", "--prompt-file", "x"], "prompt must not be given beside prompt_file"),
        (["--prompt-file", "/dev/zero"], "prompt_file '/dev/zero' must have 1 to 16,777,216"),
        (["--prompt-file", "."], "prompt_file '.' must be readable: Is a directory"),
        (["--dtype", "float8"], "dtype must be one of "),
        (["--device", "tpu"], "device must be one that torch has, got 'tpu'"),
        (["--device", "meta"], "device must be one that torch has, got 'meta'"),
        (["--n", str(10**12)], "n times length must fit the memory, "),
        (["--length", str(10**12)], "n times length must fit the memory, "),
    ],
)
def test_options_out_of_range_are_refused(
    words: list[str], rule: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, run, *words).startswith(rule)


def test_precision_and_device_are_as_asked(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--length", "40", "--device", "cpu"]
    assert shown(capsys, run, *words, "--dtype", "float32") == written(run, length=40)
    model, tokenizer, _ = load_model(run)
    dice = torch.from_numpy(np.random.default_rng(0).random((1, 40), np.float32))
    prompts = torch.from_numpy(tokenizer.encode("\n"))[None]
    tokens = generate(model.bfloat16(), prompts, dice).tokens  # type: ignore[operator]
    assert shown(capsys, run, *words, "--dtype", "bfloat16") == tokenizer.decode(tokens[0])


@pytest.mark.filterwarnings("default")
def test_a_run_that_was_stopped_is_sampled_from_its_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    text, folder = write_text(tmp_path), tmp_path / "run"
    changes = {"surgeon": "none", "checkpoint_seconds": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.training.loop.summarise", stop)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(text, folder, **changes), quiet=True)
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    stored = checkpoint.read(newest)["model"]
    tokenizer = CharTokenizer.from_text(load_corpus(text).split("train"))
    model = fresh_like(stored, tokenizer.vocab_size)
    prompts = torch.from_numpy(tokenizer.encode("\n"))[None]
    dice = torch.from_numpy(np.random.default_rng(0).random((1, 30), np.float32))
    expected = tokenizer.decode(generate(model, prompts, dice).tokens[0])
    capsys.readouterr()

    assert avatarl(["sample", str(folder), "--length", "30"]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert err == (
        f"avatarl sample: warning: {folder} has not finished: this is the model of its last "
        f"checkpoint, {newest.name}\n"
    )
    for words in (["evaluate", str(folder)], ["export", str(folder), str(tmp_path / "out")]):
        assert avatarl(words) == 2
        line = capsys.readouterr().err
        assert f"{str(folder)!r} has not finished: its last checkpoint is {newest.name}" in line
        assert line.count("\n") == 1
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in (("n_layers", 9_000), ("n_heads", 10**9), ("width", 10**6)):
        changed = {**settings, "lm": {**settings["lm"], name: value}}
        (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("avatarl_env.lm.gpt.GPT.__init__", stop)
            assert refused(capsys, str(folder)).startswith("run must h")
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with text.open("a", encoding="utf-8") as file:
        file.write("more")
    assert refused(capsys, str(folder)).startswith("corpus ")
    (newest / "tensors.safetensors").write_bytes(b"")
    assert "has not finished and" in refused(capsys, str(folder))
    shutil.rmtree(folder / "checkpoints")
    assert refused(capsys, str(folder)).endswith("has not finished and has none yet")


def fresh_like(weights: dict[str, torch.Tensor], vocab_size: int) -> GPT:
    """Build the model of `small_config` and give it weights."""
    model = GPT(small_config("text").lm.with_vocabulary(vocab_size))
    model.load_state_dict({**weights, "lm_head.weight": weights["embed.weight"]})
    return model.eval()
