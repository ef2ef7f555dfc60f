"""Lines and points: what the figures of one run and those of several are drawn with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from agents.report.data import Series, running_mean
from agents.report.marks import Figure

MOST_POINTS = 1000  # more than a plot of this size can show


def means(series: Series) -> Series:
    """Average a tenth of the values, up to 50, and never less than one round of operations."""
    largest_round = max(Counter(series.x).values())
    return running_mean(series, max(3, min(50, len(series.y) // 10), largest_round))


def thin(series: Series) -> Series:
    """Keep every n-th point, the last among them, so that at most `MOST_POINTS` are left."""
    stride = -(-len(series.x) // MOST_POINTS)
    kept = range((len(series.x) - 1) % stride, len(series.x), stride)
    return _pick(series, kept)


def part(series: Series, phase: str) -> Series:
    """Cut out one phase, so that no line is drawn across the phases in between."""
    return _pick(series, [i for i, name in enumerate(series.phase) if name == phase])


def _pick(series: Series, places: Iterable[int]) -> Series:
    rows = [(series.x[i], series.y[i], series.phase[i]) for i in places]
    return Series([x for x, _, _ in rows], [y for _, y, _ in rows], [name for _, _, name in rows])


def line(
    series: Series, colour: str, hover: str, *, layer: str | None = None, dash: str = "solid"
) -> Figure:
    """Draw a line, or a point where there is only one.

    Args:
        series: Where it runs.
        colour: Colour, also as `var(--name)`.
        hover: What to show at a point, as Plotly's template.
        layer: What it belongs to, to be shown and hidden together.
        dash: Plotly's name of the dash.
    """
    trace = {
        "type": "scatter",
        "mode": "lines" if len(series.x) > 1 else "markers",
        "x": series.x,
        "y": rounded(series.y),
        "line": {"color": colour, "width": 2.5, "dash": dash},
        "marker": {"color": colour, "size": 7},
        "hovertemplate": hover,
    }
    return trace if layer is None else {**trace, "meta": layer}


def markers(x: list[int], y: list[float], marker: Figure, hover: str, layer: str) -> Figure:
    """Draw points, which are shown and hidden with their layer."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": rounded(y),
        "marker": marker,
        "hovertemplate": hover,
        "meta": layer,
    }


def rounded(values: list[float]) -> list[float]:
    """Keep six significant digits, which is more than a screen can show."""
    return [float(f"{value:.6g}") for value in values]
