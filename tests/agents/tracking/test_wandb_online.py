"""The real wandb client against a server on loopback: what works, and every way to fail."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agents.tracking.fake_wandb import FakeServer, wait_for

ROOT = Path(__file__).parents[3]
KEY = "x" * 40
TIMEOUT = 2.0  # seconds, of start and end alike
SLACK = 25.0  # seconds, for a machine that does other things too

# A run in a process of its own: a row for each line that it is sent, and its end with the last.
RUN = f"""
import logging, sys
from agents.tracking import wandb as wandb_sink
from agents.tracking.writer import Clock, MetricWriter, RunFolder

logging.basicConfig(format="%(message)s")
wandb_sink.INIT_TIMEOUT = wandb_sink.FINISH_TIMEOUT = {TIMEOUT}
with MetricWriter(RunFolder("run"), config={{"seed": 3}}, track="online") as writer:
    print("started", flush=True)
    for update, _ in enumerate(sys.stdin):
        clock = Clock(phase="joint", update=update, operation=0, forward_tokens=update, seconds=0.0)
        writer.write("grpo", clock, {{"grpo/loss": update / 2}})
        print("written", flush=True)
    writer.write_summary({{"seconds": 1.0}})
print("ended", flush=True)
"""


def environment(home: Path) -> dict[str, str]:
    """Return the variables of a process that knows of no account and no proxy."""
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    own = {"HOME": str(home), "NETRC": str(home / "netrc"), "NO_PROXY": "127.0.0.1"}
    return {**kept, **own, "PYTHONPATH": str(ROOT)}


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["grpo/loss"] for line in lines]


def ours(stderr: str) -> list[str]:
    """Return what our own logger said."""
    return [line for line in stderr.splitlines() if line.startswith("Weights & Biases")]


class Run:
    """A run that is told when to write a row and when to end."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder / "run"
        env = {**environment(folder), "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._stderr = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=folder,
            env=env,
            text=True,
            stderr=self._stderr,
            **pipes,
        )
        self._expect("started")

    def write(self, n_rows: int) -> None:
        for _ in range(n_rows):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            self._expect("written")

    def end(self) -> tuple[int, float]:
        """End it; return its exit code and how long it took."""
        before = time.monotonic()
        self._process.stdin.close()
        self._expect("ended")
        code = self._process.wait(60)
        return code, time.monotonic() - before

    def warnings(self) -> list[str]:
        self._stderr.seek(0)
        return ours(self._stderr.read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._stderr.close()

    def _expect(self, word: str) -> None:
        said = self._process.stdout.readline().strip()
        self._stderr.seek(0)
        assert said == word, self._stderr.read()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.die()


@contextlib.contextmanager
def begun(folder: Path, url: str) -> Iterator[Run]:
    run = Run(folder, url)
    try:
        yield run
    finally:
        run.close()


@pytest.mark.slow
def test_all_rows_arrive(tmp_path: Path, server: FakeServer) -> None:
    with begun(tmp_path, server.url) as run:
        run.write(3)
        assert run.end()[0] == 0
        assert run.warnings() == []
    assert [row["grpo/loss"] for row in server.history] == [0.0, 0.5, 1.0]
    assert [row["forward_tokens"] for row in server.history] == [0, 1, 2]
    assert server.configs[0]["seed"] == {"value": 3}
    assert server.exit_codes == [0]
    # Nothing of the machine: no list of packages, no patch, no console.
    assert set(server.uploads) == {"config.yaml", "wandb-summary.json"}


@pytest.mark.slow
def test_a_network_that_is_lost_on_the_way_costs_a_warning_and_no_row(
    tmp_path: Path, server: FakeServer
) -> None:
    with begun(tmp_path, server.url) as run:
        run.write(3)
        wait_for(lambda: server.streams)  # it has begun to send what there is
        server.die()
        run.write(3)
        code, seconds = run.end()
        assert code == 0
        assert seconds < TIMEOUT + SLACK
        assert losses(run.folder) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
        assert (run.folder / "summary.json").is_file()
        (warning,) = run.warnings()
    assert "did not finish (no end of the upload in 2 s, later: wandb sync " in warning
    folder = Path(warning.partition("wandb sync ")[2].partition(")")[0])
    assert list((tmp_path / folder).glob("run-*.wandb"))


FAULTS = {"no-account": "", "unknown-key": KEY, "dead-host": KEY}
REASONS = ("No API key configured", "user is not logged in", "connection refused")

# Three runs in one process, one for each way in which none can start online.
RUNS = f"""
import json, logging, os, sys, time
import wandb
from agents.tracking import wandb as wandb_sink
from agents.tracking.writer import Clock, MetricWriter, RunFolder

logging.basicConfig(format="%(message)s")
wandb_sink.INIT_TIMEOUT = wandb_sink.FINISH_TIMEOUT = {TIMEOUT}
clock = Clock(phase="joint", update=1, operation=0, forward_tokens=1, seconds=0.0)
for name, (url, key) in json.loads(sys.argv[1]).items():
    os.environ |= {{"WANDB_BASE_URL": url, "WANDB_API_KEY": key}}
    start = time.monotonic()
    with MetricWriter(RunFolder(name), config={{}}, track="online") as writer:
        writer.write("grpo", clock, {{"grpo/loss": 0.5}})
        writer.write("grpo", clock, {{"grpo/loss": 0.25}})
    print(time.monotonic() - start)
    wandb.teardown()  # so that it looks at the variables again
"""


@pytest.mark.slow
def test_runs_that_cannot_start_online_go_on_offline(tmp_path: Path, server: FakeServer) -> None:
    server.refuses_keys = True
    gone = FakeServer()
    gone.die()
    urls = {"no-account": server.url, "unknown-key": server.url, "dead-host": gone.url}
    runs = json.dumps({name: (urls[name], key) for name, key in FAULTS.items()})
    command = [sys.executable, "-c", RUNS, runs]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), text=True, capture_output=True, check=True
    )
    assert len(done.stdout.split()) == 3
    assert all(float(seconds) < TIMEOUT + SLACK for seconds in done.stdout.split())
    warnings = ours(done.stderr)
    assert len(warnings) == 3
    for warning, reason in zip(warnings, REASONS, strict=True):
        assert warning.startswith("Weights & Biases did not start (")
        assert reason in warning
        assert warning.endswith("): trying offline")
    for name in FAULTS:
        assert losses(tmp_path / name) == [0.5, 0.25]
        (offline,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert list(offline.glob("run-*.wandb"))
    assert server.history == []
