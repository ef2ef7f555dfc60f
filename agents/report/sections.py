"""Sections of the report: the curves and the phases."""

from __future__ import annotations

from collections.abc import Iterable

from agents.report.curves import CURVES, Curve
from agents.report.data import Row, RunRecord
from agents.report.figures import curve_figure
from agents.report.marks import (
    CONTROL,
    KEPT,
    LIMIT,
    N_PHASE_TINTS,
    PHASES,
    POINTS,
    REFERENCES,
    Figure,
    reference_levels,
)
from agents.report.parts import (
    DASH,
    Html,
    duration,
    escape,
    figure,
    join,
    paragraph,
    table,
    toggles,
)

_LAYERS = {
    PHASES: "phases",
    REFERENCES: "n-gram tables",
    CONTROL: "supervised control",
    POINTS: "single points",
    KEPT: "kept operations",
}
_OTHER_KINDS = ("grpo", "operation", "surgeon")


def phase_key(run: RunRecord) -> Html:
    """Write what the tints and marks in the curves stand for."""
    names = [span.name for span in run.phases()]
    if not names:
        return Html("")
    items = [
        f'<li><i style="background:var(--phase-{index % N_PHASE_TINTS})"></i>{escape(name)}</li>'
        for index, name in enumerate(names)
    ]
    if run.kept_commits():
        items.append('<li><span class="mark">\u25c6</span> an operation was kept (commit)</li>')
    return Html('<ul class="key" aria-label="Phases of the run">' + "".join(items) + "</ul>")


def curves_section(
    run: RunRecord, figures: dict[str, Figure], control: RunRecord | None = None
) -> Html:
    """Write the frames of all curves that the run has, and what can be shown and hidden in them.

    Args:
        run: The run.
        figures: The page's figures by key; the curves are added.
        control: A supervised run on the same text, to compare with.
    """
    frames = _frames(run, CURVES, figures, control)
    if not frames:
        return paragraph("Nothing has been measured yet.")
    drawn = {curve.metric for curve in CURVES}
    others = [
        Curve(key=f"{kind}-{name}", kind=kind, metric=name, title=name, noisy=True)
        for kind in _OTHER_KINDS
        for name in run.metrics(kind)
        if name not in drawn
    ]
    more = _frames(run, others, figures)
    used = {layer for drawn in figures.values() for layer in layers(drawn)}
    choices = [(key, name, "") for key, name in _LAYERS.items() if key in used]
    parts = [phase_key(run), toggles("Show in the curves", choices)]
    parts.append(Html(f'<div class="figures">{join(frames)}</div>'))
    if more:
        parts.append(
            Html(
                "<details><summary>All other metrics of the run, by their names in metrics.jsonl"
                f'</summary>\n<div class="figures">{join(more)}</div></details>'
            )
        )
    return join(parts)


def layers(drawn: Figure) -> set[str]:
    """Collect the names of what can be shown and hidden in a figure."""
    marks = [*drawn["layout"].get("shapes", []), *drawn["layout"].get("annotations", [])]
    names = [trace.get("meta") for trace in drawn["data"]] + [mark.get("name") for mark in marks]
    return {name for name in names if name is not None}


def _frames(
    run: RunRecord,
    curves: Iterable[Curve],
    figures: dict[str, Figure],
    control: RunRecord | None = None,
) -> list[Html]:
    """Draw the curves that the run has, and give a frame for each."""
    frames = []
    for curve in curves:
        drawn = curve_figure(run, curve, control)
        if drawn is None:
            continue
        figures[curve.key] = drawn
        values = run.series(curve.kind, curve.metric).y
        spoken = (
            f"{curve.title}: {curve.show(values[0])} at the start, {curve.show(values[-1])} at the "
            f"end, between {curve.show(min(values))} and {curve.show(max(values))}."
        )
        caption = f"{curve.caption} {_lines_note(run, curve)}".strip()
        if CONTROL in layers(drawn):
            caption += " The broken curve is the supervised control."
        frames.append(figure(curve.key, curve.title, caption, spoken))
    return frames


def _lines_note(run: RunRecord, curve: Curve) -> str:
    """Explain the horizontal lines that the curve's figure has."""
    levels = reference_levels(run, curve)
    note = curve.reference_note if run.fact("references") else ""
    if LIMIT in levels:
        note += (
            " The line called limit is the true entropy of the grammar that wrote the text, "
            "averaged over all of it: about what a model would score that knew the grammar."
        )
    return note.strip()


def phases_section(run: RunRecord) -> Html:
    """Write what each phase took and where it led."""
    phases = run.summary.get("phases")
    if phases is None:
        rows = [(span.name, f"{span.end - span.start:,}") for span in run.phases()]
        return table("Phases so far", ("Phase", "Forward tokens"), rows)
    curves = [
        curve
        for curve in CURVES
        if any(curve.metric in phase[side] for phase in phases for side in ("first", "last"))
    ]
    rows = [
        (
            phase["name"],
            phase["steps"],
            duration(phase["seconds"]),
            *(_change(curve, phase["first"], phase["last"]) for curve in curves),
        )
        for phase in phases
    ]
    titles = [curve.title for curve in curves]
    return table("First and last value in each phase", ("Phase", "Steps", "Time", *titles), rows)


def _change(curve: Curve, first: Row, last: Row) -> str:
    """Write how a metric went from the first to the last value in a phase."""
    values = [side.get(curve.metric) for side in (first, last)]
    shown = [DASH if value is None else curve.show(value) for value in values]
    return DASH if shown == [DASH, DASH] else " \u2192 ".join(shown)
