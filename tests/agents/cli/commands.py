"""Commands of `avatarl`, run in this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.cli import main as cli

ROOT = Path(cli.__file__).parents[2]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command prints; it succeeds, and says nothing else."""
    assert cli.avatarl(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.removesuffix("\n")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line in which a command is refused, without its name."""
    assert cli.avatarl(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    start, _, line = err.partition(": error: ")
    assert start in ("avatarl", f"avatarl {words[0]}")
    return line.rstrip("\n")


def started(*words: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a process of its own."""
    code = "import sys; from agents.cli.main import avatarl; sys.exit(avatarl())"
    environment = {**os.environ, **options.pop("env", {}), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "utf8", "-c", code, *words]
    return subprocess.run(command, env=environment, check=False, **options)
