"""A run that was broken off goes on to the very same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import checkpoint
from agents.checkpoint import locked
from agents.config import BadInput, TrainConfig
from agents.curriculum import CurriculumConfig, DivergedError
from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.learner import GRPOLearner
from agents.resuming import Checkpointer, Stopped, stored_config
from agents.training import RunSummary, train
from tests.training_runs import QUICK_SAC, small_config, write_text

CLOCKS = {"seconds", "time/tokens_per_second"}
N_CHECKPOINTS = 10  # of a whole run: 6 updates, 2 rounds of surgery, 2 joint ones
QUICK = {key: value for key, value in QUICK_SAC.items() if key != "policy_kwargs"}


class BrokenOff(Exception):
    """Somebody pulled the plug."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def config(text: Path, out: Path, **changes: Any) -> TrainConfig:
    settings = {"surgeon_options": QUICK, "checkpoint_seconds": 0.0, **changes}
    return small_config(text, out, **settings)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """A run that nothing happened to."""
    return train(config(text, tmp_path_factory.mktemp("whole") / "run"), quiet=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
        for line in lines
    ]


def surgeon_parameters(folder: Path) -> dict[str, torch.Tensor]:
    from stable_baselines3 import SAC

    model = SAC.load(folder / "checkpoints" / "final" / "surgeon.zip", device="cpu")
    return dict(model.policy.state_dict())


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = {*CLOCKS, "command", "checkpoints", "environment"}
        return {key: without_clocks(x) for key, x in value.items() if key not in left_out}
    return [without_clocks(x) for x in value] if isinstance(value, list) else value


def assert_same_run(left: Path, right: Path) -> None:
    """Check that two runs came to the same end on the same way, bit for bit."""
    weights, others = (
        load_file(folder / "checkpoints" / "final" / "model.safetensors")
        for folder in (left, right)
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    if (left / "checkpoints" / "final" / "surgeon.zip").exists():
        mine, yours = surgeon_parameters(left), surgeon_parameters(right)
        assert all(torch.equal(mine[name], yours[name]) for name in mine)
    assert rows(left) == rows(right)
    assert (left / "samples.txt").read_bytes() == (right / "samples.txt").read_bytes()
    summaries = [
        json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for folder in (left, right)
    ]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])


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


CHILD = """
import json, os, signal, sys, threading, time
os.environ["OMP_NUM_THREADS"] = "1"
folder, text, kind, moment = sys.argv[1:]
from agents.training import train
from agents.config import TrainConfig
from tests.agents.test_resuming import config
from pathlib import Path

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if kind == "any time":
    threading.Thread(target=lambda: (time.sleep(float(moment)), die()), daemon=True).start()
else:
    name = {"in a checkpoint": "agents.checkpoint._sync",
            "in the theater": "avatarl_env.surgery.theater.SurgicalTheater.__exit__"}[kind]
    import importlib
    *path, last = name.split(".")
    owner = None
    for n in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:n]))
        except ImportError:
            continue
        for attribute in path[n:]:
            owner = getattr(owner, attribute)
        break
    function, calls = getattr(owner, last), [0]
    def wrapped(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == int(moment):
            die()
        return function(*arguments, **keywords)
    setattr(owner, last, wrapped)
train(config(Path(text), Path(folder)), quiet=True)
"""


def killed(folder: Path, text: Path, kind: str, moment: float) -> None:
    """Let a child train, and be killed without a chance to say goodbye."""
    arguments = [sys.executable, "-c", CHILD, str(folder), str(text), kind, str(moment)]
    code = subprocess.run(arguments, check=False, capture_output=True, timeout=300).returncode
    assert code in (-signal.SIGKILL, 0)


