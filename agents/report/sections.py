"""The sections of a page, in order. To add one, write a function and append a row to `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.report.data import Run, references, same_text
from agents.report.figures import CURVES, NATS, Curve, Figure, curve_frames, other_curves
from agents.report.html import (
    DASH,
    Html,
    bars,
    duration,
    escape,
    flat,
    fold,
    grid,
    interval,
    join,
    mark_changes,
    number,
    paragraph,
    part,
    percent,
    run_colour,
    run_name,
    run_table,
    signed,
    table,
    tiles,
    toggles,
)
from agents.report.operations import measured, operations_section
from agents.tracking.schema import Row

SCORES = (
    ("Accuracy", "accuracy", "", percent),
    ("Loss", "loss", NATS, number),
    ("Compression", "bits_per_char", "bits per character", number),
    ("Entropy", "entropy", NATS, number),
    ("Calibration error", "calibration_error", "", percent),  # older runs lack it
)
_ENVIRONMENT = "environment."
_NOT_SETTINGS = {"out", "corpus_sha256"}  # the folder, and a checksum of `corpus`


class Section(NamedTuple):
    """A section of the page."""

    key: str
    """Id, unique on the page."""
    title: str
    build: Callable[[Sequence[Run], dict[str, Figure]], Html]
    """Takes the runs (at least one) and the page's figures by key, to which it adds its own. The
    section is left out if the result is empty."""


def result_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Show the scores on held-out text beside those of the n-gram references."""
    scored = [run for run in runs if run.scores]
    if not scored:
        return paragraph("Nothing has been measured yet.")
    parts = [_scores(runs) if len(runs) > 1 else _tiles(runs[0].scores)]
    if not all(run.finished for run in scored):
        text = "Scores of unfinished runs are measured on a fixed slice of the held-out text."
        parts.append(paragraph(text, "note"))
    if same_text(runs):
        accuracy = _bars("Accuracy (longer is better)", "accuracy", percent, scored)
        parts.append(
            grid([accuracy, _bars(f"Loss, {NATS} (shorter is better)", "loss", number, scored)])
        )
    return join(parts)


def _tiles(scores: Row) -> Html:
    return tiles(
        (name, show(scores[key]), unit) for name, key, unit, show in SCORES if key in scores
    )


def _scores(runs: Sequence[Run]) -> Html:
    main, more = SCORES[:2], [row for row in SCORES[2:] if any(row[1] in r.scores for r in runs)]
    effects = measured(runs)

    def rows_of(run: Run) -> Iterable[tuple[object, ...]]:
        last = run.measurements[-1] if run.measurements else {}
        words = (run.grpo.get("estimator"), run.grpo.get("exploration"))
        yield (
            ", ".join(str(word) for word in words if word) or DASH,
            *(run.fact(name) for name in ("surgeon", "seed")),
            *(show(run.scores.get(key)) for _, key, _, show in main),
            *(interval((last.get(effect.key) or {}).get("surgeon")) for effect in effects),
            *(show(run.scores.get(key)) for _, key, _, show in more),
            run.fact("corpus"),
            duration(run.seconds),
        )

    head = ["Estimator", "Surgeon", "Seed", *(name for name, *_ in main)]
    head += [f"Surgeon: {effect.title.lower()}" for effect in effects]
    head += [*(name for name, *_ in more), "Corpus", "Time"]
    note = (
        "Scores are those on held-out text, loss and entropy in nats per character. The surgeon's "
        "effect is that of the last measurement, with its 95 % interval; above zero is better."
    )
    return join([run_table("Scores", head, runs, rows_of), paragraph(note, "note")])


def _bars(caption: str, key: str, show: Callable[[float | None], str], runs: Sequence[Run]) -> Html:
    rows = [(row["name"], row.get(key), False) for row in references(runs)]
    rows += [(run.name, run.scores.get(key), True) for run in runs]
    limit = runs[0].fact("corpus_nats_per_char")
    if key == "loss" and limit is not None:
        rows.append(("true entropy of the text", limit, False))
    return bars(caption, [(name, value, show(value), own) for name, value, own in rows])


