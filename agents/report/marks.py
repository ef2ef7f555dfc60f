"""What stands behind the curves: phases, reference lines and kept operations."""

from __future__ import annotations

import html
from typing import Any

from agents.report.curves import Curve
from agents.report.data import Row, RunRecord

Figure = dict[str, Any]

N_PHASE_TINTS = 3
LIMIT = "limit"  # name of the line at the true entropy of the text
HEIGHT = 300  # pixels, of a plot in the page
MARGIN = {"l": 56, "r": 62, "t": 26, "b": 44}

# Layers, which the reader may hide: how they are called in the figures and in the page.
PHASES, REFERENCES, POINTS, KEPT, CONTROL = "phases", "references", "points", "kept", "control"

_LABEL_GAP = 13  # pixels between the centres of two labels


def phase_shapes(run: RunRecord) -> list[Figure]:
    """Tint the stretches of the phases."""
    return [
        {
            "name": PHASES,
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": span.start,
            "x1": span.end,
            "y0": 0,
            "y1": 1,
            "fillcolor": f"var(--phase-{index % N_PHASE_TINTS})",
            "line": {"width": 0},
            "layer": "below",
        }
        for index, span in enumerate(run.phases())
    ]


def phase_labels(run: RunRecord) -> list[Figure]:
    """Write the names of the phases above them, where there is room."""
    spans = run.phases()
    total = spans[-1].end or 1
    return [
        {
            "name": PHASES,
            "text": html.escape(span.name),
            "xref": "x",
            "yref": "paper",
            "x": (span.start + span.end) / 2,
            "y": 1,
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": "var(--muted)"},
        }
        for span in spans
        if (span.end - span.start) / total > 0.15  # in less than this a name does not fit
    ]


def reference_levels(run: RunRecord, curve: Curve) -> dict[str, float]:
    """Name the horizontal lines of a figure: n-gram tables, and the entropy of the text."""
    if curve.reference is None:
        return {}
    references = run.fact("references") or []
    levels = {row["name"]: row[curve.reference] for row in references}
    floor = run.fact("corpus_nats_per_char")
    if curve.key == "loss" and floor is not None:
        levels[LIMIT] = floor
    return {name: float(level) for name, level in levels.items() if level is not None}


def level_shapes(levels: dict[str, float]) -> list[Figure]:
    """Draw the horizontal lines of the references."""
    return [
        {
            "name": REFERENCES,
            "type": "line",
            "xref": "paper",
            "yref": "y",
            "x0": 0,
            "x1": 1,
            "y0": level,
            "y1": level,
            "line": {
                "color": "var(--good)" if name == LIMIT else "var(--muted)",
                "width": 1.2,
                "dash": "dash",
            },
        }
        for name, level in levels.items()
    ]


def level_labels(levels: dict[str, float], low: float, high: float) -> list[Figure]:
    """Write the names beside the lines, moved apart where they would touch.

    Args:
        levels: Names and heights.
        low: Value at the lower edge of the plot.
        high: Value at its upper edge.
    """
    scale = (HEIGHT - MARGIN["t"] - MARGIN["b"]) / (high - low)
    names = sorted(levels, key=levels.__getitem__)
    wanted = [levels[name] * scale for name in names]
    return [
        {
            "name": REFERENCES,
            "text": html.escape(name),
            "xref": "paper",
            "yref": "y",
            "x": 1,
            "y": levels[name],
            "xanchor": "left",
            "xshift": 4,
            "yshift": round(place - want, 1),
            "showarrow": False,
            "font": {"size": 11, "color": "var(--good)" if name == LIMIT else "var(--muted)"},
        }
        for name, want, place in zip(names, wanted, spread(wanted, _LABEL_GAP), strict=True)
    ]


def commit_shapes(commits: list[Row]) -> list[Figure]:
    """Draw a vertical line through each kept operation."""
    return [
        {
            "name": KEPT,
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": row["forward_tokens"],
            "x1": row["forward_tokens"],
            "y0": 0,
            "y1": 1,
            "line": {"color": "var(--surgeon)", "width": 1, "dash": "dot"},
        }
        for row in commits
    ]


def spread(wanted: list[float], gap: float) -> list[float]:
    """Move points on a line apart until neighbours are a gap apart, moving them little.

    Points that touch are gathered into groups; a group stands around the mean of what its members
    wanted.

    Args:
        wanted: Where the points would like to stand, in rising order.
        gap: Least distance of two neighbours.

    Returns:
        Where they stand, in the same order.
    """
    groups: list[list[float]] = []
    for point in wanted:
        groups.append([point])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + index * gap for group in groups for index in range(len(group))]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