def survives(folder: Path, text: Path, whole: RunSummary) -> None:
    """Check that what a killed run left leads to the same end, or that there is nothing of it."""
    root = folder / "checkpoints"
    for path in checkpoint.checkpoints(root) if root.is_dir() else []:
        checkpoint.read_about(path)  # none is torn
    if (folder / "summary.json").is_file():
        assert_same_run(folder, whole.folder)  # it was too late
    elif (folder / "config.json").is_file():
        train(TrainConfig(resume=str(folder)), quiet=True)
        assert_same_run(folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("in a checkpoint", 3),
        ("in a checkpoint", 47),
        ("in the theater", 2),
        ("any time", 4.0),
        ("any time", 6.5),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_very_same_end(
    kind: str, moment: float, text: Path, whole: RunSummary, tmp_path: Path
) -> None:
    killed(tmp_path / "run", text, kind, moment)
    survives(tmp_path / "run", text, whole)


@pytest.mark.exhaustive
def test_a_hundred_kills_at_random_moments(text: Path, whole: RunSummary) -> None:
    rng = np.random.default_rng()
    for n in range(100):
        kind = ("any time", "in a checkpoint", "in the theater")[n % 3]
        moment: float = rng.uniform(2.0, 12.0) if kind == "any time" else int(rng.integers(1, 60))
        with tempfile.TemporaryDirectory() as name:
            killed(Path(name) / "run", text, kind, moment)
            survives(Path(name) / "run", text, whole)


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
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "must be a run folder"),
    "half a configuration": (
        lambda f: cut(f / "config.json") or cut(f / "config.json"),
        "readable config.json",
    ),
    "finished": (lambda f: (f / "summary.json").write_text("{}"), "that has not finished"),
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
    before = snapshot(folder)
    with pytest.raises(BadInput, match=message) as caught:
        train(resume(folder), quiet=True)
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before


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
    assert stored_config(TrainConfig(resume=str(tmp_path))).grpo == own.grpo
    assert stored_config(asked(entropy_bonus=0.25)).grpo == own.grpo
    message = r"^grpo.regularizer.entropy_bonus must be the run's own .*, 0\.25, got 0\.5$"
    with pytest.raises(ValueError, match=message):
        stored_config(asked(entropy_bonus=0.5))


def test_a_second_process_is_refused(broken: Path) -> None:
    before = snapshot(broken)
    with locked(broken), pytest.raises(BadInput, match="must be a run that no other process works"):
        train(resume(broken), quiet=True)
    assert snapshot(broken) == before


def test_a_full_disk_leaves_the_last_checkpoint(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sync = tmp_path / "run", checkpoint._sync
    calls = iter(range(10_000))

    def full(path: Path) -> None:
        if next(calls) > 25:
            raise OSError(28, "No space left on device")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(config(text, folder), quiet=True)
    assert [path.name[0] for path in (folder / "checkpoints").iterdir()].count(".") == 0
    train(resume(folder), quiet=True)
    assert_same_run(folder, whole.folder)


def poisoned(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool]) -> None:
    """Let the loss of some updates be no number."""
    read = GRPOLearner._read_positions

    def poison(self: GRPOLearner, *arguments: Any) -> Any:
        reading = read(self, *arguments)
        return reading._replace(loss=reading.loss * float("nan")) if at(self.n_done) else reading

    monkeypatch.setattr(GRPOLearner, "_read_positions", poison)


def test_an_update_that_is_no_number_is_skipped_and_counted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, lambda n: n in (2, 4))
    run = train(config(text, tmp_path / "run"), quiet=True)
    assert run.summary["skipped_updates"] == 2
    assert np.isfinite(run.summary["validation"]["loss"])
    weights = load_file(run.folder / "checkpoints" / "final" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture
def few_bad_updates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("agents.curriculum.MOST_BAD_UPDATES", 3)
    return


@pytest.mark.usefixtures("few_bad_updates")
def test_a_run_that_diverges_goes_back_once_and_goes_on_if_that_helps(
    text: Path, whole: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def once(n: int) -> bool:
        seen.append(n)
        return n >= 3 and seen.count(3) == 1

    poisoned(monkeypatch, once)
    run = train(config(text, tmp_path / "run"), quiet=True)
    assert seen[:9] == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert_same_run(run.folder, whole.folder)


@pytest.mark.usefixtures("few_bad_updates")
def test_a_run_that_diverges_again_ends_with_a_clear_error(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, lambda n: n >= 3)
    with pytest.raises(DivergedError, match=r"^3 updates in a row had a loss or gradient that"):
        train(config(text, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "summary.json").exists()
