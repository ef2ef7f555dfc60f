"""Reports written anew from run folders: one for each, and one for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agents.report.comparison import distinct, write_comparison
from agents.report.data import RunRecord, load_run
from agents.report.page import write_report


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
        ValueError: If there is no folder, or one of them is not that of a run; then nothing has
            been written.
    """
    folders = distinct(folders)
    runs = [load_run(folder) for folder in folders]
    controls = [(folder, run) for folder, run in zip(folders, runs, strict=True) if run.is_control]
    pages = [
        write_report(folder, control=_control_of(run, controls))
        for folder, run in zip(folders, runs, strict=True)
    ]
    if len(folders) > 1 or out is not None:
        pages.append(write_comparison(folders, out or Path("comparison.html")))
    return pages


def _control_of(run: RunRecord, controls: list[tuple[Path, RunRecord]]) -> Path | None:
    if run.is_control:
        return None
    # Another text, or a model of another size, would say nothing of how far this one could get.
    same = ("corpus_sha256", "lm")
    return next(
        (folder for folder, other in controls if all(other.fact(x) == run.fact(x) for x in same)),
        None,
    )
