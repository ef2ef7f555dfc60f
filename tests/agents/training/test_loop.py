from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3 import SAC

import agents
from agents.evaluation.language_model import evaluate_text
from agents.grpo.learner import GRPOConfig
from agents.surgeons.sb3 import ALGORITHMS
from agents.training import loop as training
from agents.training.build import Generators, Setup
from agents.training.config import BadInput, ModelConfig
from agents.training.curriculum import Curriculum, CurriculumConfig
from agents.training.loop import RunSummary, train
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm.storage import load_model
from avatarl_env.text.ngram import NGramReference
from tests.patients import global_random_states, tiny_text
from tests.training_runs import (
    CE,
    QUICK_SAC,
    same,
    small_config,
    write_text,
)


def rows(run: RunSummary, kind: str | None = None) -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if kind in (None, row["kind"])]


def weights(run: RunSummary) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoints" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text in it."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> RunSummary:
    """Train once, with everything on."""
    return quick_train(folder, "first", seed=3)


def quick_train(folder: Path, name: str, **changes: Any) -> RunSummary:
    sac = ALGORITHMS["sac"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALGORITHMS, "sac", sac._replace(options={**sac.options, **QUICK_SAC}))
        patch.setattr("agents.training.build.N_OPERATIONS", 2)
        patch.setattr("agents.evaluation.surgeon_effect.N_PROMPTS", 8)
        patch.setattr("agents.training.logger.SAMPLE_CHARACTERS", 24)
        config = dataclasses.replace(small_config(folder / "text.txt", folder / name), **changes)
        return train(config, quiet=True, command=f"python train.py --out {name}")


def test_the_run_folder_holds_everything(run: RunSummary) -> None:
    names = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    assert names == {
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


def test_the_configuration_is_stored_with_the_corpus_as_it_was_resolved(
    run: RunSummary, folder: Path
) -> None:
    stored = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    text = (folder / "text.txt").read_bytes()
    assert stored["corpus"] == str(folder / "text.txt")
    assert stored["corpus_sha256"] == hashlib.sha256(text).hexdigest()
    assert stored["out"] == str(run.folder)
    assert (stored["seed"], stored["surgeon"], stored["preset"]) == (3, "sac", "smoke")
    assert stored["lm"] == {"context": 32, "n_layers": 1, "n_heads": 2, "width": 16}
    assert stored["curriculum"]["commit"] == "if_better"


def test_the_summary_answers_every_question(run: RunSummary, folder: Path) -> None:
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(run.summary))
    text = (folder / "text.txt").read_bytes()
    assert summary["corpus"] == str(folder / "text.txt")
    assert summary["corpus_sha256"] == hashlib.sha256(text).hexdigest()
    assert summary["corpus_nats_per_char"] is None
    assert (summary["seed"], summary["preset"], summary["surgeon"]) == (3, "smoke", "sac")
    assert summary["command"] == "python train.py --out first"
    steps = [(phase["name"], phase["steps"]) for phase in summary["phases"]]
    assert steps == [("bootstrap", 6), ("surgery", 2), ("joint", 2)]
    for phase in summary["phases"]:
        assert phase["seconds"] > 0
        assert phase["first"].keys() == phase["last"].keys()
    figures = {"loss", "bits_per_char", "accuracy", "entropy", "calibration_error"}
    assert summary["validation"].keys() == figures
    assert summary["commits"].keys() >= {"policy", "tried", "kept", "operations"}
    assert (summary["commits"]["policy"], summary["commits"]["tried"]) == ("if_better", 2)
    assert summary["surgeon_effect"].keys() == {"verdict", "measurements"}
    measured = [effect["after"] for effect in summary["surgeon_effect"]["measurements"]]
    assert measured == ["surgery", "joint"]
    assert run.verdict == summary["surgeon_effect"]["verdict"]
    assert run.verdict.startswith("The surgeon ")
    practised = [effect["n_practised"] for effect in summary["surgeon_effect"]["measurements"]]
    phases = [row["phase"] for row in rows(run, "operation")]
    assert practised == [phases.count("surgery"), len(phases)]
    for after, n in zip(measured, practised, strict=True):
        assert f"After {after} and {n} operations, sac's operations " in run.verdict
    assert {effect["n_operations"] for effect in summary["surgeon_effect"]["measurements"]} == {2}
    assert summary["environment"].keys() >= {"python", "torch", "device", "threads"}
    assert summary["environment"]["threads"] == 1
    assert summary["environment"]["device"] == "cpu"
    assert summary["n_parameters"] == sum(w.numel() for w in weights(run).values())
    assert summary["seconds"] > sum(phase["seconds"] for phase in summary["phases"])


