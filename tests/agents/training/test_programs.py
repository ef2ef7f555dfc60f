"""Runs as programs: signals, terminals, and the command that a stopped run prints."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents.training.curriculum import CurriculumConfig
from tests.agents.training.broken_runs import HOME, config, steps_of
from tests.training_runs import flags

pytestmark = pytest.mark.slow

TRAIN_PY = [sys.executable, str(HOME / "train.py")]
ENDLESS = {
    "curriculum": CurriculumConfig(bootstrap_updates=9999, surgery_rounds=0, joint_rounds=0),
    "surgeon": "none",
    "surgeon_options": {},
}


def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment without a network, cache or data folder."""
    known = {name: x for name, x in os.environ.items() if name != "AVATARL_DATA_DIR"}
    nowhere = "http://127.0.0.1:9"
    known |= {"HTTPS_PROXY": nowhere, "https_proxy": nowhere, "no_proxy": "", "NO_PROXY": ""}
    known |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    known |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return known


def start(words: list[str] | str, **more: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, **more)


def until(condition: Callable[[], object], child: subprocess.Popen[str]) -> None:
    begin = time.monotonic()
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() - begin < 240
        time.sleep(0.05)


def stopped(child: subprocess.Popen[str], ready: Callable[[], object], number: int) -> str:
    """Send a signal once it is time; return the command that the child says resumes the run."""
    until(ready, child)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 128 + number, err
    found = re.search(r"stopped; resume with: (.*)\n", err)
    assert found, err
    return found[1]


def test_a_run_resumes_by_the_command_that_it_prints(tmp_path: Path) -> None:
    place = tmp_path / "a new place"
    place.mkdir()
    about = {"cwd": place, "env": environment(tmp_path)}

    def n_rows() -> int:
        found = [path.read_text(encoding="utf-8") for path in place.glob("runs/*/metrics.jsonl")]
        return "".join(found).count('"kind": "grpo"')

    words = [*TRAIN_PY, "--preset", "smoke"]
    command = stopped(start(words, **about), n_rows, signal.SIGINT)
    (folder,) = (place / "runs").iterdir()
    steps = steps_of(folder)
    assert len(steps) == 1
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["corpus"] == "playwright"
    before = (folder / "metrics.jsonl").read_bytes()
    known = n_rows()
    child = start(f"exec {command}", shell=True, **about)
    assert stopped(child, lambda: n_rows() > known, signal.SIGTERM) == command
    assert steps_of(folder)[-1] > steps[-1]
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == stored


def endless(text: Path, folder: Path) -> list[str]:
    """Return the command of a small run that continues until it is stopped."""
    return [*TRAIN_PY, *flags(config(text, folder, **ENDLESS))]


def test_signals_that_were_ignored_from_the_start_stay_ignored(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", *endless(text, folder)])

    def newest() -> int:
        return max(steps_of(folder), default=0)

    until(newest, child)
    for number in (signal.SIGINT, signal.SIGHUP):
        child.send_signal(number)
        then = newest()
        until(lambda then=then: newest() > then + 1, child)  # type: ignore[misc]
    stopped(child, newest, signal.SIGTERM)


def test_a_run_whose_terminal_is_closed_ends_with_a_checkpoint(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        words = endless(text, folder)
        os.execv(words[0], words)
    deadline = time.monotonic() + 240
    while not steps_of(folder):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    newest = steps_of(folder)[-1]
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
    assert steps_of(folder)[-1] >= newest
    assert "has not finished" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "delay"), [(TRAIN_PY, 0.3), (["avatarl", "train"], 1.0)], ids=["train.py", "avatarl"]
)
def test_ctrl_c_while_a_command_begins_is_one_line(
    words: list[str], delay: float, tmp_path: Path
) -> None:
    child = start([*words, "--corpus", "playwright"], cwd=tmp_path, env=environment(tmp_path))
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert re.search(r"(^|\n)(train.py|avatarl train): (interrupted|stopped; .*)\n$", err)
    assert "Traceback" not in err
