"""The report's figures as plain Plotly dictionaries.

Colours are the names of CSS variables, `var(--model)`: the page looks them up when it draws, so
that a figure follows the reader's light or dark theme.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable

from agents.report.curves import Curve
from agents.report.data import Row, RunRecord, Series, flatlines, running_mean
from agents.report.marks import (
    HEIGHT,
    MARGIN,
    Figure,
    commit_shapes,
    level_labels,
    level_shapes,
    phase_labels,
    phase_shapes,
    reference_levels,
)

WHO = ("surgeon", "random", "zero")

_LOSS_HEADROOM = 0.9  # nats above the bigram table, which every model soon leaves behind
_MOST_POINTS = 1000  # more than a plot of this size can show


def curve_figure(run: RunRecord, curve: Curve) -> Figure | None:
    """Draw one metric against compute, with phases, n-gram lines and kept operations.

    Returns:
        The figure, or None where the run has no such metric.
    """
    series = run.series(curve.kind, curve.metric)
    if not series.y:
        return None
    levels = reference_levels(run, curve)
    low, high = _value_range(run, curve, series, list(levels.values()))
    data = _curve_traces(curve, series)
    if curve.key == "return":
        data += _flatline_traces(run, low + 0.03 * (high - low))
    commits = run.kept_commits()
    if commits and curve.kind == "evaluation":
        data.append(_commit_trace(commits, series))
    layout = {
        "height": HEIGHT,
        "margin": MARGIN,
        "showlegend": False,
        "xaxis": {
            "title": {"text": "compute, in forward tokens"},
            "range": [0, max(row["forward_tokens"] for row in run.rows) or 1],
            "exponentformat": "SI",
        },
        "yaxis": {
            "title": {"text": html.escape(curve.unit)},
            "range": [low, high],
            "tickformat": ".0%" if curve.percent else "",
        },
        "shapes": phase_shapes(run) + level_shapes(levels) + commit_shapes(commits),
        "annotations": phase_labels(run) + level_labels(levels, low, high),
    }
    return {"data": data, "layout": layout}


def effect_figure(measurements: list[Row], quantity: str, unit: str) -> Figure:
    """Draw what the surgeon, random and zero operations gained, with their intervals.

    Args:
        measurements: The measurements of the summary, in order.
        quantity: Which gain to draw, `kl_ref_gain` or `heldout_loss_fall`.
        unit: Its unit, in words.
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
    after = [html.escape(str(measurement["after"])) for measurement in measurements]
    layout = {
        "height": 110 + 90 * len(after),
        "margin": {"l": 90, "r": 16, "t": 34, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": unit}, "zeroline": True, "zerolinewidth": 2},
        "yaxis": {
            "tickvals": [-index for index in range(len(after))],
            "ticktext": [f"after {name}" for name in after],
            "range": [0.6 - len(after), 0.6],
            "showgrid": False,
            "zeroline": False,
        },
    }
    return {"data": data, "layout": layout}


def _curve_traces(curve: Curve, series: Series) -> list[Figure]:
    number = "%{y:.1%}" if curve.percent else "%{y:.4~g}"
    hover = f"{number} at %{{x:.3~s}} tokens<extra></extra>"
    colour = f"var({curve.colour})"
    if not curve.noisy:
        return [_line(series, colour, hover)]
    means = _thin(_means(series))
    series = _thin(series)
    points = _markers(series.x, series.y, {"color": colour, "size": 4, "opacity": 0.35}, hover)
    phases = dict.fromkeys(means.phase)
    return [points, *(_line(_part(means, name), colour, f"mean {hover}") for name in phases)]


def _means(series: Series) -> Series:
    """Average a tenth of the values, up to 50, and never less than one round of operations."""
    largest_round = max(Counter(series.x).values())
    return running_mean(series, max(3, min(50, len(series.y) // 10), largest_round))


def _thin(series: Series) -> Series:
    """Keep every n-th point, the last among them, so that at most `_MOST_POINTS` are left."""
    stride = -(-len(series.x) // _MOST_POINTS)
    kept = range((len(series.x) - 1) % stride, len(series.x), stride)
    return _pick(series, kept)


def _part(series: Series, phase: str) -> Series:
    """Cut out one phase, so that no line is drawn across the phases in between."""
    return _pick(series, [i for i, name in enumerate(series.phase) if name == phase])


def _pick(series: Series, places: Iterable[int]) -> Series:
    rows = [(series.x[i], series.y[i], series.phase[i]) for i in places]
    return Series([x for x, _, _ in rows], [y for _, y, _ in rows], [name for _, _, name in rows])


def _line(series: Series, colour: str, hover: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines" if len(series.x) > 1 else "markers",
        "x": series.x,
        "y": _rounded(series.y),
        "line": {"color": colour, "width": 2.5},
        "marker": {"color": colour, "size": 7},
        "hovertemplate": hover,
    }


def _markers(x: list[int], y: list[float], marker: Figure, hover: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": _rounded(y),
        "marker": marker,
        "hovertemplate": hover,
    }


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
    trace = _markers([*rounds], places, marker, "flatlines: %{text}<extra></extra>")
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
    return _markers(places, heights, marker, "an operation was kept here<extra></extra>")


def _interpolate(place: float, x: list[int], y: list[float]) -> float:
    """Read a curve of rising x between its points, and flat beyond them."""
    after = next((index for index, value in enumerate(x) if value >= place), len(x) - 1)
    before = max(after - 1, 0)
    width = x[after] - x[before]
    share = min(max((place - x[before]) / width, 0.0), 1.0) if width else 1.0
    return y[before] + share * (y[after] - y[before])


def _value_range(
    run: RunRecord, curve: Curve, series: Series, levels: list[float]
) -> tuple[float, float]:
    """Choose what part of the vertical axis to show."""
    values = series.y
    if curve.key == "return":
        # The fine of a flatline is far below all else: it counts in the mean, and is shown apart.
        rows = [row for row in run.of_kind(curve.kind) if not row.get("surgeon/flatline")]
        lasting = [row[curve.metric] for row in rows if row.get(curve.metric) is not None]
        values = lasting + _means(series).y
    low, high = min(values + levels), max(values + levels)
    if curve.key == "loss" and levels:
        high = min(high, max(*levels, series.y[-1]) + _LOSS_HEADROOM)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - pad, high + pad


def _rounded(values: list[float]) -> list[float]:
    """Keep six significant digits, which is more than a screen can show."""
    return [float(f"{value:.6g}") for value in values]


def _distance(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None else high - low
