"""The report's figures as plain Plotly dictionaries.

Colours are the names of CSS variables, `var(--model)`: the page looks them up when it draws, so
that a figure follows the reader's light or dark theme.
"""

from __future__ import annotations

import html

from agents.report.curves import Curve
from agents.report.data import Row, RunRecord, Series, flatlines
from agents.report.marks import (
    CONTROL,
    HEIGHT,
    KEPT,
    MARGIN,
    POINTS,
    Figure,
    commit_shapes,
    level_labels,
    level_shapes,
    phase_labels,
    phase_shapes,
    reference_levels,
)
from agents.report.traces import line, markers, means, part, thin

WHO = ("surgeon", "random", "zero")

_LOSS_HEADROOM = 0.9  # nats above the bigram table, which every model soon leaves behind


def curve_figure(run: RunRecord, curve: Curve, control: RunRecord | None = None) -> Figure | None:
    """Draw one metric against compute, with phases, n-gram lines and kept operations.

    Args:
        run: The run.
        curve: What to draw of it.
        control: A supervised run to draw beside it, where the metric is one of held-out text.

    Returns:
        The figure, or None where the run has no such metric.
    """
    series = run.series(curve.kind, curve.metric)
    if not series.y:
        return None
    levels = reference_levels(run, curve)
    data = _curve_traces(curve, series)
    aims = list(levels.values())
    if control is not None and curve.kind == "evaluation":
        beside = control.series(curve.kind, curve.metric)
        data += _control_traces(curve, beside)
        aims += beside.y[-1:]
    low, high = value_range(run, curve, series, aims)
    if curve.key == "return":
        data += _flatline_traces(run, low + 0.03 * (high - low))
    commits = run.kept_commits()
    if commits and curve.kind == "evaluation":
        data.append(_commit_trace(commits, series))
    end = max(row["forward_tokens"] for row in run.rows)
    layout = curve_layout(curve, end, low, high)
    layout["shapes"] = phase_shapes(run) + level_shapes(levels) + commit_shapes(commits)
    layout["annotations"] = phase_labels(run) + level_labels(levels, low, high)
    return {"data": data, "layout": layout}


def curve_layout(curve: Curve, end: float, low: float, high: float) -> Figure:
    """Lay out the axes of a curve.

    Args:
        curve: What is drawn.
        end: Compute at the right edge, in forward tokens.
        low: Value at the lower edge.
        high: Value at the upper edge.
    """
    return {
        "height": HEIGHT,
        "margin": MARGIN,
        "showlegend": False,
        # Along a line one need not hit it; among many points one has to.
        **({} if curve.noisy else {"hovermode": "x", "hoverdistance": -1}),
        "xaxis": {
            "title": {"text": "compute, in forward tokens"},
            "hoverformat": ".3~s",
            "range": [0, end or 1],
            "exponentformat": "SI",
        },
        "yaxis": {
            "title": {"text": html.escape(curve.unit)},
            "range": [low, high],
            "tickformat": ".0%" if curve.percent else "",
        },
    }


def effect_figure(
    measurements: list[Row], quantity: str, unit: str, labels: list[str] | None = None
) -> Figure:
    """Draw what the surgeon, random and zero operations gained, with their intervals.

    Args:
        measurements: The measurements of the summary, in order.
        quantity: Which gain to draw, `kl_ref_gain` or `heldout_loss_fall`.
        unit: Its unit, in words.
        labels: What to call the measurements; default by the phases that they follow.
    """
    data: list[Figure] = []
    for place, who in enumerate(WHO):
        gains = [measurement[quantity][who] for measurement in measurements]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": who,
                "x": [gain["mean"] for gain in gains],
                # The first measurement on top, and within it the surgeon first.
                "y": [0.25 * (1 - place) - index for index in range(len(gains))],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_distance(gain["mean"], gain["high"]) for gain in gains],
                    "arrayminus": [_distance(gain["low"], gain["mean"]) for gain in gains],
                    "color": f"var(--{who})",
                    "thickness": 2,
                    "width": 5,
                },
                "marker": {"color": f"var(--{who})", "size": 9},
                "hovertemplate": f"{who}: %{{x:.4f}}<extra></extra>",
            }
        )
    names = labels or [f"after {measurement['after']}" for measurement in measurements]
    longest = max(map(len, names), default=0)
    layout = {
        "height": 110 + 90 * len(names),
        "margin": {"l": min(max(90, 24 + 7 * longest), 190), "r": 16, "t": 34, "b": 44},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xref": "container",
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 11},
        },
        "xaxis": {"title": {"text": unit}, "zeroline": True, "zerolinewidth": 2},
        "yaxis": {
            "tickvals": [-index for index in range(len(names))],
            "ticktext": [html.escape(name) for name in names],
            "range": [0.6 - len(names), 0.6],
            "showgrid": False,
            "zeroline": False,
        },
    }
    return {"data": data, "layout": layout}


