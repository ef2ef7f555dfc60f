"""Several processes train as one does; one of them does all the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from agents.distributed import ALONE, Ranks, joined, own_device, place, require_same
from agents.errors import DriftError
from agents.tracking.run_folder import resume_command, start_command
from agents.training import checkpoint
from agents.training.curriculum import CurriculumConfig
from agents.training.loop import train
from tests.agents.ranks_child import RECIPES, learn
from tests.agents.training.broken_runs import assert_same_run, config
from tests.fakes import tiny_gpt
from tests.training_runs import everything, flags, same, write_text

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "tests" / "agents" / "ranks_child.py"
TIMEOUT = 240
# In one process of the test run, for the runs that several tests share.
pytestmark = pytest.mark.xdist_group("ranks")


class Ended(NamedTuple):
    """What became of processes that torchrun started."""

    code: int
    out: str
    errors: str
    found: list[dict[str, Any]]
    """What each left, by rank."""


def launch(folder: Path, job: str, *words: str, n_processes: int = 2) -> Ended:
    """Let torchrun start a job of ranks_child.py, wait for it, and never for ever."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n_processes), str(CHILD), job, str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as run:
        try:
            out, errors = run.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            run.terminate()  # which ends what it started, unlike kill
            out, errors = run.communicate(timeout=60)
            pytest.fail(f"still running after {TIMEOUT} s: {out}\n{errors}")
    kept = [folder / f"{rank}.pt" for rank in range(n_processes)]
    found = [torch.load(path, weights_only=False) for path in kept if path.exists()]
    return Ended(run.returncode, out, errors, found)


