"""The report of one run: its page, filled in."""

from __future__ import annotations

from pathlib import Path
from string import Template

from agents.report.data import RunRecord, load_run
from agents.report.marks import Figure
from agents.report.operations import operations_section
from agents.report.parts import Html, duration, escape, join, paragraph, settings
from agents.report.result import result_section
from agents.report.samples import samples_section
from agents.report.sections import curves_section, phases_section
from agents.report.shell import part, write_page

_LEAD_LENGTH = 300  # characters; a longer verdict is set smaller


def write_report(
    run_folder: Path, *, control: Path | None = None, reload_seconds: int | None = None
) -> Path:
    """Write `report.html` into a run folder.

    The page needs no network and no other file. A run that has not finished gets a report of what
    it has done so far.

    Args:
        run_folder: A folder with `config.json`, `metrics.jsonl` and, once finished, `summary.json`.
        control: The folder of a run of supervised training on the same text, to compare with.
        reload_seconds: For a run that is still going on: after how long a browser that shows the
            page is to load it anew. Nothing of the kind stands in the report of a finished run.

    Returns:
        Path of the page.

    Raises:
        ValueError: If a folder is not that of a run.
    """
    run = load_run(run_folder)
    beside = None if control is None else load_run(control)
    reload_seconds = None if run.finished else reload_seconds
    figures: dict[str, Figure] = {}
    body = Template(part("run.html")).substitute(
        name=escape(run.name),
        verdict=_verdict(run, reload_seconds),
        facts=escape(_facts(run)),
        about=escape(_about(run)),
        result=result_section(run, beside),
        curves=curves_section(run, figures, beside),
        operations=operations_section(run, figures),
        samples=samples_section(run),
        phases=phases_section(run),
        repeat=_repeat(run),
    )
    return write_page(
        run_folder / "report.html",
        title=escape(f"What the surgeon was worth \u00b7 {run.name}"),
        body=body,
        figures=figures,
        reload_seconds=reload_seconds,
    )


def _verdict(run: RunRecord, reload_seconds: int | None) -> Html:
    effect = run.summary.get("surgeon_effect")
    if not run.finished:
        text = (
            "This run has not finished: it is still going on, or it was stopped. What the surgeon "
            "is worth is measured at the end; below is how far the run has come."
        )
        return join([paragraph(text, "verdict banner"), paragraph(_state(run, reload_seconds))])
    if effect is None:
        text = "No surgeon took part in this run, so there is nothing to be judged."
        return paragraph(text, "verdict")
    text = str(effect["verdict"])
    return paragraph(text, "verdict" if len(text) <= _LEAD_LENGTH else "verdict long")


def _state(run: RunRecord, reload_seconds: int | None) -> str:
    """Say how far a run has come, and when the page will know more."""
    last = run.rows[-1] if run.rows else {"phase": "start"}
    text = (
        f"This page is of phase {last['phase']}, update {last.get('update', 0)}, operation "
        f"{last.get('operation', 0)}, {duration(run.seconds)} after the start."
    )
    if reload_seconds is not None:
        text += f" While the run goes on it loads itself anew every {reload_seconds} seconds."
    return text


def _facts(run: RunRecord) -> str:
    facts = [f"{name} {run.fact(name)}" for name in ("corpus", "preset", "surgeon", "seed")]
    return " \u00b7 ".join([*facts, duration(run.seconds)])


def _about(run: RunRecord) -> str:
    grpo = run.config.get("grpo") or {}
    if run.is_control:
        learner = (
            "A small language model that began with random weights learned to continue text, one "
            "character at a time. Its estimator was ce, the supervised control: it was shown the "
            "right characters, so this is not reinforcement learning."
        )
    elif grpo.get("exploration") == "all_actions":
        learner = (
            "A small language model that began with random weights learned to continue text, one "
            "character at a time. Nothing was sampled: it followed the exact expectation of its "
            "reward, a bound on what reinforcement learning could do, and equal in gradient to a "
            "supervised loss."
        )
    else:
        learner = (
            "A small language model that began with random weights learned to continue text, one "
            "character at a time, from rewards alone: it guessed, and was paid for right guesses."
        )
    surgeon = (
        "A second agent, the surgeon, operated on its attention weights. An operation changes them "
        "for a moment, the surgeon is paid by how much better the model then writes, and the "
        "change is undone exactly, unless it proved itself on fresh draws and was kept."
        if run.of_kind("operation")
        else "Nobody operated on it so far."
        if not run.finished
        else "Nobody operated on it."
    )
    return f"{learner} {surgeon}"


def _repeat(run: RunRecord) -> Html:
    command = run.fact("command")
    parts = []
    if command is not None:
        parts += [
            paragraph("The command that made this run:"),
            Html(f"<pre><code>{escape(command)}</code></pre>"),
        ]
    checksum = run.fact("corpus_sha256")
    if checksum is not None:
        parts.append(
            Html(
                f"<p>The text was {escape(run.fact('corpus'))}; the sha256 of its bytes is "
                f"<code>{escape(checksum)}</code>.</p>"
            )
        )
    if run.torn:
        parts.append(
            paragraph(
                f"Lines of metrics.jsonl that were torn, and are left out here: {run.torn}.", "note"
            )
        )
    parts.append(settings("Settings", run.config))
    if environment := run.summary.get("environment"):
        parts.append(settings("Environment", environment))
    return join(parts)
