"""A run that was broken off resumes to exactly the same end."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.errors import Stopped
from agents.grpo.config import GRPOConfig
from agents.grpo.learner import GRPOLearner
from agents.training import checkpoint
from agents.training.config import TrainConfig
from agents.training.loop import train
from agents.training.presets import ModelConfig
from agents.training.run import Checkpointer
from agents.training.summary import RunSummary
from avatarl_env.lm.storage import load_model
from tests.agents.training.broken_runs import (
    KILLS,
    BrokenOff,
    Kill,
    assert_same_run,
    break_off,
    config,
    count_calls,
    killed,
    random_kill,
    rows,
    steps_of,
)
from tests.training_runs import small_curriculum

N_STEPS = 10  # of a whole run: 6 updates, 2 rounds of surgery, 2 joint ones
OTHERWISE: dict[str, Any] = {
    "grpo": GRPOConfig(estimator="cispo", batch_size=2, group_size=4, horizon=4, sync_every=4),
    "curriculum": small_curriculum(bootstrap_updates=2, joint_rounds=3, commit="rollout"),
    "surgeon": "random",
    "surgeon_options": {},
    "score": {"kl_ref": 1.0, "heldout_loss": 5.0},
    "layers": (1,),
    "lm": ModelConfig(context=32, n_layers=2, n_heads=2, width=16),
}
"""Two updates, two rounds of surgery and three joint ones, in which the operated model samples."""


def resume(folder: Path, **changes: Any) -> RunSummary:
    return train(TrainConfig(resume=str(folder), **changes), quiet=True)


def test_a_run_may_be_broken_off_after_any_step(
    text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    asked = config(text, folder)
    # The end of the first update, of both first phases, within the last, and before the summary.
    for n_steps, done in ((1, 1), (5, 6), (2, 8), (1, 9), (1, N_STEPS)):
        break_off(asked, n_steps)
        assert steps_of(folder)[-1] == done
        torch.rand(5)
        asked = TrainConfig(resume=str(folder))
    resumed = train(asked, quiet=True)
    assert resumed.folder == folder
    assert resumed.summary["checkpoints"]["written"] == 0
    assert_same_run(folder, whole.folder)


def test_a_resumed_run_keeps_its_score_its_layers_and_its_older_policies(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    expected = train(config(text, tmp_path / "whole", **OTHERWISE), quiet=True)
    break_off(config(text, folder, **OTHERWISE), 6)
    resumed = resume(folder)
    behavior = [row for row in rows(folder) if row["kind"] == "behavior"]
    assert len(behavior) == 3
    assert any(row["behavior/operated"] for row in behavior)
    assert_same_run(folder, expected.folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for settings in (stored, json.loads(json.dumps(resumed.summary))):
        assert (settings["score"], settings["layers"]) == (OTHERWISE["score"], [1])


@pytest.mark.parametrize("steps", [[], [2, 5]])
def test_what_was_done_after_the_last_checkpoint_is_done_again(
    steps: list[int],
    text: Path,
    whole: RunSummary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, step, n_steps = tmp_path / "run", Checkpointer.step, itertools.count()
    with monkeypatch.context() as patch:

        def some(self: Checkpointer) -> None:
            n = next(n_steps)
            if n in steps:
                step(self)
            if n == 7:
                raise BrokenOff

        patch.setattr(Checkpointer, "step", some)
        with pytest.raises(BrokenOff):
            train(config(text, folder), quiet=True)
    assert steps_of(folder) == [n + 1 for n in steps]
    resume(folder)
    assert_same_run(folder, whole.folder)


def test_a_signal_ends_a_run_with_a_checkpoint(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, update = tmp_path / "my 'run'", GRPOLearner.update
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}

    def interrupted(self: GRPOLearner, *arguments: Any) -> Any:
        if self.n_done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOLearner, "update", interrupted)
        with pytest.raises(Stopped) as caught:
            train(config(text, folder, checkpoint_seconds=1e9), quiet=True)
    assert caught.value.signum == signal.SIGTERM
    command = shlex.split(str(caught.value).partition("resume with: ")[2])
    assert command[-2:] == ["--resume", str(folder)]
    assert {one: signal.getsignal(one) for one in before} == before
    assert steps_of(folder) == [4]
    resume(folder)
    assert_same_run(folder, whole.folder)


def test_a_full_disk_leaves_the_last_checkpoint(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sync, calls = tmp_path / "run", checkpoint.sync, itertools.count()

    def full(path: Path) -> None:
        if next(calls) > 25:
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(config(text, folder), quiet=True)
    assert not list((folder / "checkpoints").glob(".*"))
    resume(folder)
    assert_same_run(folder, whole.folder)


def test_a_run_and_its_text_may_be_moved(
    text: Path, whole: RunSummary, broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(broken, "moved run")
    shutil.copy(text, "novel.txt")
    resume(Path("moved run"), corpus="novel.txt")
    assert_same_run(Path("moved run"), whole.folder)
    stored = json.loads(Path("moved run/config.json").read_text(encoding="utf-8"))
    assert (stored["corpus"], stored["out"]) == (str(tmp_path / "novel.txt"), "moved run")
    assert load_model("moved run").about["corpus"] == str(tmp_path / "novel.txt")


def assert_survives(folder: Path, whole: RunSummary, about: str = "") -> None:
    """Check that what a killed run left leads to the same end, unless it had not begun."""
    root = folder / "checkpoints"
    known = checkpoint.checkpoints(root) if root.is_dir() else []
    for path in known:
        checkpoint.read_about(path)  # none is torn
    if not (folder / "config.json").is_file():
        return
    if not (folder / "summary.json").is_file():
        n_done = steps_of(folder)[-1] if known else 0
        resumed = resume(folder)
        # With a checkpoint after each step, no more is lost than the step under way.
        assert resumed.summary["checkpoints"]["written"] == N_STEPS - n_done, about
    assert_same_run(folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        Kill("at a step of a checkpoint", 80),
        Kill("while a checkpoint is written", 5, 0.004),
        Kill("in the theater", 2),
    ],
    ids=lambda kill: kill.kind,
)
def test_a_run_that_was_killed_resumes_to_the_very_same_end(
    kill: Kill, text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    assert killed(tmp_path / "run", text, kill)
    assert_survives(tmp_path / "run", whole)


@pytest.mark.exhaustive
def test_a_hundred_kills_at_random_moments(text: Path, whole: RunSummary, tmp_path: Path) -> None:
    seed = int(os.environ.get("AVATARL_KILL_SEED", np.random.SeedSequence().generate_state(1)[0]))
    rng = np.random.default_rng(seed)
    n_calls = count_calls(config(text, tmp_path / "counted"))
    died: set[str] = set()
    n_killed = 0
    while n_killed < 100:
        kill = random_kill(rng, n_calls)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"
            if killed(folder, text, kill):
                died.add(kill.kind)
                n_killed += 1
            assert_survives(folder, whole, f"AVATARL_KILL_SEED={seed} repeats this, {kill}")
    assert died == set(KILLS)
