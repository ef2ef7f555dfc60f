"""Tests of agents/training/loop.py: whole runs, as users see them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agents
from agents.cli import main as cli
from agents.distributed import ALONE
from agents.errors import BadInput
from agents.evaluation.language_model import evaluate_text
from agents.grpo.config import GRPOConfig
from agents.state import flatten
from agents.training import checkpoint
from agents.training.build import build
from agents.training.config import TrainConfig
from agents.training.curriculum import Curriculum
from agents.training.loop import train
from agents.training.presets import ModelConfig
from agents.training.summary import RunSummary, introduction
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model
from avatarl_env.surgery import HeadGain, SurgicalTheater, find_targets
from avatarl_env.text.corpus import load_corpus
from avatarl_env.text.ngram import NGramReference
from tests.agents.training.broken_runs import QUICK, assert_same_run, config
from tests.patients import tiny_text
from tests.training_runs import (
    CE,
    SmallRun,
    final_weights,
    flags,
    rows_of,
    same,
    small_config,
    small_curriculum,
)

SHORT = small_curriculum(
    bootstrap_updates=2, surgery_rounds=1, operations_per_round=1, updates_per_round=1
)
ONE_ROUND = dataclasses.replace(SHORT, surgery_rounds=0, joint_rounds=1)


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


# What a run leaves.


def test_the_run_folder_holds_everything(whole: RunSummary) -> None:
    files = (p.relative_to(whole.folder) for p in whole.folder.rglob("*") if p.is_file())
    assert {str(p) for p in files if not p.match("checkpoints/step-*/*")} == {
        ".lock",
        "config.json",
        "references.json",
        "metrics.jsonl",
        "summary.json",
        "samples.txt",
        "report.html",
        "checkpoints/best/model.json",
        "checkpoints/best/model.safetensors",
        "checkpoints/final/model.json",
        "checkpoints/final/model.safetensors",
        "checkpoints/final/surgeon.json",
        "checkpoints/final/surgeon.zip",
        "checkpoints/final/surgeon_normalisation.json",
    }
    assert whole.verdict in (whole.folder / "report.html").read_text().replace("&#x27;", "'")


def test_the_settings_are_stored_as_they_were_resolved(whole: RunSummary, text: Path) -> None:
    stored = read(whole.folder, "config.json")
    assert stored["corpus"] == str(text)
    assert stored["corpus_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (stored["out"], stored["processes"]) == (str(whole.folder), 1)
    assert (stored["seed"], stored["surgeon"], stored["preset"]) == (0, "sac", "smoke")
    assert stored["lm"] == {"context": 32, "n_layers": 1, "n_heads": 2, "width": 16}
    assert stored["curriculum"]["commit"] == "if_better"


def test_the_summary_answers_every_question(whole: RunSummary) -> None:
    summary = read(whole.folder, "summary.json")
    assert summary == json.loads(json.dumps(whole.summary))
    stored = read(whole.folder, "config.json")
    for name in ("corpus", "corpus_sha256", "preset", "seed", "surgeon", "operator", "score"):
        assert summary[name] == stored[name]
    assert summary["corpus_nats_per_char"] is None
    steps = [(phase["name"], phase["steps"]) for phase in summary["phases"]]
    assert steps == [("bootstrap", 6), ("surgery", 2), ("joint", 2)]
    assert summary["seconds"] > sum(phase["seconds"] for phase in summary["phases"])
    effects = summary["surgeon_effect"]["measurements"]
    practised = [row["phase"] for row in rows_of(whole, "operation")]
    found = [(effect["after"], effect["n_practised"]) for effect in effects]
    assert found == [("surgery", practised.count("surgery")), ("joint", len(practised))]
    assert [(effect["n_operations"], effect["n_prompts"]) for effect in effects] == [(2, 8)] * 2
    assert whole.verdict.startswith("The surgeon ")
    for after, n in found:
        assert f"After {after} and {n} operations, sac's operations " in whole.verdict
    expected = {"device": "cpu", "threads": 1, "processes": 1, "torch": torch.__version__}
    assert summary["environment"].items() >= expected.items()
    assert summary["n_parameters"] == sum(w.numel() for w in final_weights(whole).values())
    assert (summary["skipped_updates"], summary["validation_unknown_characters"]) == (0, 0)


def test_figures_are_of_the_stored_model_and_of_tables_of_its_text(whole: RunSummary) -> None:
    env = AttentionSurgeryEnv(str(whole.folder), n_prompts=2, prompt_length=4, n_new=8)
    patient, summary = env.patient, whole.summary
    assert patient.corpus.name == summary["corpus"]
    validation = patient.splits["validation"]
    found = evaluate_text(patient.model, validation)._asdict()
    assert found == pytest.approx(summary["validation"])
    references = summary["references"]
    assert [row["name"] for row in references] == ["bigram", "trigram", "4-gram", "5-gram"]
    assert read(whole.folder, "references.json")["references"] == references
    trigram = NGramReference.fit(patient.splits["train"], patient.tokenizer.vocab_size, 3)
    expected = trigram.evaluate(validation)
    assert (references[1]["loss"], references[1]["accuracy"]) == (expected.loss, expected.accuracy)
    assert summary["model_beats_reference"] is (found["loss"] < references[-1]["loss"])
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


def untrained(text: Path) -> GPT:
    """Return the model that a run with seed 0 begins with."""
    return build(small_config(text), load_corpus(str(text)), ALONE).patient.model


def test_training_changes_every_parameter(whole: RunSummary, text: Path) -> None:
    weights = final_weights(whole)
    for name, parameter in untrained(text).named_parameters():
        assert not torch.equal(parameter, weights[name]), name


# The same run, and other runs.


def test_the_same_seed_gives_the_same_run(whole: RunSummary, text: Path, tmp_path: Path) -> None:
    torch.rand(7)
    torch.set_num_threads(2)
    try:
        asked = config(text, tmp_path / "run", checkpoint_seconds=60.0)
        again = train(asked, quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert_same_run(again.folder, whole.folder)


@pytest.fixture(scope="module")
def unoperated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """Train without a surgeon."""
    folder = tmp_path_factory.mktemp("unoperated") / "run"
    asked = small_config(text, folder, surgeon="none", curriculum=SHORT, checkpoint_seconds=0)
    return train(asked, quiet=True, command="train it")


def test_without_a_surgeon_nothing_operates_and_the_run_says_so(unoperated: RunSummary) -> None:
    assert unoperated.verdict.startswith("No surgeon operated in this run")
    assert [phase["name"] for phase in unoperated.summary["phases"]] == ["bootstrap", "joint"]
    assert {row["kind"] for row in rows_of(unoperated)} == {"grpo", "evaluation", "sample"}
    assert unoperated.summary["surgeon_effect"]["measurements"] == []
    assert unoperated.summary["commits"]["tried"] == 0
    final = unoperated.folder / "checkpoints" / "final"
    assert {path.name for path in final.iterdir()} == {"model.json", "model.safetensors"}
    assert unoperated.summary["command"] == "train it"
    assert load_model(str(unoperated.folder)).about["made_by"] == "train it"


def learned(run: RunSummary) -> tuple[Any, list[torch.Tensor]]:
    """Read the model and all that its learner keeps, the optimizer's state above all."""
    path = checkpoint.latest(run.folder)
    assert path is not None
    state = checkpoint.read(path)
    values, tensors = flatten({name: state[name] for name in ("model", "learner")})
    return values, [*tensors.values()]


