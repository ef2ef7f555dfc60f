"""A run that was broken off resumes to the very same end."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.errors import DivergedError, Stopped
from agents.grpo.config import GRPOConfig
from agents.grpo.learner import GRPOLearner
from agents.training import checkpoint
from agents.training.config import TrainConfig
from agents.training.curriculum import CurriculumConfig
from agents.training.loop import train
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

N_STEPS = 10  # of a whole run: 6 updates, 2 rounds of surgery, 2 joint ones

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
        effect_operations=2,
        effect_prompts=8,
        sample_length=24,
    ),
}
OLDER_POLICY = {
    "grpo": GRPOConfig(estimator="cispo", batch_size=2, group_size=4, horizon=4, sync_every=4),
    "surgeon": "random",
    "surgeon_options": {},
}


@pytest.mark.parametrize(
    ("recipe", "after"),
    [
        ({}, 1),
        ({}, 6),  # between two phases
        ({}, 7),
        ({}, 9),
        ({}, N_STEPS),
        (UNDER_OPERATION, 9),
        ({**UNDER_OPERATION, **OLDER_POLICY}, 10),
        (OLDER_POLICY, 3),  # between two synchronisations
    ],
)
def test_a_run_resumes_from_any_step_to_the_very_same_end(
    recipe: dict[str, Any], after: int, text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    folder, expected = tmp_path / "run", whole
    if recipe:
        expected = train(config(text, tmp_path / "whole", **recipe), quiet=True)
    break_off(config(text, folder, **recipe), after)
    assert steps_of(folder)[-1] == after
    torch.rand(5)
    resumed = train(TrainConfig(resume=str(folder)), quiet=True)
    assert resumed.folder == folder
    if not recipe:
        assert resumed.summary["checkpoints"]["written"] == N_STEPS - after
    if recipe.get("curriculum"):
        behavior = [row for row in rows(folder) if row["kind"] == "behavior"]
        assert any(row["behavior/operated"] for row in behavior)
    assert_same_run(folder, expected.folder)


def test_a_run_may_be_broken_off_again_and_again(
    text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    asked = config(text, tmp_path / "run")
    for _ in range(4):
        break_off(asked, 2)
        asked = TrainConfig(resume=str(tmp_path / "run"))
    train(asked, quiet=True)
    assert_same_run(tmp_path / "run", whole.folder)


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
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, whole.folder)


def at_update(patch: pytest.MonkeyPatch, n: int, happens: Callable[[], object]) -> None:
    """Let something happen before the n-th update, once."""
    update, due = GRPOLearner.update, iter([True])

    def watched(self: GRPOLearner, *arguments: Any) -> Any:
        if self.n_done == n and next(due, False):
            happens()
        return update(self, *arguments)

    patch.setattr(GRPOLearner, "update", watched)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(
    number: signal.Signals,
    text: Path,
    whole: RunSummary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "my 'run'"
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped) as caught:
            train(config(text, folder, checkpoint_seconds=1e9), quiet=True)
    assert caught.value.signum == number
    command = shlex.split(str(caught.value).partition("resume with: ")[2])
    assert command[-2:] == ["--resume", str(folder)]
    assert {one: signal.getsignal(one) for one in before} == before
    assert steps_of(folder) == [4]
    train(TrainConfig(resume=str(folder)), quiet=True)
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
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, whole.folder)


def poison(patch: pytest.MonkeyPatch, updates: Callable[[int], bool]) -> list[int]:
    """Make the gradient of some updates NaN; return the numbers of the updates as they are done."""
    from agents.grpo import learner as module

    average, done = module.average_gradients, []
    begin = GRPOLearner.update

    def noted(self: GRPOLearner, *arguments: Any) -> Any:
        done.append(self.n_done)
        return begin(self, *arguments)

    def spoilt(ranks: Any, model: torch.nn.Module, readings: torch.Tensor) -> None:
        if updates(done[-1]):
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(torch.nan)
        average(ranks, model, readings)

    patch.setattr(GRPOLearner, "update", noted)
    patch.setattr(module, "average_gradients", spoilt)
    return done


def test_a_run_that_diverges_goes_back_to_its_checkpoint_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = CurriculumConfig(bootstrap_updates=20, surgery_rounds=0, joint_rounds=0)
    changes: dict[str, Any] = {"curriculum": plan, "surgeon": "none", "surgeon_options": {}}
    expected = train(config(text, tmp_path / "whole", **changes), quiet=True)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        bad = iter([True] * 10)
        done = poison(patch, lambda n: n >= 3 and next(bad, False))
        train(config(text, Path("run"), **changes), quiet=True)
    assert done.count(3) == 2
    assert_same_run(Path("run"), expected.folder)
    done = poison(monkeypatch, lambda n: n >= 3)
    with pytest.raises(DivergedError, match=r"^10 updates in a row"):
        train(config(text, Path("again"), **changes), quiet=True)
    assert done.count(3) == 2


# --- wherever it is, wherever one is -------------------------------------------------------------


@pytest.mark.parametrize("then", ["stays", "is moved", "is left", "loses its first folder"])
def test_a_run_resumes_wherever_it_and_one_are(
    then: str, text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    shutil.copy(text, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path / "below")
    break_off(config(Path("../text.txt"), Path("run")), 7)
    folder = Path("run")
    if then == "is moved":
        folder = folder.rename(tmp_path / "moved run")
    elif then == "is left":
        os.chdir(tmp_path)
        folder = Path("below/run")
    elif then == "loses its first folder":
        folder = folder.rename(tmp_path / "kept")
        os.chdir(tmp_path)
        shutil.rmtree("below")
    assert_same_run(train(TrainConfig(resume=str(folder)), quiet=True).folder, whole.folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["corpus"] == str(tmp_path / "text.txt")
    assert stored["out"] == str(folder)


def test_the_text_may_have_moved(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "text.txt")
    break_off(config(Path("text.txt"), Path("run")), 7)
    Path("text.txt").rename("novel.txt")
    train(TrainConfig(resume="run", corpus="novel.txt"), quiet=True)
    assert_same_run(Path("run"), whole.folder)
    assert load_model("run").about["corpus"] == str(tmp_path / "novel.txt")


# --- killed --------------------------------------------------------------------------------------


def survives(folder: Path, whole: RunSummary) -> None:
    """Check that what a killed run left leads to the same end, unless it had not begun."""
    root = folder / "checkpoints"
    known = checkpoint.checkpoints(root) if root.is_dir() else []
    for path in known:
        checkpoint.read_about(path)  # none is torn
    if not (folder / "config.json").is_file():
        return
    if not (folder / "summary.json").is_file():
        n_done = steps_of(folder)[-1] if known else 0
        resumed = train(TrainConfig(resume=str(folder)), quiet=True)
        # With a checkpoint after each step, no more is lost than the step under way.
        assert resumed.summary["checkpoints"]["written"] == N_STEPS - n_done
    assert_same_run(folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        Kill("at a step of a checkpoint", 147),
        Kill("while a checkpoint is written", 5, 0.004),
        Kill("in the theater", 2),
    ],
    ids=lambda kill: kill.kind,
)
def test_a_run_that_was_killed_resumes_to_the_very_same_end(
    kill: Kill, text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    assert killed(tmp_path / "run", text, kill)
    survives(tmp_path / "run", whole)


def tell(line: str) -> None:
    """Print a line for whoever looks on, with `-s`."""
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
                    break
                tell(f"run {n_runs}, {'resumed' if again else 'new'}: {kill}")
                tried = kill.kind + ", resumed" * (again > 0)
                if not killed(folder, text, kill):
                    late[tried] += 1
                    break
                died[tried] += 1
            survives(folder, whole)
    for tried in sorted({*died, *late}):
        tell(f"{tried}: {died[tried]} killed, {late[tried]} finished before")
    assert {name.partition(",")[0] for name in died} == set(KILLS)
