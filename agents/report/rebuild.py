"""Reports written anew from run folders: one for each, and one for all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from agents.report.comparison import distinct, write_comparison
from agents.report.data import RunRecord, load_run
from agents.report.page import write_report
from agents.report.shell import part

COMPARISON = "comparison.html"
REPORT, METRICS = "report.html", "metrics.jsonl"  # of a run


def rebuild(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write the report of each run and, of several runs, a page that compares them.

    Where there is a supervised control among the runs, the others' reports show it beside their
    own figures if it read the same text.

    Args:
        folders: Run folders, one or more.
        out: Where to write the comparison; default `comparison.html` in the present folder.

    Returns:
        Paths of the pages; the comparison, if there is one, comes last.

    Raises:
        ValueError: If there is no folder, one of them is not that of a run, or something else than
            a page is where the comparison is to go; then nothing has been written.
    """
    folders = distinct(folders)
    if len(folders) > 1 or out is not None:
        out = out or Path(COMPARISON)
        check_page(out)
    runs = [load_run(folder) for folder in folders]
    controls = [(folder, run) for folder, run in zip(folders, runs, strict=True) if run.is_control]
    pages = [
        write_report(folder, control=_control_of(run, controls))
        for folder, run in zip(folders, runs, strict=True)
    ]
    if out is not None:
        pages.append(write_comparison(folders, out))
    return pages


def check_page(out: Path) -> None:
    """Refuse to write a page over what is none of ours, or under the name of a run's own file.

    Raises:
        ValueError: if something else is there, or a run's folder would hold a file of that name.
    """
    if os.path.lexists(out) and not _is_page(out):
        raise ValueError(f"out must be a new file or a page written before, got {str(out)!r}")
    # A page called summary.json would say that a run has finished.
    folders = out.absolute().parents
    in_run = any(os.path.isfile(f / "config.json") and os.path.isfile(f / METRICS) for f in folders)
    if in_run and (out.suffix != ".html" or out.name == REPORT):
        raise ValueError(
            f"out must be a page of its own in a run's folder, such as {COMPARISON}, "
            f"got {str(out)!r}"
        )


def _is_page(path: Path) -> bool:
    """Whether a file is empty or begins as all our pages do; a link or a device does not count."""
    if path.is_symlink() or not path.is_file():
        return False
    beginning = part("shell.html").partition("$")[0].encode()
    with path.open("rb") as file:
        return file.read(len(beginning)) in (b"", beginning)


def _control_of(run: RunRecord, controls: list[tuple[Path, RunRecord]]) -> Path | None:
    if run.is_control:
        return None
    # Another text, or a model of another size, would say nothing of how far this one could get.
    same = ("corpus_sha256", "lm")
    return next(
        (folder for folder, other in controls if all(other.fact(x) == run.fact(x) for x in same)),
        None,
    )