def hover_text(curve: Curve, where: str = " at %{x:.3~s} tokens") -> str:
    """Write what to show at a point of a curve, as Plotly's template."""
    number = "%{y:.1%}" if curve.percent else "%{y:.4~g}"
    return f"{number}{where}<extra></extra>"


def _control_traces(curve: Curve, series: Series) -> list[Figure]:
    hover = f"supervised control: {hover_text(curve)}"
    return [line(series, "var(--good)", hover, layer=CONTROL, dash="dash")] if series.y else []


def _curve_traces(curve: Curve, series: Series) -> list[Figure]:
    hover = hover_text(curve)
    colour = f"var({curve.colour})"
    if not curve.noisy:
        return [line(series, colour, hover)]
    average = thin(means(series))
    series = thin(series)
    faint = {"color": colour, "size": 4, "opacity": 0.35}
    points = markers(series.x, series.y, faint, hover, POINTS)
    phases = dict.fromkeys(average.phase)
    return [points, *(line(part(average, name), colour, f"mean {hover}") for name in phases)]


def _flatline_traces(run: RunRecord, bottom: float) -> list[Figure]:
    """Mark flatlines at the bottom: their fine is a constant, far below the other returns.

    Those of one round stand at one place: they are one cross.
    """
    rounds: dict[int, list[Row]] = {}
    for row in run.of_kind("operation"):
        if row.get("surgeon/flatline"):
            rounds.setdefault(row["forward_tokens"], []).append(row)
    if not rounds:
        return []
    marker = {"color": "var(--bad)", "size": 7, "symbol": "x"}
    places = [bottom] * len(rounds)
    trace = markers([*rounds], places, marker, "flatlines: %{text}<extra></extra>", POINTS)
    counts = [flatlines(rows) for rows in rounds.values()]
    texts = [", ".join(f"{n} {html.escape(cause)}" for cause, n in c.items()) for c in counts]
    return [{**trace, "text": texts}]


def _commit_trace(commits: list[Row], series: Series) -> Figure:
    """Mark the kept operations on a curve."""
    places = [row["forward_tokens"] for row in commits]
    marker = {
        "color": "var(--surgeon)",
        "size": 11,
        "symbol": "diamond",
        "line": {"color": "var(--paper)", "width": 1.5},
    }
    heights = [_interpolate(place, series.x, series.y) for place in places]
    return markers(places, heights, marker, "an operation was kept here<extra></extra>", KEPT)


def _interpolate(place: float, x: list[int], y: list[float]) -> float:
    """Read a curve of rising x between its points, and flat beyond them."""
    after = next((index for index, value in enumerate(x) if value >= place), len(x) - 1)
    before = max(after - 1, 0)
    width = x[after] - x[before]
    share = min(max((place - x[before]) / width, 0.0), 1.0) if width else 1.0
    return y[before] + share * (y[after] - y[before])


def value_range(
    run: RunRecord, curve: Curve, series: Series, levels: list[float]
) -> tuple[float, float]:
    """Choose what part of the vertical axis to show."""
    values = series.y
    if curve.key == "return":
        # The fine of a flatline is far below all else: it counts in the mean, and is shown apart.
        rows = [row for row in run.of_kind(curve.kind) if not row.get("surgeon/flatline")]
        lasting = [row[curve.metric] for row in rows if row.get(curve.metric) is not None]
        values = lasting + means(series).y
    low, high = min(values + levels), max(values + levels)
    if curve.key == "loss" and levels:
        high = min(high, max(*levels, series.y[-1]) + _LOSS_HEADROOM)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - pad, high + pad


def _distance(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None else high - low
