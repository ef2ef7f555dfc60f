"""A disk that is full, or that nobody may write to: one clear line, and nothing lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from agents.cli.main import avatarl, main
from agents.training import checkpoint
from agents.training.config import TrainConfig
from agents.training.loop import train
from agents.training.summary import RunSummary
from tests.agents.report.pages import Page
from tests.agents.training.broken_runs import HOME, assert_same_run, config
from tests.training_runs import flags

pytestmark = pytest.mark.slow

FAILURE, REFUSED = 1, 2  # exit codes
Mount = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Make a small disk, called with options of mount; change it, called again."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        words = ["-o", f"remount,{options}"] if place.is_mount() else ["-t", "tmpfs", "-o", options]
        tried = subprocess.run(
            ["mount", *words, "none", str(place)], check=False, capture_output=True, text=True
        )
        if tried.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {tried.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


Complaint = Callable[[Sequence[str], int], str]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Train, with words of the command line that end in an exit code; return its one complaint."""

    def run(words: Sequence[str], code: int) -> str:
        capsys.readouterr()
        assert main(words) == code
        return only_line(capsys.readouterr().err)

    return run


def only_line(told: str) -> str:
    """Return the one line that stands on stderr below the progress bars."""
    lines = [line for line in told.splitlines() if line and not re.search("it/s|s/it", line)]
    assert len(lines) == 1, told
    assert told.endswith(lines[0] + "\n")
    return lines[0]


@pytest.mark.parametrize(
    ("room", "ballast", "seconds"),
    [
        ("size=128k", 108_000, 1e9),  # the metrics do not fit, before a checkpoint is due
        ("size=16k", 8_000, 0.0),  # nor does a first checkpoint
    ],
)
def test_a_run_on_a_full_disk_resumes_once_there_is_room(
    room: str,
    ballast: int,
    seconds: float,
    text: Path,
    whole: RunSummary,
    disk: Mount,
    complaint: Complaint,
) -> None:
    place = disk(room)
    folder = place / "run"
    (place / "ballast").write_bytes(bytes(ballast))
    line = complaint(flags(config(text, folder, checkpoint_seconds=seconds)), FAILURE)
    assert line.startswith(
        f"train.py: error: out must be a folder that can be written to, got {str(folder)!r}"
    )
    assert line.endswith(f"with: avatarl train --resume {folder}")
    assert not (folder / "summary.json").exists()
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    root = folder / "checkpoints"
    for path in checkpoint.checkpoints(root) if root.is_dir() else []:
        checkpoint.read_about(path)  # whole
    # Without more room it says the same again, and loses nothing.
    assert complaint(["--resume", str(folder)], FAILURE) == line
    disk("size=32m")
    train(TrainConfig(resume=str(folder)), quiet=True)
    assert_same_run(folder, whole.folder)


def test_a_run_is_whole_also_where_its_report_has_no_room(
    text: Path, whole: RunSummary, disk: Mount
) -> None:
    folder = disk("size=4m") / "run"
    child = subprocess.run(
        [sys.executable, "train.py", *flags(config(text, folder))],
        cwd=HOME,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert child.returncode == FAILURE
    line = only_line(child.stderr)
    assert "No space left on device" in line
    assert line.endswith(f"avatarl report {folder}")
    assert_same_run(folder, whole.folder)
    assert avatarl(["report", str(folder)]) == REFUSED
    disk("size=32m")
    assert avatarl(["report", str(folder)]) == 0
    assert whole.verdict in Page(folder / "report.html").text


def test_a_folder_that_nobody_may_write_to_is_refused(
    text: Path, disk: Mount, tmp_path: Path, complaint: Complaint
) -> None:
    (tmp_path / "file").touch()
    line = complaint(flags(config(text, tmp_path / "file" / "run")), REFUSED)
    assert line.startswith("train.py: error: out must be a folder that can be written to, got '")
    assert line.endswith("/file/run': Not a directory")
    place = disk("size=32m")
    train(config(text, place / "run", checkpoint_seconds=1e9), quiet=True)
    (place / "run" / "summary.json").unlink()  # as if it had been killed
    disk("ro")
    for words in (flags(config(text, place / "new")), ["--resume", str(place / "run")]):
        line = complaint(words, REFUSED)
        assert line.startswith("train.py: error: out must be a folder that can be written to, got")
        assert line.endswith("Read-only file system")
