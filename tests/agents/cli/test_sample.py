"""Tests of agents/cli/sample.py and agents/cli/operation.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.cli.main import avatarl
from agents.training import checkpoint
from agents.training.curriculum import CurriculumConfig
from agents.training.loop import train
from avatarl_env.lm.export import export_model
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.surgery import SurgicalTheater, find_targets, make_operator
from avatarl_env.text.corpus import load_corpus
from tests.agents.cli import commands
from tests.agents.cli.commands import refused
from tests.patients import store_tiny_patient
from tests.training_runs import small_config, write_text

C = [0.9, -0.8, 0.7, -0.6]  # head_gain on two heads
CLOCK = {"phase": "joint", "update": 1, "operation": 1, "forward_tokens": 1, "seconds": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Return a stored model, untrained, with a context of 64."""
    return store_tiny_patient(tmp_path / "model")


def written(
    run: str,
    prompt: str = "\n",
    length: int = 40,
    seed: int = 0,
    temperature: float = 1.0,
    coefficients: list[float] | None = None,
    operator: str = "head_gain",
) -> str:
    """Write with the library what the command should."""
    model, tokenizer, _ = load_model(run)
    if coefficients is not None:
        surgery = make_operator(operator, find_targets(model))
        with SurgicalTheater(model, [surgery]) as theater:
            surgery.apply(theater, coefficients)
            theater.commit()
    prompts = torch.from_numpy(tokenizer.encode(prompt))[None]
    noise = torch.from_numpy(np.random.default_rng(seed).random((1, length), np.float32))
    return tokenizer.decode(generate(model, prompts, noise, temperature=temperature).tokens[0])


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    return commands.shown(capsys, "sample", *words)


def both(run: str, length: int, **operation: Any) -> str:
    plain, operated = written(run, length=length), written(run, length=length, **operation)
    assert plain != operated
    return f"--- text\n{plain}\n--- text of the operated model\n{operated}"


def save(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def save_rows(path: Path, *rows: dict[str, Any], end: str = "") -> str:
    lines = [json.dumps({"kind": "grpo", **CLOCK, **row}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, end]), encoding="utf-8", newline="\n")
    return str(path)


def as_run(tmp_path: Path, operator: str) -> Path:
    """Store a model as a finished run has it; return the run's folder."""
    folder = tmp_path / "run"
    store_tiny_patient(folder / "checkpoints" / "final")
    save(folder / "config.json", {"operator": operator, "operation": {}})
    return folder


# --- what is written -----------------------------------------------------------------------------


def test_it_writes_far_beyond_the_context(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run, "--length", "90")
    assert len(text) == 91
    assert text == written(run, length=90)


def test_everything_can_be_chosen(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a ten", "--length", "20", "--seed", "4", "--temperature", "0.5"]
    assert shown(capsys, run, *words) == written(run, "a ten", 20, 4, 0.5)
    words = ["--length", "20", "--device", "cpu"]
    assert shown(capsys, run, *words, "--dtype", "float32") == written(run, length=20)
    model, tokenizer, _ = load_model(run)
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 20), np.float32))
    prompts = torch.from_numpy(tokenizer.encode("\n"))[None]
    tokens = generate(model.bfloat16(), prompts, noise).tokens  # type: ignore[operator]
    assert shown(capsys, run, *words, "--dtype", "bfloat16") == tokenizer.decode(tokens[0])


def test_several_texts_have_noise_of_their_own(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, run, "--n", "2", "--length", "30", "--prompt", "a")
    first, second = text.removeprefix("=== 1\n").split("\n\n=== 2\n")
    assert first == written(run, "a", 30)
    assert second != first
    assert len(second) == 31


def test_only_the_most_probable_characters_are_sampled(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run, "--length", "40"]
    assert len({shown(capsys, *words, "--top-k", "1", "--seed", seed) for seed in "01"}) == 1
    assert shown(capsys, *words, "--top-k", "1000") == written(run, length=40)
    assert shown(capsys, *words, "--top-k", "2") != written(run, length=40)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_prompt_may_come_from_a_file_or_standard_input(
    mark: str,
    run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = "a\nten\n"
    path = tmp_path / "prompt.txt"
    path.write_bytes((mark + prompt).encode())
    expected = written(run, prompt, 20)
    assert shown(capsys, run, "--length", "20", "--prompt-file", str(path)) == expected
    with path.open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert shown(capsys, run, "--length", "20", "--prompt-file", "-") == expected


def test_the_bundled_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "bundled", "--length", "40", "--prompt", "KING:\n")
    assert text.startswith("KING:\n")
    assert len(text) == 46