def complaints(ended: Ended) -> list[str]:
    """Return the lines in which the program says why it ended."""
    return [line for line in ended.errors.splitlines() if line.startswith("train.py: ")]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found who learned together."""
    ended = launch(tmp_path_factory.mktemp("curves"), "curves")
    assert ended.code == 0, ended.errors
    assert len(ended.found) == 2
    return ended.found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_learn_as_one_does(recipe: str, learned: list[dict[str, Any]]) -> None:
    first, second = (found[recipe] for found in learned)
    assert first["stats"] == second["stats"]
    assert same(first["after"], second["after"])
    learner, stats = learn(recipe, ALONE)
    assert first["counts"] == second["counts"]
    assert first["counts"][0] == learner.forward_tokens
    np.testing.assert_allclose(first["counts"][1], learner.kl_coefficient, rtol=1e-5)
    assert any(one != other for one, other in zip(first["stats"], stats, strict=True))
    ours, theirs = np.array(first["stats"]), np.array(stats)
    if recipe == "muon":  # computes in bfloat16, where the last bit of a sum counts for more
        np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=0, atol=5e-3)
        return
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    for together, alone in zip(first["after"], everything(learner), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_is_skipped_in_all(
    learned: list[dict[str, Any]],
) -> None:
    for found in learned:
        stats, n_bad = found["skipped"]
        assert n_bad == 1
        assert np.isnan([stats.loss, stats.grad_norm]).all()
        assert same(found["after the skip"], found["ce"]["after"])


@pytest.mark.slow
def test_a_committed_operation_reaches_the_others_bit_for_bit(
    learned: list[dict[str, Any]],
) -> None:
    first, second = learned
    assert first["operated"] == second["operated"] == [False, True]
    assert same(first["after the operation"], second["after the operation"])
    n_weights = len(list(tiny_gpt(0).parameters()))
    moments = [found["after the operation"][n_weights:] for found in learned]
    assert all(same(left, learned[0]["ce"]["after"][n_weights:]) for left in moments)


@pytest.mark.slow
def test_a_refusal_of_one_process_is_one_of_all(learned: list[dict[str, Any]]) -> None:
    first, second = (found["refusals"] for found in learned)
    own = ["ImportError: 0 refuses", "ImportError: 1 refuses"]
    assert first == ["", own[0], "ValueError: 1 refuses", own[0]]
    assert second == ["", "ValueError: 0 refuses", own[1], own[1]]
    assert [found["sum"] for found in learned] == [3, 3]


def test_the_shares_of_a_batch_are_equal_and_make_up_all_of_it() -> None:
    rows = np.arange(24).reshape(12, 2)
    for count in (1, 2, 3, 4):
        shares = [Ranks(rank, count).shard(rows) for rank in range(count)]
        assert {len(share) for share in shares} == {12 // count}
        assert np.array_equal(np.concatenate(shares), rows)


def test_one_process_needs_no_others() -> None:
    value = torch.ones(3)
    with joined() as ranks, ranks.together(ValueError), ranks.agreeing(ValueError):
        assert ranks == ALONE == Ranks()
        ranks.average([value])
        assert ranks.broadcast(value) is value
        assert ranks.gather(1) == [1]
        require_same(ranks, torch.nn.Linear(2, 2))
    assert torch.equal(value, torch.ones(3))
    assert not torch.distributed.is_initialized()


def test_processes_with_other_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(_: Ranks, mine: bytes) -> list[bytes]:
        return [mine, mine[::-1]]

    monkeypatch.setattr(Ranks, "gather", theirs)
    with pytest.raises(DriftError, match=r"^weights must be the same on every rank"):
        require_same(Ranks(0, 2), torch.nn.Linear(2, 2))


def test_the_launchers_environment_says_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py"])
    assert place() == (0, 1)
    assert start_command() == ["python", "train.py"]
    assert own_device("cuda:1") == "cuda:1"
    assert resume_command(Path("run")) == "python train.py --resume run"
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert place() == (5, 8)
    command = "torchrun --nnodes 2 --nproc-per-node 4 train.py"
    assert " ".join(start_command()) == command
    assert resume_command(Path("run")) == f"{command} --resume run"
    assert [own_device(name) for name in ("cpu", "cuda")] == ["cpu", "cuda:1"]
    message = r"^device must have no number with several processes, got 'cuda:0'$"
    with pytest.raises(ValueError, match=message):
        own_device("cuda:0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


class Pair(NamedTuple):
    """A run of two processes, with every operation committed."""

    folder: Path
    ended: Ended


@pytest.fixture(scope="module")
def pair(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    asked = flags(config(text, folder / "run"))
    return Pair(folder / "run", launch(folder / "found", "cli", "keep@1", *asked))


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_a_whole_run_ends_with_the_same_model_in_every_process(pair: Pair) -> None:
    assert pair.ended.code == 0, pair.ended.errors
    first, second = pair.ended.found
    assert same(first["end"], second["end"])
    summary = json.loads((pair.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["commits"]["kept"] == summary["commits"]["tried"] == 2
    assert summary["environment"]["processes"] == 2
    settings = json.loads((pair.folder / "config.json").read_text(encoding="utf-8"))
    assert settings["processes"] == 2
    assert summary["command"].startswith("torchrun --nproc-per-node 2 train.py --preset smoke")
    assert pair.ended.out.count("validation: accuracy") == 1
    assert "resuming" not in pair.ended.out


@pytest.mark.slow
def test_a_run_is_written_down_once_and_counts_whole_batches(
    pair: Pair, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.evaluation.paired.PairedResult.is_improvement", True)
    alone = train(config(text, tmp_path / "run"), quiet=True)
    clocks = ("kind", "phase", "update", "operation", "forward_tokens")
    both = [
        [[json.loads(row)[name] for name in clocks] for row in rows(folder)]
        for folder in (pair.folder, alone.folder)
    ]
    assert both[0] == both[1]
    assert len(rows(pair.folder)) == len(set(rows(pair.folder)))


@pytest.mark.slow
def test_a_signal_ends_all_processes_and_they_go_on_to_the_very_same_end(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    asked = flags(config(text, folder, checkpoint_seconds=1e9))
    ended = launch(tmp_path / "stopped", "cli", "keep@1,term@3", *asked)
    assert [found["code"] for found in ended.found] == [143, 143], ended.errors
    command = f"torchrun --nproc-per-node 2 train.py --resume {folder}"
    assert complaints(ended) == [f"train.py: stopped; resume with: {command}"]
    assert len(checkpoint.checkpoints(folder / "checkpoints")) == 1
    again = launch(tmp_path / "again", "cli", "keep@1", "--resume", str(folder))
    assert again.code == 0, again.errors
    assert same(again.found[0]["end"], again.found[1]["end"])
    assert same(again.found[0]["end"], pair.ended.found[0]["end"])
    assert_same_run(folder, pair.folder)


@pytest.mark.slow
def test_a_run_that_diverges_goes_back_once_in_all_processes(text: Path, tmp_path: Path) -> None:
    plan = CurriculumConfig(bootstrap_updates=16, surgery_rounds=0, joint_rounds=0)
    asked = flags(config(text, tmp_path / "run", curriculum=plan))
    ended = launch(tmp_path / "found", "cli", "once@3", *asked)
    assert ended.code == 0, ended.errors
    assert [found["n"] for found in ended.found] == [2, 2]
    assert ended.out.count("going back to the last checkpoint, once") == 1
    assert same(ended.found[0]["end"], ended.found[1]["end"])


@pytest.mark.slow
def test_the_others_sample_under_the_operation_that_the_first_chose(
    text: Path, tmp_path: Path
) -> None:
    asked = flags(config(text, tmp_path / "run"))
    asked += ["--curriculum.commit", "rollout", "--grpo.estimator", "grpo"]
    asked += ["--curriculum.joint-rounds", "3"]
    ended = launch(tmp_path / "found", "cli", "helps@1", *asked)
    assert ended.code == 0, ended.errors
    assert same(ended.found[0]["end"], ended.found[1]["end"])
    assert [found["operated"] for found in ended.found] == [4, 4]


@pytest.mark.slow
def test_a_surgeon_that_diverges_ends_all_processes(text: Path, tmp_path: Path) -> None:
    asked = flags(config(text, tmp_path / "run"))
    ended = launch(tmp_path / "found", "cli", "surgeon@1", *asked)
    assert [found["code"] for found in ended.found] == [1, 1], ended.errors
    assert ended.out.count("going back to the last checkpoint, once") == 1
    assert complaints(ended) == ["train.py: error: the surgeon has diverged"]


@pytest.mark.slow
def test_a_lost_process_ends_the_others(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = launch(tmp_path / "lost", "cli", "die@7", *flags(config(text, folder)))
    assert ended.code != 0
    assert not (folder / "summary.json").exists()
    assert checkpoint.checkpoints(folder / "checkpoints")


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line_by_all(text: Path, tmp_path: Path) -> None:
    asked = [*flags(config(text, tmp_path / "run")), "--grpo.batch-size", "5"]
    ended = launch(tmp_path / "found", "cli", "", *asked)
    assert [found["code"] for found in ended.found] == [2, 2], ended.errors
    (line,) = complaints(ended)
    assert re.match("train.py: error: .*batch_size must be a multiple of .*processes, 2", line)
    assert not (tmp_path / "run").exists()
