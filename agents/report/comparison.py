"""Several runs on one page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

from agents.report.contrasts import (
    curves_section,
    differences_section,
    effects_section,
    numbers_section,
    verdicts_section,
)
from agents.report.data import load_run
from agents.report.marks import Figure
from agents.report.overlay import Entry, make_entries
from agents.report.parts import Html, escape, join, paragraph
from agents.report.shell import part, write_page


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that lays several runs on one another; it needs no network.

    Runs may still be going on or have been broken off. Those of supervised training are marked as
    controls.

    Args:
        folders: Run folders, one or more; one that is named twice counts once.
        out: Where to write the page.

    Returns:
        Path of the page.

    Raises:
        ValueError: If there is no folder, or one of them is not that of a run.
    """
    folders = distinct(folders)
    entries = make_entries([load_run(folder) for folder in folders], _labels(folders))
    links = {
        entry.label: _link(folder, out)
        for folder, entry in zip(folders, entries, strict=True)
        if (folder / "report.html").is_file()
    }
    figures: dict[str, Figure] = {}
    body = Template(part("comparison.html")).substitute(
        eyebrow=escape(f"Comparison of {_count(len(entries), 'run')}"),
        facts=escape(" \u00b7 ".join(entry.label for entry in entries)),
        notes=_notes(entries),
        numbers=numbers_section(entries, links),
        verdicts=verdicts_section(entries),
        curves=curves_section(entries, figures),
        effects=effects_section(entries, figures),
        differences=differences_section(entries),
    )
    title = escape(f"{_count(len(entries), 'run')} side by side")
    return write_page(out, title=title, body=body, figures=figures)


def distinct(folders: Sequence[Path]) -> list[Path]:
    """Leave out folders that have been named before.

    Raises:
        ValueError: If there are none.
    """
    kept: dict[Path, Path] = {}
    for folder in folders:
        kept.setdefault(folder.resolve(), folder)
    if not kept:
        raise ValueError("run_folders must name at least one folder, got none")
    return list(kept.values())


def _labels(folders: Sequence[Path]) -> list[str]:
    """Call each run by its folder's name, with as many of the folders above as tell it apart."""
    paths = [folder.resolve().parts for folder in folders]
    labels = [path[-1] for path in paths]
    depth = 1
    while len(set(labels)) < len(labels):
        depth += 1
        again = {label for label, n in Counter(labels).items() if n > 1}
        labels = [
            "/".join(path[-depth:]) if label in again else label
            for path, label in zip(paths, labels, strict=True)
        ]
    return labels


def _link(folder: Path, out: Path) -> str:
    """Give the address of a run's report, as seen from the page."""
    target = folder.resolve() / "report.html"
    try:
        address = Path(os.path.relpath(target, out.resolve().parent)).as_posix()
        return quote(os.fsencode(address))
    except ValueError:  # on another drive of Windows
        return target.as_uri()


def _notes(entries: Sequence[Entry]) -> Html:
    notes = []
    texts = dict.fromkeys((e.run.fact("corpus"), e.run.fact("corpus_sha256")) for e in entries)
    if len({checksum for _, checksum in texts}) > 1:
        names = ", ".join(dict.fromkeys(str(name) for name, _ in texts))
        notes.append(
            f"These runs read different texts ({names}). Their losses and accuracies must not be "
            "compared across texts, and the n-gram tables are left out of the curves."
        )
    going = [entry.label for entry in entries if not entry.run.finished]
    if going:
        notes.append(
            f"Not finished: {', '.join(going)}. Their numbers are of their last evaluation, on a "
            "fixed slice of the held-out text; those of finished runs are of all of it."
        )
    torn = [f"{entry.label} ({entry.run.torn})" for entry in entries if entry.run.torn]
    if torn:
        notes.append(f"Lines of metrics.jsonl that were torn, and are left out: {', '.join(torn)}.")
    return join(paragraph(note, "banner") for note in notes)


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"
