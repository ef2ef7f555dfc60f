"""Pages: one self-contained HTML file about one or several runs, finished or not."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from urllib.parse import quote

from agents.report.data import Run, distinct, load_run, same_text
from agents.report.figures import Figure
from agents.report.html import Html, by_run, duration, escape, join, paragraph, part
from agents.report.sections import SECTIONS
from avatarl_env.files import write_atomically

REPORT = "report.html"  # of each run
COMPARISON = "comparison.html"  # of several
RELOAD_SECONDS = 30

_LIVE_SHARE = 0.02  # largest share of a run's time for its reports
_LEAD_LENGTH = 300  # characters; a longer verdict gets a smaller font


def write_report(run_folder: Path, *, reload_seconds: int | None = None) -> Path:
    """Write `report.html` into a run folder.

    The page needs no network and no other file. An unfinished run gets a report of its progress.

    Args:
        run_folder: a folder with `config.json`, `metrics.jsonl` and, once finished, `summary.json`.
        reload_seconds: interval at which a browser reloads the page of an unfinished run; None for
            never.

    Returns:
        Path of the page.

    Raises:
        ValueError: if the folder is not a run's.
    """
    return _write_page([load_run(run_folder)], run_folder / REPORT, reload_seconds)


def write_reports(run_folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write the report of each run and, for several runs, one page that compares them.

    Args:
        run_folders: one or more run folders, finished or not; duplicates count once.
        out: path of the comparison; default `comparison.html` in the working directory. If it is
            given, the comparison is written for one run too.

    Returns:
        Paths of the pages, the comparison last.

    Raises:
        ValueError: if there is no folder, a folder is not a run's, or `out` exists and is not a
            page, or is one of a run's own files, before anything is written; or if `out` cannot be
            written.
    """
    folders = distinct(run_folders)
    if len(folders) > 1 or out is not None:
        out = out or Path(COMPARISON)
        _check_out(out)
    runs = [
        load_run(folder, name=name, index=index)
        for index, (name, folder) in enumerate(folders.items())
    ]
    pages = [write_report(folder) for folder in folders.values()]
    if out is not None:
        links = [_link(page, out) for page in pages]
        linked = [replace(r, link=x) for r, x in zip(runs, links, strict=True)]
        try:
            pages.append(_write_page(linked, out))
        except OSError as error:
            raise ValueError(
                f"out must be a file that can be written, got {str(out)!r}: {error.strerror}"
            ) from error
    return pages


