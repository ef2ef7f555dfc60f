"""Sections of the page that lays several runs on one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agents.report.curves import CURVES
from agents.report.data import Row
from agents.report.figures import effect_figure
from agents.report.marks import REFERENCES, Figure
from agents.report.operations import EFFECTS
from agents.report.overlay import Entry, overlay_figure
from agents.report.parts import (
    DASH,
    Html,
    duration,
    escape,
    figure,
    flat,
    interval,
    join,
    number,
    paragraph,
    percent,
    table,
    toggles,
)

_ENVIRONMENT = "environment."
_NOT_SETTINGS = ("out", "corpus_sha256")  # differ between any two runs, or say the same again


def numbers_section(entries: Sequence[Entry], links: Mapping[str, str]) -> Html:
    """Write the headline table, with the n-gram tables below if they hold for all runs.

    Args:
        entries: The runs.
        links: Addresses of their reports, by label, where there is one.
    """
    head = (
        "Run",
        "Corpus",
        "Estimator",
        "Surgeon",
        "Loss",
        "Accuracy",
        "Entropy",
        *(f"Surgeon: {title.lower()}" for _, title, *_ in EFFECTS),
        "Time",
    )
    rows = [_numbers(entry, links.get(entry.label)) for entry in entries]
    rows += [
        (
            reference["name"],
            entries[0].run.fact("corpus"),
            "n-gram table",
            DASH,
            *_scores(reference),
            *(DASH for _ in EFFECTS),
            DASH,
        )
        for reference in _common_references(entries)
    ]
    words = (
        "Loss and entropy in nats per character, of held-out text. What the surgeon was worth is "
        "of the last measurement, in nats per character with its 95 % interval; above zero is "
        "better."
    )
    return join([table("Headline numbers", head, rows), paragraph(words, "note")])


def verdicts_section(entries: Sequence[Entry]) -> Html:
    """Write what each run found out about its surgeon, in words."""
    parts = []
    for entry in entries:
        effect = entry.run.summary.get("surgeon_effect")
        if not entry.run.finished:
            words = "Not finished, so that nothing has been judged."
        elif not effect:
            words = "No surgeon took part."
        else:
            words = str(effect.get("verdict", DASH))
        parts.append(Html(f"<dt>{_name(entry)}</dt><dd>{escape(words)}</dd>"))
    return Html(f'<dl class="words">{join(parts)}</dl>')


def curves_section(entries: Sequence[Entry], figures: dict[str, Figure]) -> Html:
    """Write the frames of the curves that any run has, under the legend that toggles them.

    Args:
        entries: The runs.
        figures: The page's figures by key; the curves are added.
    """
    frames = []
    for curve in CURVES:
        drawn = overlay_figure(entries, curve)
        if drawn is None:
            continue
        figures[curve.key] = drawn
        spoken = f"{curve.title}: " + "; ".join(
            f"{entry.label} {curve.show(values[-1])} at the end"
            for entry in entries
            if (values := entry.run.series(curve.kind, curve.metric).y)
        )
        caption = curve.overlay_caption or curve.caption
        frames.append(figure(curve.key, curve.title, caption, spoken))
    if not frames:
        return paragraph("Nothing has been measured yet.")
    choices = [(entry.layer, _words(entry), entry.colour) for entry in entries]
    if any(drawn["layout"].get("shapes") for drawn in figures.values()):
        choices.append((REFERENCES, "n-gram tables", ""))
    return join(
        [toggles("Runs in the curves", choices), Html(f'<div class="figures">{join(frames)}</div>')]
    )


def effects_section(entries: Sequence[Entry], figures: dict[str, Figure]) -> Html:
    """Write the figures of what the surgeons were worth at the end, beside chance and nothing.

    Args:
        entries: The runs.
        figures: The page's figures by key; those of this section are added.
    """
    judged = [(entry.label, row) for entry in entries if (row := _last_measurement(entry))]
    if not judged:
        return paragraph("No surgeon has been judged.")
    labels = [label if len(label) <= 22 else f"\u2026{label[-21:]}" for label, _ in judged]
    frames = []
    for quantity, title, unit, caption in EFFECTS:
        key = f"effect-{quantity}"
        figures[key] = effect_figure([row for _, row in judged], quantity, unit, labels)
        spoken = "; ".join(
            f"{label}: {interval(row[quantity]['surgeon'])}" for label, row in judged
        )
        frames.append(figure(key, title, f"{caption} The bars are 95 % intervals.", spoken))
    return Html(f'<div class="figures">{join(frames)}</div>')


def differences_section(entries: Sequence[Entry]) -> Html:
    """Write the settings and the versions in which the runs differ."""
    columns = [
        {
            **{name: value for name, value in flat(entry.run.config) if name not in _NOT_SETTINGS},
            **dict(flat(entry.run.summary.get("environment") or {}, _ENVIRONMENT)),
        }
        for entry in entries
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        # What a run used is written down when it ends: that it is missing is no difference.
        known = [c for c in columns if name in c or not name.startswith(_ENVIRONMENT)]
        if len({str(column.get(name, DASH)) for column in known}) > 1:
            rows.append((name, *(column.get(name, DASH) for column in columns)))
    if not rows:
        return paragraph("They have the same settings.")
    return table("Settings and environment", ("Setting", *map(_name, entries)), rows)


def _numbers(entry: Entry, link: str | None) -> tuple[object, ...]:
    run = entry.run
    exploration = (run.config.get("grpo") or {}).get("exploration")
    measurement = _last_measurement(entry)
    return (
        _name(entry, link),
        run.fact("corpus"),
        ", ".join(str(word) for word in (run.estimator, exploration) if word) or DASH,
        run.fact("surgeon"),
        *_scores(run.scores()),
        *(_gain(measurement[key]["surgeon"]) if measurement else DASH for key, *_ in EFFECTS),
        duration(run.seconds),
    )


def _gain(gain: Mapping[str, float | None]) -> Html:
    """Write a mean with its interval below it, so that the table stays narrow."""
    mean, _, bounds = interval(gain).partition(" ")
    return Html(f'{escape(mean)} <span class="note">{escape(bounds)}</span>')


def _scores(scores: Row) -> tuple[str, ...]:
    return (
        number(scores.get("loss")),
        percent(scores.get("accuracy")),
        number(scores.get("entropy")),
    )


def _last_measurement(entry: Entry) -> dict[str, Any]:
    measurements = (entry.run.summary.get("surgeon_effect") or {}).get("measurements") or [{}]
    return dict(measurements[-1])


def _common_references(entries: Sequence[Entry]) -> list[Row]:
    if len({entry.run.fact("corpus_sha256") for entry in entries}) != 1:
        return []
    return next((list(e.run.fact("references")) for e in entries if _has_references(e)), [])


def _has_references(entry: Entry) -> bool:
    return bool(entry.run.fact("references"))


def _name(entry: Entry, link: str | None = None) -> Html:
    """Write a run's name with its colour, and what is special about the run."""
    tags = "".join(f' <span class="tag">{escape(tag)}</span>' for tag in _tags(entry))
    name = escape(entry.label)
    if link is not None:
        name = Html(f'<a href="{escape(link)}">{name}</a>')
    return Html(f'<i class="swatch" style="background:{entry.colour}"></i>{name}{tags}')


def _words(entry: Entry) -> str:
    tags = _tags(entry)
    return f"{entry.label} ({', '.join(tags)})" if tags else entry.label


def _tags(entry: Entry) -> list[str]:
    tags = ["supervised control"] if entry.run.is_control else []
    return tags if entry.run.finished else [*tags, "unfinished"]
