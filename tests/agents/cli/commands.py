"""Commands of `avatarl`, run in this process."""

from __future__ import annotations

import pytest

from agents.cli.main import avatarl


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command prints; it succeeds, and says nothing else."""
    assert avatarl(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.removesuffix("\n")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line in which a command is refused, without its name."""
    assert avatarl(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    start, _, line = err.partition(": error: ")
    assert start in ("avatarl", f"avatarl {words[0]}")
    return line.rstrip("\n")
