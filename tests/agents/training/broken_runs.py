"""Runs that are broken off, and how to tell that nothing was lost.

As a program, it trains and dies: `python -m tests.agents.training.broken_runs FOLDER TEXT KILL`.
"""

from __future__ import annotations

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
from agents.training.config import TrainConfig
from agents.training.loop import train
from tests.training_runs import QUICK_SAC, small_config

CLOCKS = {"seconds", "time/tokens_per_second"}
QUICK = {key: value for key, value in QUICK_SAC.items() if key != "policy_kwargs"}
HOME = Path(__file__).parents[3]

KILLS: dict[str, tuple[str, ...]] = {
    "any time": ("agents.training.loop._attempt",),
    "while a checkpoint is written": ("agents.training.checkpoint.write",),
    "at a step of a checkpoint": tuple(
        f"agents.training.checkpoint.{name}"
        for name in ("dump_tensors", "_digest", "sync", "_remove")
    ),
    "as a file is replaced": ("avatarl_env.files.os.replace",),
    "in the theater": tuple(
        f"avatarl_env.surgery.theater.SurgicalTheater.{name}"
        for name in ("__enter__", "write", "__exit__")
    ),
    "in an operation": ("avatarl_env.vector_env.AttentionSurgeryVectorEnv.step",),
}
"""Kinds of kills, each with the functions whose calls are counted until it is time."""


class Kill(NamedTuple):
    """When a run is killed: so long after the n-th call of one of a kind's functions."""

    kind: str
    call: int
    seconds: float = 0.0


def config(text: Path, out: Path, **changes: Any) -> TrainConfig:
    settings = {"surgeon_options": QUICK, "checkpoint_seconds": 0.0, **changes}
    return small_config(text, out, **settings)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in CLOCKS}
        for line in lines
    ]


def surgeon_parameters(folder: Path) -> dict[str, torch.Tensor]:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["surgeon"]
    final = folder / "checkpoints" / "final"
    model = class_of(ALGORITHMS[name]).load(final / "surgeon.zip", device="cpu")  # type: ignore[attr-defined]
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
    for name in ("samples.txt", "references.json"):
        assert (left / name).read_bytes() == (right / name).read_bytes()
    summaries = [
        json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for folder in (left, right)
    ]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])


def random_kill(rng: np.random.Generator, n_calls: Mapping[str, int]) -> Kill:
    """Draw a kill; `n_calls` as a run that nothing happens to makes them."""
    kind = list(KILLS)[int(rng.integers(len(KILLS)))]
    call = int(rng.integers(1, n_calls[kind] + 1))
    longest = {"any time": 3.0, "while a checkpoint is written": 0.02}.get(kind, 0.0)
    return Kill(kind, call, round(float(rng.uniform(0.0, longest)), 4))


def killed(folder: Path, text: Path, kill: Kill) -> bool:
    """Let a child train, or go on, and kill it without a chance to say goodbye.

    Returns:
        Whether it died of that; if not, it had finished before.
    """
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
        _watch_one(patch, owner, last, called)


def _watch_one(
    patch: pytest.MonkeyPatch, owner: Any, name: str, called: Callable[[], None]
) -> None:
    function = getattr(owner, name)

    def watched(*arguments: Any, **keywords: Any) -> Any:
        called()
        return function(*arguments, **keywords)

    patch.setattr(owner, name, watched)


def _main(folder: Path, text: Path, kill: Kill) -> None:
    n_left = kill.call

    def called() -> None:
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            if kill.seconds == 0.0:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(1, b".")  # the parent takes the time from here

    with pytest.MonkeyPatch.context() as patch:
        _watch(patch, kill.kind, called)
        begun = (folder / "config.json").is_file()
        train(TrainConfig(resume=str(folder)) if begun else config(text, folder), quiet=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), Kill(*json.loads(sys.argv[3])))
