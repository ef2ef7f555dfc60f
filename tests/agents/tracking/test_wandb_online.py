"""Tests of agents/tracking/wandb.py with the real client, without and with every fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.agents.tracking.fake_wandb import FAULTS, TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wandb online")]

ROOT = Path(__file__).parents[3]
SLACK = 25.0  # seconds, for a machine that does other things too


class Found(NamedTuple):
    """What became of the runs: their folders, what the server received, and the warnings."""

    place: Path
    received: dict[str, dict[str, Any]]
    warnings: dict[str, list[str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Run all of `FAULTS` in a process that knows no account and no proxy."""
    place = tmp_path_factory.mktemp("wandb")
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    own = {"HOME": str(place), "NETRC": str(place / "netrc"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.agents.tracking.fake_wandb"],
        cwd=place,
        env={**kept, **own, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=True,
    )
    parts = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
    warnings = {
        fault: [line for line in part.splitlines() if line.startswith("Weights & Biases")]
        for fault, part in parts.items()
    }
    return Found(place, json.loads(done.stdout.splitlines()[-1]), warnings)


def test_all_rows_arrive_and_nothing_of_the_machine(found: Found) -> None:
    received = found.received["none"]
    assert found.warnings["none"] == []
    assert [row["grpo/loss"] for row in received["history"]] == [n / 2 for n in range(6)]
    assert [row["forward_tokens"] for row in received["history"]] == list(range(6))
    assert received["configs"][0]["seed"] == {"value": 3}
    assert received["exit_codes"] == [0]
    # No list of packages, no patch, no console.
    assert set(received["uploads"]) == {"config.yaml", "wandb-summary.json"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_a_bounded_time_and_no_row(found: Found, fault: str) -> None:
    assert found.received[fault]["seconds"] < 2 * TIMEOUT + SLACK
    lines = (found.place / fault / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["grpo/loss"] for line in lines] == [n / 2 for n in range(6)]
    assert (found.place / fault / "summary.json").is_file()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no account", "No API key configured"),
        ("unknown key", "user is not logged in"),
        ("dead host", "connection refused"),
    ],
)
def test_a_run_that_cannot_start_online_goes_offline(found: Found, fault: str, reason: str) -> None:
    (warning,) = found.warnings[fault]
    assert warning.startswith("Weights & Biases did not start (")
    assert reason in warning
    assert warning.endswith("): trying offline")
    (offline,) = (found.place / fault / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))
    assert found.received[fault]["history"] == []


def test_a_network_that_is_lost_leaves_the_rest_to_upload(found: Found) -> None:
    (warning,) = found.warnings["network lost"]
    assert "did not finish (" in warning
    folder = Path(warning.partition("wandb sync ")[2].partition(")")[0])
    assert list((found.place / folder).glob("run-*.wandb"))