def contrasts_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Compare settings by pairs of runs with the same seed."""
    scored = [run for run in runs if run.finished and run.scores]
    if not same_text(scored):
        return Html("")
    names = sorted(_differing([_settings(run) for run in scored]) - {"seed"})
    arms: dict[str, dict[Any, Run]] = {}
    for run in scored:
        values = _settings(run)
        words = ", ".join(f"{name} {values.get(name, DASH)}" for name in names)
        arms.setdefault(words, {}).setdefault(run.fact("seed"), run)
    (base, controls), *others = arms.items()
    rows = []
    for arm, mine in others:
        pairs = [(controls[seed], run) for seed, run in mine.items() if seed in controls]
        if pairs:
            rows.append((arm, len(pairs), _paired(pairs, "loss"), _paired(pairs, "accuracy")))
    if not rows:
        return Html("")
    note = (
        f"Compared with {base}. Differences are between runs of equal seed, with 95 % intervals "
        "(Student's t) over seeds. Lower loss and higher accuracy are better."
    )
    head = ("Settings", "Pairs", "Difference in loss", "Difference in accuracy")
    return join([table("Paired differences", head, rows), paragraph(note, "note")])


def _paired(pairs: Sequence[tuple[Run, Run]], metric: str) -> str:
    from agents.evaluation.statistics import interval as student_interval

    values = [(before.scores.get(metric), after.scores.get(metric)) for before, after in pairs]
    differences = [b - a for a, b in values if a is not None and b is not None]
    if len(differences) < 2:
        return "".join(f"{signed(x)} (one pair: no interval)" for x in differences) or DASH
    return interval(student_interval(np.array(differences))._asdict())


def curves_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Plot the metrics against compute, with boxes that show and hide layers."""
    frames = curve_frames(runs, CURVES, figures)
    if not frames:
        return paragraph("Nothing has been measured yet.")
    more = curve_frames(runs, other_curves(runs), figures)
    warning = "The curves need JavaScript, which is switched off. The tables do not."
    parts = [Html(f"<noscript>{paragraph(warning, 'banner')}</noscript>")]
    if len(runs) == 1:
        parts.append(_phase_key(runs[0]))
    parts += [toggles("Show", [*_layers(runs, figures)]), grid(frames)]
    if more:
        parts.append(fold("All other metrics, by their names in metrics.jsonl", grid(more)))
    return join(parts)


def _phase_key(run: Run) -> Html:
    items = [
        f'<li><i style="background:var(--phase-{index % 3})"></i>{escape(phase["name"])}</li>'
        for index, phase in enumerate(run.phases)
    ]
    if any(row.get("commit/kept") for row in run.of_kind("commit")):
        items.append('<li><span class="mark">\u25c6</span> commit: an operation was kept</li>')
    return Html(f'<ul class="key" aria-label="Phases of the run">{"".join(items)}</ul>')


def _layers(runs: Sequence[Run], figures: Mapping[str, Figure]) -> Iterable[tuple[str, str, str]]:
    """Yield key, name and colour of each layer; draw.js uses the same keys."""
    for run in runs if len(runs) > 1 else ():
        words = " ".join([run.name, *(f"({tag})" for tag in run.tags)])
        yield f"run-{run.index}", words, run_colour(run)
    present = {field for drawn in figures.values() for field, value in drawn.items() if value}
    names = {"phases": "phases", "levels": "n-gram references", "points": "single values"}
    for field, name in {**names, "commits": "commits"}.items():
        if field in present:
            yield field, name, ""


