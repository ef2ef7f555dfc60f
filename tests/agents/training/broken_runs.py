"""Runs that are broken off or killed, and how to check that nothing was lost.

As a program it trains until it is killed:
`python -m tests.agents.training.broken_runs FOLDER TEXT KILL`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents.surgeons.algorithms import ALGORITHMS, class_of
from agents.training import checkpoint
from agents.training.config import TrainConfig
from agents.training.loop import train
from tests.training_runs import QUICK_SAC, small_config

CLOCKS = {"seconds", "time/tokens_per_second"}
QUICK = {key: value for key, value in QUICK_SAC.items() if key != "policy_kwargs"}
HOME = Path(__file__).parents[3]

KILLS: dict[str, tuple[str, ...]] = {
    "any time": ("agents.training.start.build",),
    "while a checkpoint is written": ("agents.training.checkpoint.write",),
    "at a step of a checkpoint": tuple(
        f"agents.training.checkpoint.{name}" for name in ("dump_tensors", "sync", "remove_partial")
    ),
    "as a file is replaced": ("avatarl_env.files.os.replace",),
    "in the theater": tuple(
        f"avatarl_env.surgery.theater.SurgicalTheater.{name}"
        for name in ("__enter__", "write", "__exit__")
    ),
    "in an operation": ("avatarl_env.vector_env.AttentionSurgeryVectorEnv.step",),
}
"""Kinds of kills, each with the functions whose calls are counted until it is time."""


class BrokenOff(Exception):
    """Raised where a test breaks a run off."""


class Kill(NamedTuple):
    """When a run is killed: so long after the n-th call of one of a kind's functions."""

    kind: str
    call: int
    seconds: float = 0.0


def config(text: Path, out: Path, **changes: Any) -> TrainConfig:
    settings = {"surgeon_options": QUICK, "checkpoint_seconds": 0.0, **changes}
    return small_config(text, out, **settings)


def break_off(asked: TrainConfig, after: int) -> None:
    """Train, and break the run off right after its n-th checkpoint."""
    write, written = checkpoint.write, 0

    def plug(*arguments: Any) -> Path:
        nonlocal written
        path = write(*arguments)
        written += 1
        if written == after:
            raise BrokenOff
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", plug)
        with pytest.raises(BrokenOff):
            train(asked, quiet=True)


def steps_of(folder: Path) -> list[int]:
    """Return the steps at which the checkpoints of a run were written."""
    root = folder / "checkpoints"
    found = checkpoint.checkpoints(root) if root.is_dir() else []
    return [int(path.name.removeprefix("step-")) for path in found]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
        for line in lines
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "report.html")
    }


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest checkpoint's manifest, and its own digest to match."""
    path = checkpoint.checkpoints(folder / "checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest.pop("sha256")
    change(manifest)
    content = json.dumps(manifest, sort_keys=True).encode()
    signed = {**manifest, "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(signed), encoding="utf-8")


def surgeon_parameters(folder: Path) -> dict[str, torch.Tensor]:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["surgeon"]
    final = folder / "checkpoints" / "final"
    model = class_of(ALGORITHMS[name]).load(final / "surgeon.zip", device="cpu")  # type: ignore[attr-defined]
    return dict(model.policy.state_dict())


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = {*CLOCKS, "command", "checkpoints", "environment", "corpus"}
        return {key: _without_clocks(x) for key, x in value.items() if key not in left_out}
    return [_without_clocks(x) for x in value] if isinstance(value, list) else value


def assert_same_run(left: Path, right: Path) -> None:
    """Check that two runs of texts of equal content are the same, bit for bit."""
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
    for name in ("samples.txt", "references.json"):
        assert (left / name).read_bytes() == (right / name).read_bytes()
    summaries = [
        json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for folder in (left, right)
    ]
    assert _without_clocks(summaries[0]) == _without_clocks(summaries[1])


def random_kill(rng: np.random.Generator, n_calls: Mapping[str, int]) -> Kill:
    """Draw a kill among the calls that an undisturbed run makes."""
    kind = list(KILLS)[int(rng.integers(len(KILLS)))]
    call = int(rng.integers(1, n_calls[kind] + 1))
    longest = {"any time": 3.0, "while a checkpoint is written": 0.02}.get(kind, 0.0)
    return Kill(kind, call, round(float(rng.uniform(0.0, longest)), 4))


def killed(folder: Path, text: Path, kill: Kill) -> bool:
    """Let a child train or resume, and kill it; return False if it finished before."""
    arguments = [str(folder), str(text), json.dumps(kill)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.agents.training.broken_runs", *arguments],
        cwd=HOME,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        if child.stdout.read(1):
            time.sleep(kill.seconds)
            child.kill()
        _, complaint = child.communicate(timeout=300)
    assert child.returncode in (-signal.SIGKILL, 0), complaint.decode()
    return child.returncode != 0


def count_calls(asked: TrainConfig) -> dict[str, int]:
    """Count how often a run calls the functions of each kind of kill."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for kind in KILLS:
            _watch(patch, kind, lambda kind=kind: counts.update([kind]))
        train(asked, quiet=True)
    return dict(counts)


def _watch(patch: pytest.MonkeyPatch, kind: str, called: Callable[[], None]) -> None:
    for name in KILLS[kind]:
        path, _, last = name.rpartition(".")
        try:
            owner: Any = importlib.import_module(path)
        except ModuleNotFoundError:  # a class
            module, _, attribute = path.rpartition(".")
            owner = getattr(importlib.import_module(module), attribute)
        patch.setattr(owner, last, _watched(getattr(owner, last), called))


def _watched(function: Callable[..., Any], called: Callable[[], None]) -> Callable[..., Any]:
    def watched(*arguments: Any, **keywords: Any) -> Any:
        called()
        return function(*arguments, **keywords)

    return watched


def _main(folder: Path, text: Path, kill: Kill) -> None:
    n_left = kill.call

    def called() -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            if kill.seconds == 0.0:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(1, b".")  # the parent counts the seconds from here

    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, kill.kind, called)
        begun = (folder / "config.json").is_file()
        train(TrainConfig(resume=str(folder)) if begun else config(text, folder), quiet=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), Kill(*json.loads(sys.argv[3])))