def test_the_validation_figures_are_of_the_model_that_was_saved(run: RunSummary) -> None:
    env = AttentionSurgeryEnv(lm=str(run.folder), n_prompts=2, prompt_length=4, n_new=8)
    patient = env.patient
    assert patient.corpus.name == run.summary["corpus"]
    metrics = evaluate_text(patient.model, patient.splits["validation"])
    assert metrics._asdict() == pytest.approx(run.summary["validation"])
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert load_model(str(run.folder)).about["made_by"] == "python train.py --out first"


def test_the_reference_figures_are_of_models_counted_on_the_training_text(
    run: RunSummary,
) -> None:
    patient = AttentionSurgeryEnv(str(run.folder), n_prompts=2, prompt_length=4, n_new=8).patient
    references = run.summary["references"]
    assert [row["name"] for row in references] == ["bigram", "trigram", "4-gram", "5-gram"]
    trigram = NGramReference.fit(patient.splits["train"], patient.tokenizer.vocab_size, 3)
    metrics = trigram.evaluate(patient.splits["validation"])
    assert references[1] == {
        "name": "trigram",
        "loss": metrics.loss,
        "bits_per_char": metrics.bits_per_token,
        "accuracy": metrics.accuracy,
        "entropy": metrics.entropy,
    }


def test_the_surgeon_that_was_saved_can_be_loaded(run: RunSummary) -> None:
    final = run.folder / "checkpoints" / "final"
    sac = SAC.load(final / "surgeon.zip", device="cpu")
    env = AttentionSurgeryEnv(str(run.folder), n_prompts=2, prompt_length=4, n_new=8)
    assert sac.observation_space.shape == env.observation_space.shape
    assert sac.action_space == env.action_space
    assert sac._n_updates == rows(run, "surgeon")[-1]["surgeon/n_updates"] > 0


def test_both_learners_really_learned(run: RunSummary) -> None:
    grpo, surgeon = rows(run, "grpo"), rows(run, "surgeon")
    assert [row["update"] for row in grpo] == [1, 5, 10]
    assert {row["phase"] for row in grpo} == {"bootstrap", "joint"}
    assert [row["phase"] for row in surgeon] == ["surgery", "surgery", "joint", "joint"]
    for row in grpo:
        assert math.isfinite(row["grpo/loss"])
        assert row["grpo/grad_norm"] > 0
    for row in surgeon[1:]:
        assert math.isfinite(row["surgeon/actor_loss"])
        assert math.isfinite(row["surgeon/critic_loss"])
    untrained = Setup(small_config(run.summary["corpus"], seed=3)).patient.model
    for name, parameter in untrained.named_parameters():
        assert not torch.equal(parameter, weights(run)[name]), name


def test_every_row_says_where_the_run_stood(run: RunSummary) -> None:
    everything = rows(run)
    kinds = {row["kind"] for row in everything}
    assert kinds == {"grpo", "evaluation", "operation", "surgeon", "commit", "sample"}
    for clock in ("update", "operation", "forward_tokens", "seconds"):
        values = [row[clock] for row in everything]
        assert values == sorted(values)
    assert everything[-1]["update"] == 10
    assert everything[-1]["operation"] == len(rows(run, "operation"))
    assert run.summary["forward_tokens"] == everything[-1]["forward_tokens"]


