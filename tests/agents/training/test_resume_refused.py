"""What a run cannot be resumed with is refused in one line, and the run is left as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents.cli.main import main
from agents.errors import BadInput
from agents.training import checkpoint
from agents.training.checkpoint import locked
from agents.training.config import TrainConfig
from agents.training.loop import train
from agents.training.summary import RunSummary
from tests.agents.training.broken_runs import assert_same_run, config, edit_manifest, snapshot
from tests.training_runs import small_config, small_curriculum

Harm = Callable[[Path], object]


def newest(folder: Path) -> Path:
    return checkpoint.checkpoints(folder / "checkpoints")[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def manifest(change: Callable[[dict[str, Any]], object]) -> Harm:
    return lambda folder: edit_manifest(folder, change)


def settings(content: str) -> Harm:
    return lambda folder: (folder / "config.json").write_text(content, encoding="utf-8")


def zeroed(folder: Path) -> None:
    """Leave the metrics as after a power cut: of their length, but with a block of NUL bytes."""
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.seek(20)
        file.write(bytes(50))


def forged(name: str, change: Callable[[bytes], bytes]) -> Harm:
    """Change a file of the newest checkpoint, and its manifest to match."""

    def harm(folder: Path) -> None:
        path = newest(folder) / name
        path.write_bytes(change(path.read_bytes()))
        digest = checkpoint._digest(path)
        edit_manifest(folder, lambda found: found["files"].update({name: digest}))

    return harm


def linked(name: str) -> Harm:
    """Move a file or folder of a run elsewhere, and link it."""

    def harm(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        if (folder / name).exists():
            (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return harm


UNCHANGED = "must be unchanged since it was written"
DAMAGES: dict[str, tuple[Harm, str]] = {
    "cut tensors": (lambda f: cut(newest(f) / "tensors.safetensors"), UNCHANGED),
    "flipped surgeon": (lambda f: flip(newest(f) / "surgeon.zip"), UNCHANGED),
    "no surgeon": (
        lambda f: (newest(f) / "surgeon.zip").unlink(),
        "must have the file surgeon.zip",
    ),
    "cut manifest": (lambda f: cut(newest(f) / "manifest.json"), "readable manifest.json"),
    "no manifest": (lambda f: (newest(f) / "manifest.json").unlink(), "readable manifest.json"),
    "deep manifest": (
        lambda f: (newest(f) / "manifest.json").write_text("[" * 100_000),
        "readable manifest.json",
    ),
    "other version": (
        manifest(lambda m: m["about"]["versions"].update(torch="1.0")),
        "got torch 1.0 in",
    ),
    "other format": (manifest(lambda m: m.update(format=99)), "must have format 2, got 99"),
    "other corpus": (manifest(lambda m: m["about"].update(corpus_sha256="0")), "of this corpus"),
    "other ranks": (manifest(lambda m: m["about"].update(processes=2)), "processes .* 2, got 1"),
    "endless threads": (manifest(lambda m: m["about"].update(threads=10**9)), "threads .* 1024"),
    "no files listed": (manifest(lambda m: m.update(files=None)), UNCHANGED),
    "forged tensors": (forged("tensors.safetensors", lambda x: x[:100]), "state of this run"),
    "forged surgeon": (forged("surgeon.zip", lambda _: b"PK"), "surgeon must be stored"),
    "forged generators": (
        forged("state.json", lambda x: x.replace(b'"python": [3', b'"python": [9')),
        "must be stored whole|state with version 9",
    ),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), r"metrics\.jsonl must .* got 0: rest"),
    "short metrics": (
        lambda f: os.truncate(f / "metrics.jsonl", 300),
        r"got 300: restore the file, or delete .*step-\d+ to resume from .* before it",
    ),
    "zeroed metrics": (zeroed, r"row of JSON in line 1, got .*: restore"),
    "no samples": (
        lambda f: os.truncate(f / "samples.txt", 0),
        r"samples\.txt must .* got 0: rest",
    ),
    "no settings": (lambda f: (f / "config.json").unlink(), "must be a run folder"),
    "half of the settings": (lambda f: cut(f / "config.json"), "readable config.json"),
    "settings of a string": (settings('"x"'), "config.json is an object, .* is a str"),
    "settings of another kind": (settings('{"grpo": "x"}'), "of a run of this version"),
    "finished": (lambda f: (f / "summary.json").write_text("{}"), "that has not finished"),
    **{
        f"{name} is a link": (linked(name), f"got '.*{name}', a symbolic link")
        for name in ("metrics.jsonl", ".lock", "checkpoints", "checkpoints/best", "tensorboard")
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_resumed_is_refused_and_left_alone(
    damage: str, broken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken, folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        train(TrainConfig(resume=str(folder)), quiet=True)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_forged_state_of_the_logger_is_refused(broken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(broken, folder)
    forged("state.json", lambda x: x.replace(b'"n_operations"', b'"n_operation"'))(folder)
    with pytest.raises(BadInput, match=r"state of this run.*n_operations"):
        train(TrainConfig(resume=str(folder)), quiet=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--threads 2", "threads .* 1, got 2"),
        ("--seed 7", "seed .* 0, got 7"),
        ("--preset laptop", "preset .* 'smoke', got 'laptop'"),
        ("--lm.width 96", "lm.width .* 16, got 96"),
        ("--out other", "out .* got 'other'"),
        (
            "--grpo.regularizer.entropy-bonus 0.5",
            r"regularizer.entropy_bonus .* 0\.0, got 0.5",
        ),
        ("--surgeon-options gradient_steps 9", "surgeon_options"),
        ("--corpus none.txt", "corpus file 'none.txt' must exist, .* --corpus"),
        ("--corpus OTHER", "corpus must be the text that the run started with, of sha"),
    ],
)
def test_what_may_change_a_result_is_refused(
    words: str, message: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text. " * 400)
    before = snapshot(broken)
    asked = [str(other) if word == "OTHER" else word for word in words.split()]
    assert main(["--resume", str(broken), *asked]) == 2
    assert re.fullmatch(f"train.py: error: .*{message}.*\n", capsys.readouterr().err)
    assert snapshot(broken) == before


def test_what_changes_no_result_may_change(broken: Path, whole: RunSummary, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(broken, tmp_path / "run"))
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    harmless = ["--checkpoint-seconds", "inf", "--track", "off", "--tensorboard", "False"]
    assert main(["--resume", str(folder), "--seed", "0", *harmless]) == 0
    assert_same_run(folder, whole.folder)
    again = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert again == {**stored, "out": str(folder), "checkpoint_seconds": "inf"}
    # An infinite interval is read back, and the usual one may be asked for again.
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "final")
    assert train(TrainConfig(resume=str(folder)), quiet=True).summary["checkpoints"]["written"] == 0


def test_a_run_that_another_process_works_on_is_refused(broken: Path) -> None:
    before = snapshot(broken)
    with locked(broken), pytest.raises(BadInput, match="no other process is working on, got"):
        train(TrainConfig(resume=str(broken)), quiet=True)
    assert snapshot(broken) == before


def test_a_lock_that_is_a_link_is_not_followed(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"^out must be .* its \.lock is a symbolic link$"):
        train(config(text, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "elsewhere").exists()


def test_runs_without_a_name_get_folders_of_their_own(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "text.txt")
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%", ""))
    plan = small_curriculum(bootstrap_updates=1, joint_rounds=0)
    asked = small_config("text.txt", surgeon="none", curriculum=plan)
    runs = [train(asked, quiet=True) for _ in range(2)]
    names = [str(run.folder) for run in runs]
    assert names == ["runs/Ymd-HMS-smoke", "runs/Ymd-HMS-smoke-2"]
    # The text can be found again from anywhere.
    stored = json.loads((runs[0].folder / "config.json").read_text(encoding="utf-8"))
    assert stored["corpus"] == runs[0].summary["corpus"] == str(tmp_path / "text.txt")
    assert runs[0].summary["command"] is None
    shutil.rmtree("runs")
    Path("runs").touch()
    with pytest.raises(BadInput, match="out must be a folder that can be written to, got 'runs/"):
        train(asked, quiet=True)