@pytest.mark.parametrize(
    ("surgeon", "commit", "options"), [("sac", "probe", QUICK), ("zero", "if_better", {})]
)
def test_a_surgeon_that_commits_nothing_leaves_the_model_bit_identical(
    surgeon: str,
    commit: str,
    options: dict[str, Any],
    unoperated: RunSummary,
    small_run: SmallRun,
) -> None:
    curriculum = dataclasses.replace(SHORT, commit=commit)
    run = small_run(
        surgeon=surgeon, surgeon_options=options, curriculum=curriculum, checkpoint_seconds=0
    )
    assert len(rows_of(run, "operation")) >= 9
    assert run.summary["commits"]["tried"] == (2 if commit == "if_better" else 0)
    assert run.summary["validation"] == unoperated.summary["validation"]
    values, tensors = learned(run)
    expected, others = learned(unoperated)
    assert values == expected
    assert same(tensors, others)


def test_another_seed_is_another_run(unoperated: RunSummary, small_run: SmallRun) -> None:
    other = small_run(surgeon="none", curriculum=SHORT, checkpoint_seconds=0, seed=4)
    assert other.summary["validation"] != unoperated.summary["validation"]
    assert not same(learned(other)[1], learned(unoperated)[1])


def test_under_rollout_the_operated_model_samples_and_nothing_is_committed(
    small_run: SmallRun,
) -> None:
    grpo = GRPOConfig(estimator="rloo", batch_size=4, group_size=4)
    curriculum = dataclasses.replace(SHORT, commit="rollout", joint_rounds=3)
    run = small_run(surgeon="random", grpo=grpo, curriculum=curriculum)
    choices = rows_of(run, "behavior")
    assert len(choices) == 3
    assert any(row["behavior/operated"] for row in choices)
    for row in choices:
        assert (row["behavior/gain"] is not None) is row["behavior/operated"]
        assert (row["behavior/coefficients"] is not None) is row["behavior/operated"]
    assert run.summary["commits"]["tried"] == 0


# Phases, operators and estimators.