def test_operations_are_recorded_with_their_terms(run: RunSummary) -> None:
    operations = rows(run, "operation")
    # Two rounds in each of two phases, of two operations on each of three rows; where a patient
    # dies at the first of two steps, there is time for more.
    assert len(operations) >= 24
    assert 24 * 2 - 12 <= sum(row["surgeon/length"] for row in operations) <= 24 * 2
    assert [row["operation"] for row in operations] == list(range(1, len(operations) + 1))
    for row in operations:
        assert len(row["surgeon/coefficients"]) == 4
        if row["surgeon/flatline"] is None:
            improvement = row["score/kl_ref"] - row["baseline/kl_ref"]
            assert row["surgeon/return"] == pytest.approx(improvement, abs=1e-9)


def test_there_are_samples_of_every_phase(run: RunSummary) -> None:
    samples = rows(run, "sample")
    assert [row["phase"] for row in samples] == [
        phase for phase in ("bootstrap", "bootstrap", "surgery", "joint") for _ in range(2)
    ]
    assert [row["update"] for row in samples[:2]] == [0, 0]
    operated = [row["operated_text"] is not None for row in samples]
    assert operated == [False, False, False, False, True, True, True, True]
    text = (run.folder / "samples.txt").read_text(encoding="utf-8")
    for row in samples:
        assert row["text"] in text


def test_the_report_says_the_verdict(run: RunSummary) -> None:
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "operations, sac&#x27;s operations " in page
    assert page.rstrip().endswith("</html>")


TIMES = {"seconds", "time/tokens_per_second"}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_the_same_seed_is_the_same_run(run: RunSummary, folder: Path) -> None:
    torch.rand(7)
    random.random()
    np.random.rand(3)  # noqa: NPY002
    again = quick_train(folder, "again", seed=3)
    assert without_times(rows(again)) == without_times(rows(run))
    ours, theirs = weights(run), weights(again)
    assert same(list(ours.values()), list(theirs.values()))
    summary = without_times(json.loads(json.dumps(again.summary)))
    assert summary | {"command": None} == without_times(json.loads(json.dumps(run.summary))) | {
        "command": None
    }
    samples = [(r.folder / "samples.txt").read_text(encoding="utf-8") for r in (run, again)]
    assert samples[0] == samples[1]


def test_another_seed_is_another_run(without: RunSummary, folder: Path) -> None:
    other = quick_train(folder, "other", seed=4, surgeon="none", **probe())
    assert other.summary["validation"] != without.summary["validation"]
    assert rows(other, "grpo")[0]["grpo/loss"] != rows(without, "grpo")[0]["grpo/loss"]


def probe(**changes: Any) -> dict[str, Any]:
    parts = {
        "bootstrap_updates": 3,
        "surgery_rounds": 1,
        "joint_rounds": 2,
        "updates_per_round": 2,
        "n_rows": 2,
        "operations_per_round": 1,
        "paired_prompts": 4,
        "commit": "probe",
    }
    return {"curriculum": CurriculumConfig(**{**parts, **changes})}


@pytest.fixture(scope="module")
def without(folder: Path) -> RunSummary:
    """Train once without a surgeon."""
    return quick_train(folder, "without", surgeon="none", **probe(commit="if_better"))


def test_a_surgeon_that_only_probes_leaves_the_trained_model_bit_identical(
    without: RunSummary, folder: Path
) -> None:
    probed = quick_train(folder, "probed", **probe())
    assert len(rows(probed, "operation")) >= 6
    assert same(list(weights(probed).values()), list(weights(without).values()))
    assert probed.summary["validation"] == without.summary["validation"]
    assert probed.summary["commits"]["tried"] == 0


def test_without_a_surgeon_there_is_no_surgery_and_the_run_says_so(without: RunSummary) -> None:
    assert without.verdict == "No surgeon operated in this run."
    assert [phase["name"] for phase in without.summary["phases"]] == ["bootstrap", "joint"]
    assert {row["kind"] for row in rows(without)} == {"grpo", "evaluation", "sample"}
    assert without.summary["surgeon_effect"]["measurements"] == []
    final = {path.name for path in (without.folder / "checkpoints" / "final").iterdir()}
    assert final == {"model.json", "model.safetensors"}