class LiveReport:
    """Keeps the report of an unfinished run current, at little cost.

    `refresh` may be called at any rate: it writes a report only if the last one is old enough and
    reports have taken at most 2 % of the run's time.

    Args:
        folder: of the run.
        every_seconds: shortest time between two reports, at least 0.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_seconds: float = 15.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder = folder
        self._every_seconds = every_seconds
        self._clock = clock
        self._due = clock()

    def refresh(self) -> bool:
        """Write the report if it is due; return whether it was written.

        If the disk is full, the run continues and a later call tries again.
        """
        start = self._clock()
        if start < self._due:
            return False
        try:
            write_report(self._folder, reload_seconds=RELOAD_SECONDS)
        except OSError:
            return False
        else:
            return True
        finally:
            end = self._clock()
            self._due = end + max(self._every_seconds, (end - start) * (1 / _LIVE_SHARE - 1))


def _write_page(runs: Sequence[Run], path: Path, reload_seconds: int | None = None) -> Path:
    """Fill in the template and write the page atomically."""
    if runs[0].finished:
        reload_seconds = None
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}">\n' if reload_seconds else ""
    names = escape(" \u00b7 ".join(run.name for run in runs))
    heading = "Effect of the surgeon" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    figures: dict[str, Figure] = {}
    sections = [(s, html) for s in SECTIONS if (html := s.build(runs, figures))]
    links = [f'<li><a href="#{escape(s.key)}">{escape(s.title)}</a></li>' for s, _ in sections]
    blocks = [
        f'<section id="{escape(s.key)}">\n<h2>{escape(s.title)}</h2>\n{escape(html)}\n</section>'
        for s, html in sections
    ]
    shown = [{"name": run.name, "control": run.is_control} for run in runs]
    page = Template(part("page.html")).substitute(
        reload=reload,
        title=f"{heading} \u00b7 {names}",
        style=part("style.css"),
        names=names,
        heading=heading,
        lead=_lead(runs),
        notes=join(paragraph(note, "banner") for note in _notes(runs, reload_seconds)),
        links="\n".join(links),
        sections="\n".join(blocks),
        figures=_script_json({"runs": shown, "figures": figures}),
        plotly=_plotly(),
        draw=part("draw.js"),
    )
    write_atomically(path, page.encode("utf-8", "replace"))  # a path may not be valid text
    return path


def _lead(runs: Sequence[Run]) -> Html:
    """Return the verdict of each run; for a single run, also its facts and a description."""
    if len(runs) > 1:
        return by_run(runs, _verdict)
    run, verdict = runs[0], _verdict(runs[0])
    facts = [f"{name} {run.fact(name)}" for name in ("corpus", "preset", "surgeon", "seed")]
    parts = [
        paragraph(verdict, "verdict" if len(verdict) <= _LEAD_LENGTH else "verdict long"),
        paragraph(" \u00b7 ".join([*facts, duration(run.seconds)]), "facts"),
        paragraph(_about(run)),
    ]
    return join(parts)


def _verdict(run: Run) -> str:
    if not run.finished:
        return (
            "This run has not finished: it is still running, or it was stopped. The surgeon's "
            "effect is measured at the end."
        )
    effect = run.summary.get("surgeon_effect")
    return str(effect.get("verdict")) if effect else "No surgeon took part in this run."


def _about(run: Run) -> str:
    learned = "It learned by reinforcement learning: it was rewarded for what it sampled."
    if run.grpo.get("exploration") == "all_actions":
        learned = (
            "Nothing was sampled: it followed the exact expectation of its reward, an upper bound "
            "for reinforcement learning."
        )
    if run.is_control:
        learned = "It was trained on the right characters: supervised, not reinforcement learning."
    operated = "No surgeon has operated on it."
    if run.of_kind("operation"):
        operated = (
            "A second agent, the surgeon, operated on its attention weights: it changed them for a "
            "short time and was rewarded if the model then wrote better. The weights were restored "
            "exactly, unless the operation was kept (a commit)."
        )
    return f"The run trains a small language model from random weights. {learned} {operated}"


def _notes(runs: Sequence[Run], reload_seconds: int | None) -> Iterable[str]:
    """Yield notes on missing or incomparable data."""
    if not same_text(runs):
        names = ", ".join(dict.fromkeys(str(run.fact("corpus")) for run in runs))
        yield (
            f"These runs use different texts ({names}). Do not compare their losses and "
            "accuracies; the n-gram references are left out."
        )
    for run in runs:
        whose = f"{run.name}: " if len(runs) > 1 else ""
        if not run.finished:
            last = run.rows[-1] if run.rows else {"phase": "start"}
            text = (
                f"{whose}progress so far: phase {last['phase']}, update {last.get('update', 0)}, "
                f"operation {last.get('operation', 0)}, {duration(run.seconds)} after the start."
            )
            if reload_seconds:
                text += f" The page reloads every {reload_seconds} seconds."
            yield text[0].upper() + text[1:] if not whose else text
        if run.n_damaged:
            yield f"{whose}{run.n_damaged} damaged lines of metrics.jsonl were skipped."


def _link(page: Path, out: Path) -> str:
    """Return the address of a page relative to another."""
    try:
        path = os.path.relpath(page.resolve(), out.resolve().parent)
    except ValueError:  # on another drive of Windows
        return page.resolve().as_uri()
    return quote(os.fsencode(Path(path).as_posix()))


def _check_out(out: Path) -> None:
    """Raise a ValueError if the page would replace another kind of file or one of a run's own."""
    if os.path.lexists(out) and not _is_page(out):
        raise ValueError(f"out must be a new file or a page written before, got {str(out)!r}")
    # A page called summary.json would mark a run as finished.
    files = ("config.json", "metrics.jsonl")
    in_run = any(all(map(os.path.isfile, (f / x for x in files))) for f in out.absolute().parents)
    if in_run and (out.suffix != ".html" or out.name == REPORT):
        raise ValueError(
            f"out must not be a run's own file, but another page like {COMPARISON}, "
            f"got {str(out)!r}"
        )


def _is_page(path: Path) -> bool:
    """Whether a path is a regular file that is empty or starts like our pages."""
    if path.is_symlink() or not path.is_file():
        return False
    beginning = part("page.html").partition("$")[0].encode()
    with path.open("rb") as file:
        return file.read(len(beginning)) in (b"", beginning)


def _script_json(value: object) -> str:
    """Return JSON that cannot end the script element; `<` occurs in strings only."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
