"""A run that was broken off goes on to the very same end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.evaluation.language_model import REFERENCE_NAMES
from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.learner import GRPOLearner
from agents.training import checkpoint
from agents.training.checkpoint import locked
from agents.training.config import BadInput, TrainConfig
from agents.training.curriculum import CurriculumConfig
from agents.training.loop import RunSummary, train
from agents.training.resume import Checkpointer, Stopped
from agents.training.stored import config_to_resume, stored_run
from tests.agents.report.pages import Page
from tests.agents.training.broken_runs import (
    KILLS,
    Kill,
    assert_same_run,
    config,
    count_calls,
    killed,
    random_kill,
    rows,
)

N_CHECKPOINTS = 10  # of a whole run: 6 updates, 2 rounds of surgery, 2 joint ones


class BrokenOff(Exception):
    """Somebody pulled the plug."""


def break_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a run break off right after so many checkpoints."""
    write = Checkpointer.write

    def plug(self: Checkpointer, progress: Any) -> None:
        write(self, progress)
        if self.n_written == after:
            raise BrokenOff

    monkeypatch.setattr(Checkpointer, "write", plug)


# Six updates, two rounds of surgery, three joint ones: the second and third under an operation.
UNDER_OPERATION = {
    "grpo": GRPOConfig(estimator="grpo", batch_size=4, group_size=4, warmup_updates=2),
    "curriculum": CurriculumConfig(
        bootstrap_updates=6,
        surgery_rounds=2,
        joint_rounds=3,
        updates_per_round=2,
        n_rows=3,
        commit="rollout",
        evaluate_every=4,
    ),
}
TEXTS_OF_OLD = {
    "grpo": GRPOConfig(estimator="cispo", batch_size=2, group_size=4, horizon=4, sync_every=4),
    "surgeon": "random",
    "surgeon_options": {},
}
RECIPES: dict[str, dict[str, Any]] = {
    "under-operation": UNDER_OPERATION,
    "texts-under-operation": {**UNDER_OPERATION, **TEXTS_OF_OLD},
    "texts-of-an-older-policy": TEXTS_OF_OLD,
}


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("under-operation", 9),
        ("under-operation", 10),
        ("texts-under-operation", 9),
        ("texts-of-an-older-policy", 3),  # between two synchronisations
    ],
)
def test_a_run_that_others_sample_for_goes_on_to_the_very_same_end(
    name: str, after: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = RECIPES[name], tmp_path / "run"
    expected = train(config(text, tmp_path / "whole", **recipe), quiet=True)
    with monkeypatch.context() as patch:
        break_off(patch, after)
        with pytest.raises(BrokenOff):
            train(config(text, folder, **recipe), quiet=True)
    asked: list[bool] = []
    update = GRPOLearner.update

    def spy(self: GRPOLearner, operated: Any = None) -> Any:
        asked.append(operated is not None)
        return update(self, operated)

    monkeypatch.setattr(GRPOLearner, "update", spy)
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, expected.folder)
    if "under-operation" in name:
        behavior = [row["behavior/operated"] for row in rows(folder) if row["kind"] == "behavior"]
        assert len(behavior) == 3
        assert behavior[after - 9]  # so that there was something to go on with
        assert asked == [behavior[after - 9]] * 2 + [behavior[1]] * (2 * (10 - after))