def test_a_run_of_nothing_is_a_run_all_the_same(folder: Path) -> None:
    nothing = probe(bootstrap_updates=0, surgery_rounds=0, joint_rounds=0)
    run = quick_train(folder, "nothing", **nothing)
    assert run.summary["phases"] == []
    assert (run.folder / "report.html").exists()
    untrained = Setup(small_config(folder / "text.txt")).patient.model
    assert same([p.detach() for p in untrained.parameters()], [*ordered(run, untrained)])


def ordered(run: RunSummary, model: torch.nn.Module) -> list[torch.Tensor]:
    stored = weights(run)
    return [stored[name] for name, _ in model.named_parameters()]


def test_a_supervised_run_is_called_a_control(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        folder / "text.txt",
        folder / "control",
        surgeon="none",
        grpo=GRPOConfig(batch_size=4, **CE),
        **probe(),
    )
    train(config)
    assert "ce, all_actions, a supervised control, not RL; surgeon none" in capsys.readouterr().out


def test_an_exact_expectation_is_not_called_reinforcement_learning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        folder / "text.txt",
        folder / "exact",
        surgeon="none",
        grpo=GRPOConfig(batch_size=4, exploration="all_actions"),
        **probe(),
    )
    run = train(config)
    out = capsys.readouterr().out
    assert "proper_maxrl, all_actions, the exact expectation, a bound on RL" in out
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Nothing was sampled: it followed the exact expectation of its reward" in page


@pytest.mark.parametrize("operator", ["head_gain", "spectral_bands", "output_temperature"])
def test_a_whole_run_with_every_kind_of_operator(folder: Path, operator: str) -> None:
    short = probe(surgery_rounds=0, joint_rounds=1, commit="if_better")
    run = quick_train(folder, f"with-{operator}", operator=operator, **short)
    stored = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert stored["operator"] == operator
    labels = AttentionSurgeryEnv(
        str(run.folder), operator=operator, n_prompts=2, prompt_length=4, n_new=8
    ).operator.labels
    for row in rows(run, "operation"):
        assert len(row["surgeon/coefficients"]) == len(labels)
    (commit,) = rows(run, "commit")
    assert len(commit["commit/coefficients"]) == len(labels)
    for effect in run.summary["surgeon_effect"]["measurements"]:
        assert effect["kl_ref_gain"]["random"]["mean"] != 0
        assert effect["kl_ref_gain"]["zero"]["mean"] == 0


def test_an_operator_without_row_edits_makes_the_same_run(folder: Path, in_place_gain: str) -> None:
    short = probe(surgery_rounds=0, joint_rounds=1, commit="if_better")
    found, expected = (
        quick_train(folder, f"rows-{name}", operator=name, surgeon="random", **short)
        for name in (in_place_gain, "head_gain")
    )
    for one, other in zip(rows(found, "operation"), rows(expected, "operation"), strict=True):
        assert one["surgeon/coefficients"] == other["surgeon/coefficients"]
        assert one["surgeon/return"] == pytest.approx(other["surgeon/return"], abs=1e-4)
    gains = [
        [effect["kl_ref_gain"] for effect in run.summary["surgeon_effect"]["measurements"]]
        for run in (found, expected)
    ]
    for mine, theirs in zip(*gains, strict=True):
        for policy in ("surgeon", "random", "zero"):
            assert mine[policy] == pytest.approx(theirs[policy], abs=1e-4)


def test_an_operator_that_does_not_fit_the_model_is_refused_before_a_folder_is_made(
    folder: Path,
) -> None:
    tiny = ModelConfig(context=32, n_layers=1, n_heads=1, width=2)
    with pytest.raises(BadInput, match=r"^n_bands must be in \[2, 2\], got 4$"):
        quick_train(folder, "refused", lm=tiny, operator="spectral_bands")
    assert not (folder / "refused").exists()