def samples_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Show texts of every phase; for several runs, the last text of each."""
    rows = [row for run in runs for row in run.of_kind("sample")]
    if not rows:
        return paragraph("No text has been sampled yet.")
    parts = [paragraph("The prompt is bold; the model wrote what follows it.")]
    if any(row.get("operated_text") is not None for row in rows):
        parts.append(
            Html(
                "<p>Texts side by side have the same prompt and the same sampling noise. Words are "
                "marked that occur only in the text <del>without the operation</del> or only in "
                "the text <ins>with it</ins>.</p>"
            )
        )
    for title, chosen in _chosen_samples(runs):
        parts += [Html(f"<h3>{title}</h3>"), *map(_sample, chosen)]
    return join(parts)


def _chosen_samples(runs: Sequence[Run]) -> Iterable[tuple[Html, list[Row]]]:
    if len(runs) > 1:
        yield from ((run_name(run), run.of_kind("sample")[-1:]) for run in runs)
        return
    rows = runs[0].of_kind("sample")
    for phase in dict.fromkeys(row["phase"] for row in rows):
        mine = [row for row in rows if row["phase"] == phase]
        first = mine[:1] if mine[0] is rows[0] and len(mine) > 2 else []  # the untrained model
        yield escape(phase), first + mine[-2:]


def _sample(row: Row) -> Html:
    where = f"after {row.get('update')} updates and {row.get('operation')} operations"
    text, operated = str(row.get("text", "")), row.get("operated_text")
    sides = [("", escape(text))]
    if operated is not None:
        before, after, changed = mark_changes(text, str(operated))
        sides = [("<h4>without an operation</h4>", before), ("<h4>with the operation</h4>", after)]
        where += f"; {100 * changed:.0f} % of the words differ"
    prompt = escape(row.get("prompt", ""))
    columns = "".join(
        f'<div>{title}<div class="text"><strong>{prompt}</strong>{written}</div></div>'
        for title, written in sides
    )
    return Html(
        f'<div class="sample"><p class="note">{escape(where)}</p>'
        f'<div class="sides">{columns}</div></div>'
    )


def phases_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Show the cost of each phase, and the change of the evaluations in it."""
    curves = [curve for curve in CURVES if curve.kind == "evaluation"]  # others are too noisy

    def rows_of(run: Run) -> Iterable[tuple[object, ...]]:
        finished = {phase["name"]: phase for phase in run.summary.get("phases") or []}
        for span in run.phases:
            phase = finished.get(span["name"], {})
            yield (
                span["name"],
                f"{span['end'] - span['start']:,}",
                phase.get("steps", DASH),
                duration(phase["seconds"]) if "seconds" in phase else DASH,
                *(_change(run, curve, span["name"]) for curve in curves),
            )

    head = ("Phase", "Forward tokens", "Steps", "Time", *(curve.title for curve in curves))
    return run_table("First and last evaluation of each phase", head, runs, rows_of)


def _change(run: Run, curve: Curve, phase: str) -> str:
    series = run.series(curve.kind, curve.metric)
    values = [y for y, name in zip(series.y, series.phase, strict=True) if name == phase]
    return f"{curve.show(values[0])} \u2192 {curve.show(values[-1])}" if values else DASH


def differences_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """List the settings and versions in which several runs differ."""
    if len(runs) == 1:
        return Html("")
    columns = [
        _settings(run) | dict(flat(run.summary.get("environment") or {}, _ENVIRONMENT))
        for run in runs
    ]
    differing = _differing(columns)
    if not differing:
        return paragraph("All runs have the same settings.")
    names = [name for name in dict.fromkeys(n for c in columns for n in c) if name in differing]
    rows = [(name, *(column.get(name, DASH) for column in columns)) for name in names]
    return table("Settings and environment", ("Setting", *map(run_name, runs)), rows)


def _settings(run: Run) -> dict[str, object]:
    return {name: value for name, value in flat(run.config) if name not in _NOT_SETTINGS}


def _differing(columns: Sequence[Mapping[str, object]]) -> set[str]:
    """Return the names whose values differ.

    A run records its environment when it ends, so a missing entry there is not a difference.
    """
    values: dict[str, set[str]] = {}
    for name in {name for column in columns for name in column}:
        known = [c for c in columns if name in c or not name.startswith(_ENVIRONMENT)]
        values[name] = {str(column.get(name, DASH)) for column in known}
    return {name for name, found in values.items() if len(found) > 1}


def glossary_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Explain the terms of the page."""
    return Html(part("glossary.html"))


def settings_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Show all settings, and the command of each run."""
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(Html(f"<h3>{run_name(run)}</h3>"))
        if command := run.fact("command"):
            parts.append(Html(f"<pre><code>{escape(command)}</code></pre>"))
        if checksum := run.fact("corpus_sha256"):
            parts.append(Html(f"<p>SHA-256 of the text: <code>{escape(checksum)}</code></p>"))
        for title, values in (("Settings", run.config), ("Environment", run.fact("environment"))):
            if values:
                rows = flat(values)
                parts.append(fold(title, table(f"{title} of {run.name}", ("Name", "Value"), rows)))
    return join(parts)


SECTIONS = [
    Section("result", "Result", result_section),
    Section("contrasts", "Paired comparison", contrasts_section),
    Section("curves", "Curves", curves_section),
    Section("operations", "Operations", operations_section),
    Section("samples", "Samples", samples_section),
    Section("phases", "Phases", phases_section),
    Section("differences", "Settings that differ", differences_section),
    Section("glossary", "Glossary", glossary_section),
    Section("settings", "Settings", settings_section),
]
"""The sections in the order of the page; append your own."""