@pytest.mark.parametrize("after", [1, 5, 6, 7, 8, 9, 10])
def test_a_run_goes_on_from_any_step_to_the_very_same_end(
    after: int, text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_off(patch, after)
        with pytest.raises(BrokenOff):
            train(config(text, folder), quiet=True)
    torch.rand(5)
    resumed = train(TrainConfig(resume=str(folder)), quiet=True)
    assert resumed.folder == folder
    assert resumed.summary["checkpoints"]["written"] == N_CHECKPOINTS - after
    assert_same_run(folder, whole.folder)


def test_a_run_may_be_broken_off_again_and_again(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    asked = config(text, folder)
    for _ in range(4):
        with monkeypatch.context() as patch:
            break_off(patch, 2)
            with pytest.raises(BrokenOff):
                train(asked, quiet=True)
        asked = TrainConfig(resume=str(folder))
    train(asked, quiet=True)
    assert_same_run(folder, whole.folder)


def test_what_was_done_after_the_last_checkpoint_is_done_again(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        n_steps = iter(range(100))

        def every_third(self: Checkpointer, progress: Any) -> None:
            step = next(n_steps)
            if step % 3 == 2:
                self.write(progress)
            if step == 7:
                raise BrokenOff

        patch.setattr(Checkpointer, "stepped", every_third)
        with pytest.raises(BrokenOff):
            train(config(text, folder), quiet=True)
    assert len(rows(folder)) > 0
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, whole.folder)


def test_a_run_without_a_checkpoint_yet_begins_anew(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise BrokenOff

        patch.setattr(Checkpointer, "stepped", fail)
        with pytest.raises(BrokenOff):
            train(config(text, folder), quiet=True)
    assert checkpoint.checkpoints(folder / "checkpoints") == []
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, whole.folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(
    number: signal.Signals,
    text: Path,
    whole: RunSummary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, update = tmp_path / "run", GRPOLearner.update
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:

        def interrupted(self: GRPOLearner, *operated: Any) -> Any:
            if self.n_done == 3:
                os.kill(os.getpid(), number)
            return update(self, *operated)

        patch.setattr(GRPOLearner, "update", interrupted)
        with pytest.raises(Stopped) as caught:
            train(config(text, folder, checkpoint_seconds=1e9), quiet=True)
    assert caught.value.signum == number
    assert str(folder) in str(caught.value)
    assert {one: signal.getsignal(one) for one in before} == before
    assert len(checkpoint.checkpoints(folder / "checkpoints")) == 1
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, whole.folder)


def survives(folder: Path, whole: RunSummary) -> None:
    """Check that what a killed run left leads to the same end, or that there is nothing of it."""
    root = folder / "checkpoints"
    known = checkpoint.checkpoints(root) if root.is_dir() else []
    for path in known:
        checkpoint.read_about(path)  # none is torn
    if not (folder / "config.json").is_file():
        return  # it had not begun
    if not (folder / "summary.json").is_file():
        resumed = train(TrainConfig(resume=str(folder)), quiet=True)
        # With a checkpoint after each step, no more is lost than the step under way.
        n_done = checkpoint.number_of(known[-1]) if known else 0
        assert resumed.summary["checkpoints"]["written"] == N_CHECKPOINTS - n_done
    assert_same_run(folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        Kill("at a step of a checkpoint", 3),
        Kill("at a step of a checkpoint", 147),
        Kill("while a checkpoint is written", 5, 0.004),
        Kill("in the theater", 2),
        Kill("any time", 1, 0.5),
    ],
    ids=lambda kill: f"{kill.kind} {kill.call}",
)
def test_a_run_that_was_killed_goes_on_to_the_very_same_end(
    kill: Kill, text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert killed(folder, text, kill)
    survives(folder, whole)


def tell(line: str) -> None:
    """Say something to whoever looks on, with `-s`."""
    sys.stdout.write(f"\n{line}")
    sys.stdout.flush()


@pytest.mark.exhaustive
def test_a_hundred_kills_at_random_moments(text: Path, whole: RunSummary, tmp_path: Path) -> None:
    seed = int(os.environ.get("AVATARL_KILL_SEED", np.random.SeedSequence().generate_state(1)[0]))
    tell(f"AVATARL_KILL_SEED={seed} repeats these kills")
    rng = np.random.default_rng(seed)
    n_calls = count_calls(config(text, tmp_path / "counted"))
    died: Counter[str] = Counter()
    late: Counter[str] = Counter()
    for n_runs in itertools.count():
        if died.total() >= 100:
            break
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"
            for again in range(int(rng.choice([1, 1, 2, 3]))):  # now and then it is killed again
                kill = random_kill(rng, n_calls)
                begun, ended = (folder / f"{part}.json" for part in ("config", "summary"))
                if again and (ended.is_file() or not begun.is_file()):
                    break  # killed before there was anything, or while the report was written
                tell(f"run {n_runs}, {'gone on with' if again else 'new'}: {kill}")
                tried = kill.kind + ", gone on with" * (again > 0)
                if not killed(folder, text, kill):
                    late[tried] += 1
                    break
                died[tried] += 1
            survives(folder, whole)
    for tried in sorted({*died, *late}):
        tell(f"{tried}: {died[tried]} killed, {late[tried]} finished before")
    tell(f"{died.total()} killed, {late.total()} finished before, {n_runs} runs, none lost")
    assert {name.partition(",")[0] for name in died} == set(KILLS)


@pytest.fixture(scope="module")
def broken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints that was broken off."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, 7)
        with pytest.raises(BrokenOff):
            train(config(text, folder), quiet=True)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "report.html")
    }


def resume(folder: Path, **changes: Any) -> TrainConfig:
    return replace(TrainConfig(resume=str(folder)), **changes)


def newest(folder: Path) -> Path:
    return checkpoint.checkpoints(folder / "checkpoints")[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = newest(folder) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.pop("sha256")
    change(manifest)
    path.write_text(
        json.dumps({**manifest, "sha256": checkpoint._digest_of(manifest)}), encoding="utf-8"
    )


def other_version(manifest: dict[str, Any]) -> None:
    manifest["about"]["versions"]["torch"] = "1.0"


def other_format(manifest: dict[str, Any]) -> None:
    manifest["format"] = 99


def zero_part_of_the_metrics(folder: Path) -> None:
    """Leave the file as after a power cut: of its length, but with a block of NUL bytes."""
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.seek(20)
        file.write(bytes(50))


def edit_first_row(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the first row of the metrics; the file stays as long as it was."""
    path = folder / "metrics.jsonl"
    line, rest = path.read_text(encoding="utf-8").split("\n", 1)
    change(row := json.loads(line))
    path.write_text(json.dumps(row).ljust(len(line)) + "\n" + rest, encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut tensors": (lambda f: cut(newest(f) / "tensors.safetensors"), "must be as it was written"),
    "flipped tensors": (lambda f: flip(newest(f) / "tensors.safetensors"), "as it was written"),
    "flipped surgeon": (lambda f: flip(newest(f) / "surgeon.zip"), "must be as it was written"),
    "no surgeon": (lambda f: (newest(f) / "surgeon.zip").unlink(), "must hold surgeon.zip"),
    "cut manifest": (
        lambda f: cut(newest(f) / "manifest.json") or cut(newest(f) / "manifest.json"),
        "must hold a readable manifest.json",
    ),
    "no manifest": (lambda f: (newest(f) / "manifest.json").unlink(), "readable manifest.json"),
    "another version": (lambda f: edit_manifest(f, other_version), "got torch 1.0 in"),
    "another format": (lambda f: edit_manifest(f, other_format), "must be of format 1, got 99"),
    "another corpus": (
        lambda f: edit_manifest(f, lambda m: m["about"].update(corpus_sha256="0")),
        "must be of this corpus, got another",
    ),
    "another seed": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'),
            encoding="utf-8",
        ),
        "must be of this configuration, got another",
    ),
    "no metrics": (
        lambda f: (f / "metrics.jsonl").unlink(),
        r"metrics\.jsonl must have the \d+ bytes that were recorded, got 0: restore the file",
    ),
    "short metrics": (
        lambda f: os.truncate(f / "metrics.jsonl", 300),
        r"recorded, got 300: restore the file, or delete .*step-\d+ to resume from .* before it",
    ),
    "zeroed metrics": (zero_part_of_the_metrics, r"row of JSON in line 1, got .*x00.*: restore"),
    "metrics of something else": (
        lambda f: edit_first_row(f, lambda row: row.pop("seconds")),
        r"metrics\.jsonl must have a row of JSON in line 1, got",
    ),
    "no samples": (
        lambda f: os.truncate(f / "samples.txt", 0),
        r"samples\.txt must have the \d+ bytes that were recorded, got 0: restore the file",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "must be a run folder"),
    "half a configuration": (
        lambda f: cut(f / "config.json") or cut(f / "config.json"),
        "readable config.json",
    ),
    "a string as configuration": (
        lambda f: (f / "config.json").write_text('"x"'),
        "config.json is an object, .* is a str",
    ),
    "a deep configuration": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "readable config.json",
    ),
    "a deep manifest": (
        lambda f: (newest(f) / "manifest.json").write_text("[" * 100_000),
        "readable manifest.json",
    ),
    "a recipe of another kind": (
        lambda f: (f / "config.json").write_text('{"grpo": "x"}'),
        "must be that of a run of this version",
    ),
    "finished": (lambda f: (f / "summary.json").write_text("{}"), "that has not finished"),
}


def sign(manifest: dict[str, Any], folder: Path) -> None:
    """Let a manifest say that the files are as they were written."""
    digests = {name: checkpoint._digest(newest(folder) / name) for name in manifest["files"]}
    manifest["files"] = digests


def forged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes a file of the newest checkpoint, and its manifest to match."""

    def harm(folder: Path) -> None:
        path = newest(folder) / name
        path.write_bytes(change(path.read_bytes()))
        edit_manifest(folder, lambda manifest: sign(manifest, folder))

    return harm


DAMAGES |= {
    "forged surgeon": (forged("surgeon.zip", lambda _: b"PK"), "surgeon must be stored as one of"),
    "forged statistics": (
        forged("surgeon_normalisation.json", lambda _: b"{}"),
        "sizes must be .*got None",
    ),
    "forged memory": (
        forged("state.json", lambda values: values.replace(b'"full": false', b'"full": true')),
        "replay buffer's observations must be .* shape",
    ),
    "forged generators": (
        forged("state.json", lambda values: values.replace(b'"python": [3', b'"python": [9')),
        "must be stored whole|state with version 9",
    ),
}


def forged_manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.update(changes))


def forged_about(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["about"].update(changes))


DAMAGES |= {
    "nothing about it": (forged_manifest(about=None), "must be as it was written"),
    "no list of files": (forged_manifest(files=None), "must be as it was written"),
    "no format": (forged_manifest(format=None), "must be of format 1, got None"),
    "endless threads": (forged_about(threads=10**9), "threads must be at most 1024"),
    "versions of another kind": (forged_about(versions=[]), "must hold the state of this run"),
    "no settings": (forged_about(settings=None), "must hold the state of this run"),
    "no tensors": (
        forged("tensors.safetensors", lambda tensors: tensors[:100]),
        "must hold the state of this run",
    ),
}


def linked(name: str) -> Callable[[Path], None]:
    """Return what moves a file or folder of a run elsewhere, and links it."""

    def harm(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        if (folder / name).exists():
            (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return harm


OWN = ("metrics.jsonl", "samples.txt", "config.json", "references.json", "summary.json", ".lock")
OWN_FOLDERS = ("checkpoints", "checkpoints/best", "checkpoints/final", "tensorboard")
DAMAGES |= {
    f"{name} is a link": (linked(name), f"files are in its own folder, got '.*{name}', a symbolic")
    for name in (*OWN, *OWN_FOLDERS)
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_gone_on_from_is_refused_and_left_alone(
    damage: str, broken: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(broken, folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        train(resume(folder), quiet=True)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_another_setting_is_refused(broken: Path) -> None:
    with pytest.raises(
        BadInput, match=r"^seed must be the run's own where it is resumed, 0, got 7$"
    ):
        train(resume(broken, seed=7), quiet=True)
    with pytest.raises(BadInput, match=r"^resume must be a run folder, .*, got '/nowhere'$"):
        train(resume(Path("/nowhere")), quiet=True)


def test_each_setting_of_a_part_within_a_part_is_compared_by_itself(tmp_path: Path) -> None:
    def asked(**changes: float) -> TrainConfig:
        recipe = GRPOConfig(estimator="grpo", regularizer=RegularizerConfig(**changes))
        return TrainConfig(grpo=recipe, resume=str(tmp_path))

    own = asked(entropy_bonus=0.25, kl_coefficient=0.5)
    (tmp_path / "config.json").write_text(json.dumps(asdict(own)), encoding="utf-8")
    run = stored_run(tmp_path)
    assert config_to_resume(TrainConfig(resume=str(tmp_path)), run).grpo == own.grpo
    assert config_to_resume(asked(entropy_bonus=0.25), run).grpo == own.grpo
    message = r"^grpo.regularizer.entropy_bonus must be the run's own .*, 0\.25, got 0\.5$"
    with pytest.raises(ValueError, match=message):
        config_to_resume(asked(entropy_bonus=0.5), run)


def test_a_second_process_is_refused(broken: Path) -> None:
    before = snapshot(broken)
    with locked(broken), pytest.raises(BadInput, match="must be a run that no other process works"):
        train(resume(broken), quiet=True)
    assert snapshot(broken) == before


def test_a_full_disk_leaves_the_last_checkpoint(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sync = tmp_path / "run", checkpoint.sync
    calls = iter(range(10_000))

    def full(path: Path) -> None:
        if next(calls) > 25:
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(config(text, folder), quiet=True)
    assert [path.name[0] for path in (folder / "checkpoints").iterdir()].count(".") == 0
    train(resume(folder), quiet=True)
    assert_same_run(folder, whole.folder)


def test_the_report_of_a_run_under_way_has_the_references(broken: Path, whole: RunSummary) -> None:
    known = json.loads((broken / "references.json").read_text(encoding="utf-8"))
    assert {name: whole.summary[name] for name in known} == known
    assert [row["name"] for row in known["references"]] == [*REFERENCE_NAMES]
    page = Page(broken / "report.html")
    assert "This run has not finished" in page.text
    for row in known["references"]:
        assert f'<th scope="row">{row["name"]}</th>' in page.html
    levels = {shape["y0"] for shape in page.figures["loss"]["layout"]["shapes"]}
    assert {row["loss"] for row in known["references"]} <= levels
