"""Sections of the report: the result, the curves, the samples and the phases."""

from __future__ import annotations

from collections.abc import Iterable

from agents.report.curves import CURVES, Curve
from agents.report.data import Row, RunRecord
from agents.report.figures import curve_figure
from agents.report.marks import LIMIT, N_PHASE_TINTS, Figure, reference_levels
from agents.report.parts import (
    DASH,
    Html,
    bars,
    duration,
    escape,
    figure,
    join,
    number,
    paragraph,
    percent,
    table,
    tile,
)

_SAMPLES_PER_PHASE = 2
_OTHER_KINDS = ("grpo", "operation", "surgeon")


def result_section(run: RunRecord) -> Html:
    """Write the headline numbers, beside those of the n-gram tables."""
    scores = _validation(run)
    if not scores:
        return paragraph("Nothing has been measured yet.")
    references = run.summary.get("references") or []
    where = "all of the held-out text" if run.finished else "a fixed slice of the held-out text"
    tiles = [
        tile(
            "Next-character accuracy",
            percent(scores.get("accuracy")),
            "",
            "Share of characters guessed right. Higher is better.",
        ),
        tile(
            "Loss",
            number(scores.get("loss")),
            "nats per character",
            "How surprised the model is by the text. Lower is better.",
        ),
        tile(
            "Compression",
            number(scores.get("bits_per_char")),
            "bits per character",
            "The same loss in bits. Lower is better.",
        ),
        tile(
            "Entropy",
            number(scores.get("entropy")),
            "nats per character",
            "How undecided the model is. Near zero it would repeat itself.",
        ),
    ]
    parts = [
        paragraph(f"Measured on {where}. {_standing(scores.get('accuracy'), references)}"),
        Html('<dl class="tiles">' + join(tiles) + "</dl>"),
    ]
    if references:
        parts.append(_reference_bars(run, scores, references))
    return join(parts)


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


def curves_section(run: RunRecord, figures: dict[str, Figure]) -> Html:
    """Write the frames of all curves that the run has.

    Args:
        run: The run.
        figures: The page's figures by key; the curves are added.
    """
    frames = _frames(run, CURVES, figures)
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
    parts = [Html(f'<div class="figures">{join(frames)}</div>')]
    if more:
        parts.append(
            Html(
                "<details><summary>All other metrics of the run, by their names in metrics.jsonl"
                f'</summary>\n<div class="figures">{join(more)}</div></details>'
            )
        )
    return join(parts)


def _frames(run: RunRecord, curves: Iterable[Curve], figures: dict[str, Figure]) -> list[Html]:
    """Draw the curves that the run has, and give a frame for each."""
    frames = []
    for curve in curves:
        drawn = curve_figure(run, curve)
        if drawn is None:
            continue
        figures[curve.key] = drawn
        values = run.series(curve.kind, curve.metric).y
        spoken = (
            f"{curve.title}: {curve.show(values[0])} at the start, {curve.show(values[-1])} at the "
            f"end, between {curve.show(min(values))} and {curve.show(max(values))}."
        )
        caption = f"{curve.caption} {_lines_note(run, curve)}".strip()
        frames.append(figure(curve.key, curve.title, caption, spoken))
    return frames


def _lines_note(run: RunRecord, curve: Curve) -> str:
    """Explain the horizontal lines that the curve's figure has."""
    levels = reference_levels(run, curve)
    note = curve.reference_note if run.summary.get("references") else ""
    if LIMIT in levels:
        note += (
            " The line called limit is the true entropy of the grammar that wrote the text, "
            "averaged over all of it: about what a model would score that knew the grammar."
        )
    return note.strip()


def samples_section(run: RunRecord) -> Html:
    """Write texts of every phase, operated ones beside unoperated ones."""
    rows = run.of_kind("sample")
    if not rows:
        return paragraph("No text has been sampled yet.")
    parts = [paragraph("The prompt is in bold; all that follows it was written by the model.")]
    for name in dict.fromkeys(row["phase"] for row in rows):
        mine = [row for row in rows if row["phase"] == name]
        # The last ones show where the phase led to; the first one of all, where it began.
        chosen = mine[-_SAMPLES_PER_PHASE:]
        if mine[0] is rows[0] and mine[0] not in chosen:
            chosen = [mine[0], *chosen]
        parts.append(Html(f"<h3>{escape(name)}</h3>"))
        parts += [_sample(row) for row in chosen]
    return join(parts)


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


def _validation(run: RunRecord) -> Row:
    """Give the final scores, or the latest ones of a run that has not finished."""
    if run.finished:
        return dict(run.summary["validation"])
    latest = (run.of_kind("evaluation") or [{}])[-1]
    return {
        name.removeprefix("validation/"): value
        for name, value in latest.items()
        if name.startswith("validation/")
    }


def _standing(accuracy: float | None, references: list[Row]) -> str:
    """Say in words between which n-gram tables the model stands."""
    if accuracy is None or not references:
        return ""
    ranked = sorted(references, key=lambda row: float(row["accuracy"]))
    below = [row for row in ranked if row["accuracy"] < accuracy]
    above = [row for row in ranked if row["accuracy"] >= accuracy]
    named = [
        f"the {row['name']} table ({percent(row['accuracy'])})" for row in below[-1:] + above[:1]
    ]
    if below and above:
        return f"The model guesses better than {named[0]} and not better than {named[1]}."
    return f"The model guesses {'better' if below else 'no better'} than {named[0]}."


def _reference_bars(run: RunRecord, scores: Row, references: list[Row]) -> Html:
    own = "this model"
    accuracies = [(row["name"], row["accuracy"]) for row in references]
    accuracies.append((own, scores["accuracy"]))
    losses = [(row["name"], row["loss"]) for row in references]
    losses.append((own, scores["loss"]))
    floor = run.fact("corpus_nats_per_char")
    if floor is not None:
        losses.append(("true entropy of the text", floor))
    return Html(
        '<div class="figures">'
        + bars(
            "Accuracy (longer is better)",
            [(name, value or 0.0, percent(value)) for name, value in accuracies],
            own,
        )
        + bars(
            "Loss, nats per character (shorter is better)",
            [(name, value or 0.0, number(value)) for name, value in losses],
            own,
        )
        + "</div>"
    )


def _sample(row: Row) -> Html:
    where = f"after {row['update']} updates and {row['operation']} operations"
    texts = [("without an operation", row["text"])]
    if row.get("operated_text") is not None:
        texts.append(("with the surgeon's operation", row["operated_text"]))
    sides = [
        f"<div>{f'<h4>{title}</h4>' if len(texts) > 1 else ''}"
        f'<div class="text"><strong>{escape(row["prompt"])}</strong>{escape(text)}</div></div>'
        for title, text in texts
    ]
    return Html(
        f'<div class="sample"><p class="note">{escape(where)}</p>'
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def _change(curve: Curve, first: Row, last: Row) -> str:
    """Write how a metric went from the first to the last value in a phase."""
    values = [side.get(curve.metric) for side in (first, last)]
    shown = [DASH if value is None else curve.show(value) for value in values]
    return DASH if shown == [DASH, DASH] else " \u2192 ".join(shown)