def test_training_leaves_the_global_generators_and_threads_alone(folder: Path) -> None:
    torch.set_num_threads(1)
    before = global_random_states()
    quick_train(folder, "alone", threads=2, **probe(joint_rounds=0))
    assert global_random_states() == before
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "tinyshakespear"}, r"corpus must be one of .*mean 'tinyshakespeare'\?\)"),
        (
            {"lm": ModelConfig(context=200, n_layers=1, n_heads=1, width=2)},
            "context must be less than 200, the length of the 'surgeon' split .*, got 200",
        ),
        ({"device": "cudda"}, "device must be one that torch has, got 'cudda': .*"),
        ({"device": "meta"}, "device must be one that torch has, got 'meta': .*"),
        (
            probe(n_rows=2**50),
            r"n_rows \* n_prompts texts must fit the memory, .*",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=f"^{message}$"):
        quick_train(folder, "refused", **changes)
    assert not (folder / "refused").exists()


def test_the_longest_context_that_fits_the_splits_fits_all_of_the_run(folder: Path) -> None:
    # The surgeon's split has 200 characters: windows of 199 and their last target.
    run = quick_train(
        folder,
        "long",
        lm=ModelConfig(context=199, n_layers=1, n_heads=1, width=2),
        surgeon="random",
        **probe(commit="if_better", joint_rounds=1),
    )
    assert run.summary["commits"]["tried"] == 1


def test_an_unknown_mode_of_wandb_is_refused_before_a_folder_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "quux")
    with pytest.raises(BadInput, match=r"^WANDB_MODE must be one of .*'quux'$"):
        quick_train(folder, "refused", track=None)
    assert not (folder / "refused").exists()


def test_a_folder_that_holds_anything_is_left_as_it_is(run: RunSummary, folder: Path) -> None:
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(BadInput, match=r"^out must be an empty or new folder, got .* which holds"):
        quick_train(folder, "first")
    assert sorted(run.folder.rglob("*")) == before


def test_a_fault_of_ours_is_not_blamed_on_the_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr(Curriculum, "steps", fail)
    with pytest.raises(ValueError, match=r"^boom$") as caught:
        quick_train(folder, "fault")
    assert not isinstance(caught.value, BadInput)


def test_a_run_without_a_name_on_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = train(small_config("text.txt", surgeon="none", **probe(joint_rounds=0)), quiet=True)
    assert run.folder.parent == Path("runs")
    assert run.folder.name.endswith("-smoke")
    # The text can be found again from anywhere.
    stored = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert stored["corpus"] == run.summary["corpus"] == str(tmp_path / "text.txt")
    assert run.summary["command"] is None
    assert load_model(str(run.folder)).about["made_by"] == "agents.train"


def test_every_consumer_has_a_generator_of_its_own() -> None:
    def draws(seed: int) -> list[float]:
        g = Generators.spawn(seed)
        streams = (g.grpo, g.commit, g.effect, g.samples)
        return [float(torch.rand(1, generator=g.init)), *(float(s.random()) for s in streams)]

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 10
    seeds = {Generators.spawn(seed).surgeon_seed for seed in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_python_interface_is_as_short_as_promised(folder: Path) -> None:
    assert agents.train is training.train
    assert agents.RunSummary is RunSummary
    assert agents.TrainConfig is type(small_config(folder / "text.txt"))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        agents.trian  # noqa: B018


def test_characters_of_held_out_text_alone_are_unknown(tmp_path: Path) -> None:
    text = tiny_text(4000)
    path = tmp_path / "text.txt"
    path.write_text(text[:-3] + "\u20ac\u20ac\n", encoding="utf-8")
    run = train(small_config(path, tmp_path / "out", surgeon="none"), quiet=True)
    assert run.summary["validation_unknown_characters"] == 2
    about = json.loads((run.folder / "checkpoints" / "final" / "model.json").read_text("utf-8"))
    assert "\u20ac" not in about["tokenizer"]["characters"]