def test_an_exported_model_writes_the_same(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, out = load_model(run), str(tmp_path / "out")
    assert isinstance(stored.model, GPT)
    export_model(out, stored.model, stored.tokenizer)  # type: ignore[arg-type]
    assert avatarl(["sample", out, "--length", "90"]) == 0
    expected = written(run, length=90)
    assert expected.count("\ufffd") < 5  # a special token there, which is not text
    assert capsys.readouterr().out == expected.replace("\ufffd", "") + "\n"
    for model, unknown in ((out, "aéÜé"), (run, "Üé")):
        assert avatarl(["sample", model, "--prompt", "aéÜé"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"prompt must be of characters that the model knows, got {unknown!r}" in line


# --- operations ----------------------------------------------------------------------------------


def test_an_operation_is_performed_on_the_same_noise(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run, "--length", "40"]
    assert shown(capsys, *words, "--coefficients", *map(str, C)) == both(run, 40, coefficients=C)
    named = ["--operator", "output_temperature", "--coefficients", "-1"]
    expected = both(run, 40, coefficients=[-1], operator="output_temperature")
    assert shown(capsys, *words, *named) == expected


def test_an_operation_in_a_file_has_operator_and_options(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "operator": "head_gain",
        "operator_options": {"tied": False},
        "coefficients": [0, 0, 0, 0, 1, -1, 1, -1],
    }
    path = save(tmp_path / "operation.json", content)
    text = shown(capsys, run, "--operation", path, "--length", "40")
    plain, operated = text.removeprefix("--- text\n").split("\n--- text of the operated model\n")
    assert plain == written(run) != operated
    content["operator_options"] = {"tid": False}
    path = save(tmp_path / "operation.json", content)
    assert "tid" in refused(capsys, "sample", run, "--operation", path)


def test_operator_and_operation_come_from_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_run(tmp_path, "output_temperature")
    expected = both(str(folder), 30, coefficients=[0.5], operator="output_temperature")
    for run in (folder, folder / "checkpoints" / "final"):
        words = ["--length", "30", "--coefficients", "0.5"]
        assert shown(capsys, str(run), *words) == expected
    record = {"commits": {"operations": [{"coefficients": [0.1]}, {"coefficients": [0.5]}]}}
    rows = save_rows(
        folder / "metrics.jsonl",
        {"surgeon/coefficients": [0.1]},
        {"commit/coefficients": [0.5], "commit/kept": False},
        {"text": "a\u2028b\x85c\x1cd"},  # no line ends here
        end='{"kind": "oper',  # still being written
    )
    for path in (save(folder / "summary.json", record), rows):
        words = ["--length", "30", "--operation", path]
        assert shown(capsys, str(folder), *words) == expected


@pytest.mark.filterwarnings("default")
def test_an_operation_that_was_committed_is_performed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_run(tmp_path, "output_temperature")
    record = {"commits": {"operations": [{"coefficients": [0.5], "kept": True}]}}
    path = save(folder / "summary.json", record)
    assert avatarl(["sample", str(folder), "--operation", path, "--length", "30"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("avatarl sample: warning: this operation was committed")
    assert err.count("\n") == 1
    assert out == both(str(folder), 30, coefficients=[0.5], operator="output_temperature") + "\n"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        (["--prompt", ""], "prompt must not be empty", "''"),
        (["--prompt", "a", "--prompt-file", "x"], "prompt must not be given with prompt_file", ""),
        (["--length", "0"], "length must be at least 1", "got 0"),
        (["--n", "-2"], "n must be at least 1", "got -2"),
        (["--top-k", "0"], "top_k must be at least 1", "got 0"),
        (["--seed", "-1"], "seed must not be negative", "got -1"),
        (["--temperature", "0"], "temperature must be positive and finite", "got 0.0"),
        (["--temperature", "nan"], "temperature must be positive and finite", "got nan"),
        (["--coefficients", "1", "2"], "coefficients must be 4 numbers for head_gain", "got 2"),
        (["--coefficients", "1", "2", "nan", "3"], "coefficients must be finite", "nan, 3.0]"),
        (["--coefficients", "1", "--operator", "headgain"], "operator must", "mean 'head_gain'?"),
        (["--operator", "head_gain"], "operator must come with coefficients", ""),
        (["--coefficients", "1", "--operation", "x.json"], "operation must not be given with", ""),
        (["--operation", "x.json"], "file 'x.json' must be readable: No such file", ""),
        (["--operation", "x.jsonl"], "file 'x.jsonl' must be a run's metrics.jsonl", ""),
        (["--dtype", "float8"], "dtype must be one of ", "'float8'"),
        (["--device", "tpu"], "device must be one that torch has, got 'tpu'", ""),
        (["--device", "meta"], "device must be one that torch has, got 'meta'", ""),
        (["--n", str(10**12)], "n times length must fit the memory, ", ""),
        (["--prompt-file", "/dev/zero"], "prompt_file '/dev/zero' must have 1 to 16,777,216", ""),
        (["--prompt-file", "."], "prompt_file '.' must be readable: Is a directory", ""),
        (["--prompt-file", "none"], "prompt_file 'none' must be readable: No such file", ""),
    ],
)
def test_bad_input_gets_one_line(
    run: str, words: list[str], start: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "sample", run, *words)
    assert line.startswith(start)
    assert end in line


@pytest.mark.parametrize(
    ("flag", "name", "content", "rule"),
    [
        ("--operation", "a.json", "{", "must hold JSON"),
        ("--operation", "a.json", "[1, 2]", "must hold coefficients"),
        ("--operation", "a.json", '{"coefficients": ["1"]}', "must hold coefficients"),
        ("--operation", "a.json", '{"commits": {"operations": []}}', "must hold coefficients"),
        ("--operation", "a.json", '{"coefficients": [1], "operator_options": 3}', "got 3"),
        ("--operation", "a.json", '{"coefficients": [1], "layers": 3}', "got 3"),
        ("--operation", "a.jsonl", '{"coefficients": [1]}\nno row\n', "must hold coefficients"),
        ("--prompt-file", "a.txt", "", "must have 1 to 16,777,216 bytes, got 0"),
        ("--prompt-file", "a.txt", b"\xff\xfe", "must be UTF-8 text"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_refused(
    flag: str,
    name: str,
    content: str | bytes,
    rule: str,
    run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    line = refused(capsys, "sample", run, flag, str(path))
    assert rule in line
    assert str(path) in line


# --- a run that has not finished -----------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Stop a run before it has finished; return its folder."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    plan = CurriculumConfig(bootstrap_updates=2, joint_rounds=0, surgery_rounds=0)
    changes = {"surgeon": "none", "checkpoint_seconds": 0.0, "curriculum": plan}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.training.run.summarise", stop)
        with pytest.raises(KeyboardInterrupt):
            train(small_config(write_text(tmp_path), folder, **changes), quiet=True)
    return folder


def load_settings(run: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return settings


@pytest.mark.filterwarnings("default")
def test_an_unfinished_run_is_sampled_from_its_newest_checkpoint(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = load_settings(stopped)["corpus"]
    newest = checkpoint.checkpoints(stopped / "checkpoints")[-1]
    weights = checkpoint.read(newest)["model"]
    tokenizer = CharTokenizer.from_text(load_corpus(text).split("train"))
    model = GPT(small_config("text").lm.with_vocabulary(tokenizer.vocab_size))
    model.load_state_dict({**weights, "lm_head.weight": weights["embed.weight"]})
    prompts = torch.from_numpy(tokenizer.encode("\n"))[None]
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 30), np.float32))
    expected = tokenizer.decode(generate(model.eval(), prompts, noise).tokens[0])

    assert avatarl(["sample", str(stopped), "--length", "30"]) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert err.startswith(f"avatarl sample: warning: {stopped} has not finished: ")
    assert err.endswith(f"{newest.name}\n")
    for words in (["evaluate", str(stopped)], ["export", str(stopped), "out"]):
        line = refused(capsys, *words)
        assert f"{str(stopped)!r} has not finished: its last checkpoint is {newest.name}" in line
