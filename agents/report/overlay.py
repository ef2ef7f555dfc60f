"""Figures of several runs, one upon the other."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from agents.report.curves import Curve
from agents.report.data import RunRecord
from agents.report.figures import curve_layout, hover_text, value_range
from agents.report.marks import Figure, level_labels, level_shapes, reference_levels
from agents.report.traces import line, means, part, thin

N_COLOURS = 8
_DASHES = ("solid", "dot", "dashdot", "longdash")
_CONTROL_DASH = "dash"


class Entry(NamedTuple):
    """A run of a comparison.

    Attributes:
        run: The run.
        label: What it is called in the page; no two have the same.
        layer: What its lines belong to, to be shown and hidden together.
        colour: Its colour.
        dash: Plotly's name of the dash of its lines.
    """

    run: RunRecord
    label: str
    layer: str
    colour: str
    dash: str


def make_entries(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Entry]:
    """Give each run its colour; controls are dashed, and so are colours that come again."""
    return [
        Entry(
            run,
            label,
            f"run-{index}",
            f"var(--run-{index % N_COLOURS})",
            _CONTROL_DASH if run.is_control else _DASHES[index // N_COLOURS % len(_DASHES)],
        )
        for index, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]


def overlay_figure(entries: Sequence[Entry], curve: Curve) -> Figure | None:
    """Draw one metric of all runs against compute; noisy ones as their running mean.

    The n-gram tables are drawn where all runs read the same text.

    Returns:
        The figure, or None where no run has the metric.
    """
    drawn = [entry for entry in entries if entry.run.series(curve.kind, curve.metric).y]
    if not drawn:
        return None
    levels = common_levels([entry.run for entry in entries], curve)
    ranges = []
    data = []
    for entry in drawn:
        series = entry.run.series(curve.kind, curve.metric)
        shown = thin(means(series) if curve.noisy else series)
        # Only the mean is drawn of what is noisy, so that nothing else has to fit in.
        sight = replace(curve, key="mean") if curve.noisy else curve
        ranges.append(value_range(entry.run, sight, shown, list(levels.values())))
        phases = dict.fromkeys(shown.phase) if curve.noisy else [None]
        hover = f"{html.escape(entry.label)}: {hover_text(curve, '')}"
        for phase in phases:
            piece = shown if phase is None else part(shown, phase)
            data.append(line(piece, entry.colour, hover, layer=entry.layer, dash=entry.dash))
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    end = max(row["forward_tokens"] for entry in drawn for row in entry.run.rows)
    layout = curve_layout(curve, end, low, high)
    layout |= {"hovermode": "x unified", "hoverdistance": -1}
    layout["shapes"] = level_shapes(levels)
    layout["annotations"] = level_labels(levels, low, high)
    return {"data": data, "layout": layout}


def common_levels(runs: Sequence[RunRecord], curve: Curve) -> dict[str, float]:
    """Name the horizontal lines that hold for all runs; none where they read different texts."""
    if len({run.fact("corpus_sha256") for run in runs}) != 1:
        return {}
    return next((levels for run in runs if (levels := reference_levels(run, curve))), {})