def test_a_run_without_phases_stores_the_untrained_model(small_run: SmallRun, text: Path) -> None:
    nothing = small_curriculum(bootstrap_updates=0, surgery_rounds=0, joint_rounds=0)
    run = small_run(curriculum=nothing)
    assert run.summary["phases"] == []
    assert (run.folder / "report.html").exists()
    weights = final_weights(run)
    assert all(torch.equal(p, weights[name]) for name, p in untrained(text).named_parameters())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (CE, "ce, all_actions, a supervised control, not RL"),
        (
            {"exploration": "all_actions"},
            "all_actions, the exact expectation, an upper bound for RL",
        ),
    ],
)
def test_what_is_not_reinforcement_learning_is_not_called_so(
    recipe: dict[str, Any], words: str, text: Path
) -> None:
    config = small_config(text, surgeon="none", grpo=GRPOConfig(**recipe))
    parts = build(config, load_corpus(str(text)), ALONE)
    assert f"{words}; surgeon none; into run" in introduction(parts, Path("run"))


# Score and layers.

CHOSEN: dict[str, Any] = {
    "score": {"kl_ref": 1.0, "heldout_loss": 20.0},
    "layers": (1,),
    "lm": ModelConfig(context=32, n_layers=2, n_heads=2, width=16),
    "surgeon": "random",
    "curriculum": SHORT,
}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """Train from the command line with a score and layers, on a text with unknown characters."""
    folder = tmp_path_factory.mktemp("chosen")
    text = folder / "other.txt"
    text.write_text(tiny_text(4000)[:-3] + "\u20ac\u20ac\n", encoding="utf-8")
    assert cli.main(flags(small_config(text, folder / "run", **CHOSEN))) == 0
    return RunSummary(folder / "run", read(folder / "run", "summary.json"))


def test_a_run_pays_the_score_that_was_chosen(chosen: RunSummary) -> None:
    for record in (read(chosen.folder, "config.json"), chosen.summary):
        assert record["score"] == CHOSEN["score"]
        assert record["layers"] == [1]
    rows = [row for row in rows_of(chosen, "operation") if row["surgeon/flatline"] is None]
    assert rows
    for row in rows:
        gain = row["score/kl_ref"] - row["baseline/kl_ref"]
        gain += 20 * (row["baseline/heldout_loss"] - row["score/heldout_loss"])
        assert row["surgeon/return"] == pytest.approx(gain, abs=1e-5)
    for effect in chosen.summary["surgeon_effect"]["measurements"]:
        assert effect["score"] == "kl_ref + 20 heldout_loss"
        assert effect["score_gain"]["zero"]["mean"] == 0.0
    assert "its own score (kl_ref + 20 heldout_loss)" in chosen.verdict


def test_characters_of_held_out_text_alone_are_unknown(chosen: RunSummary) -> None:
    assert chosen.summary["validation_unknown_characters"] == 2
    about = read(chosen.folder / "checkpoints" / "final", "model.json")
    assert "\u20ac" not in about["tokenizer"]["characters"]


def test_commands_go_by_the_runs_score_and_layers(
    chosen: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(chosen.folder)
    assert cli.avatarl(["evaluate", folder, "--surgeon", folder, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["surgeon_effect"]["measurement"]["score"] == "kl_ref + 20 heldout_loss"
    words = ["--length", "300", "--coefficients", "1", "-1", "1", "1"]
    assert cli.avatarl(["sample", folder, *words]) == 0
    model, tokenizer, _ = load_model(folder)
    prompts = torch.from_numpy(tokenizer.encode("\n"))[None]
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 300), np.float32))

    def written(layers: list[int] | None) -> str:
        operator = HeadGain(find_targets(model, layers))
        with SurgicalTheater(model, [operator]) as theater:
            operator.apply(theater, [1.0, -1.0, 1.0, 1.0])
            return tokenizer.decode(generate(model, prompts, noise).tokens[0])

    assert written([1]) != written(None)
    assert capsys.readouterr().out.endswith(f"\n{written([1])}\n")


# What is refused.


def test_a_used_folder_is_left_as_it_is(whole: RunSummary, text: Path) -> None:
    before = sorted(whole.folder.rglob("*"))
    with pytest.raises(BadInput, match=r"^out must be an empty or new folder, got .* which holds"):
        train(small_config(text, whole.folder), quiet=True)
    assert sorted(whole.folder.rglob("*")) == before


def test_a_fault_of_the_program_is_not_blamed_on_the_input(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr(Curriculum, "update", fail)
    with pytest.raises(ValueError, match=r"^boom$") as caught:
        small_run(surgeon="none")
    assert not isinstance(caught.value, BadInput)
    assert (tmp_path / "run" / "report.html").exists()


# Texts and folders.


def test_the_longest_context_that_fits_the_splits_fits_all_of_a_run(small_run: SmallRun) -> None:
    # The surgeon's split has 200 characters: windows of 199 and their last target.
    lm = ModelConfig(context=199, n_layers=1, n_heads=1, width=2)
    run = small_run(lm=lm, surgeon="random", curriculum=ONE_ROUND)
    assert run.summary["commits"]["tried"] == 1


def test_the_python_interface() -> None:
    public: tuple[Callable[..., Any], ...] = (agents.train, agents.RunSummary, agents.TrainConfig)
    assert public == (train, RunSummary, TrainConfig)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        agents.trian  # noqa: B018
