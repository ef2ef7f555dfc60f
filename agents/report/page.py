"""The page as a whole: the template, filled in."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from string import Template

from agents.report.data import RunRecord, load_run
from agents.report.marks import Figure
from agents.report.operations import operations_section
from agents.report.parts import Html, duration, escape, join, paragraph, settings
from agents.report.sections import (
    curves_section,
    phase_key,
    phases_section,
    result_section,
    samples_section,
)

_LEAD_LENGTH = 300  # characters; a longer verdict is set smaller


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder.

    The page needs no network and no other file. A run that has not finished gets a report of what
    it has done so far.

    Args:
        run_folder: A folder with `config.json`, `metrics.jsonl` and, once finished, `summary.json`.

    Returns:
        Path of the page.

    Raises:
        ValueError: If the folder is not that of a run.
    """
    run = load_run(run_folder)
    figures: dict[str, Figure] = {}
    page = Template(
        importlib.resources.files("agents.report")
        .joinpath("template.html")
        .read_text(encoding="utf-8")
    ).substitute(
        title=escape(f"What the surgeon was worth \u00b7 {run.name}"),
        name=escape(run.name),
        verdict=_verdict(run),
        facts=escape(_facts(run)),
        about=escape(_about(run)),
        result=result_section(run),
        key=phase_key(run),
        curves=curves_section(run, figures),
        operations=operations_section(run, figures),
        samples=samples_section(run),
        phases=phases_section(run),
        repeat=_repeat(run),
        figures=_script_json(figures),
        plotly=_plotly(),
    )
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _script_json(value: object) -> str:
    """Write JSON that cannot end the script element that it stands in.

    Only `<` can begin what a parser of HTML reacts to inside a script, and in JSON it stands only
    inside strings, where it may be written as an escape.
    """
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _verdict(run: RunRecord) -> Html:
    effect = run.summary.get("surgeon_effect")
    if not run.finished:
        text = (
            "This run has not finished: it is still going on, or it was stopped. What the surgeon "
            "is worth is measured at the end; below is how far the run has come."
        )
        return paragraph(text, "verdict banner")
    if effect is None:
        text = "No surgeon took part in this run, so there is nothing to be judged."
        return paragraph(text, "verdict")
    text = str(effect["verdict"])
    return paragraph(text, "verdict" if len(text) <= _LEAD_LENGTH else "verdict long")


def _facts(run: RunRecord) -> str:
    facts = [f"{name} {run.fact(name)}" for name in ("corpus", "preset", "surgeon", "seed")]
    seconds = run.fact("seconds") or (run.rows[-1]["seconds"] if run.rows else 0.0)
    return " \u00b7 ".join([*facts, duration(seconds)])


def _about(run: RunRecord) -> str:
    grpo = run.config.get("grpo") or {}
    if grpo.get("estimator") == "ce":
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
    parts.append(settings("Settings", run.config))
    if environment := run.summary.get("environment"):
        parts.append(settings("Environment", environment))
    return join(parts)
