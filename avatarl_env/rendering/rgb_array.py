"""An operation as a picture: its coefficients, and the score after each step.

Shapes: A coefficients. Matplotlib is used without pyplot, so no global state is touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avatarl_env.episode import Episode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 600, 400, 100
MAX_BARS = 12  # more names do not fit
MAX_PANELS = 4
MAX_TICKS = 16  # of an axis of a heat map
MAX_LETTERS = 90  # of the column names in one line
MAX_VALUES = 8, 12  # rows and columns of maps that also show the numbers
CEILING, FLOOR = 0.9, 0.08  # of the drawing area below the headline, fractions of the height
INK, FAINT, RISE, DEAD = "#222222", "#9a9a9a", "#1f6fb4", "#c02020"
COLOURS = "RdBu_r"  # blue -1, white 0, red 1
SMALL, NORMAL, LARGE = 7, 8, 10  # points


class Panel(NamedTuple):
    """Coefficients laid out in rows and columns."""

    title: str
    unit: str
    """Name of the columns' axis."""
    rows: list[str]
    columns: list[str]
    values: NDArray[np.float64]
    """(rows, columns), NaN for a cell without a coefficient."""


class _Place(NamedTuple):
    panel: str
    unit: str
    row: str
    column: str


def draw(episode: Episode, labels: Sequence[str]) -> NDArray[np.uint8]:
    """Return the picture (400, 600, 3) of an operation.

    Args:
        episode: the operation.
        labels: names of the coefficients, (A,). Their layers are the rows of a heat map, their
            other numbers, such as heads, its columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)  # not typed
    _write(figure, 0.02, 0.955, f"step {episode.n_done} of {episode.config.episode_length}", "left")
    _write(figure, 0.98, 0.955, f"return {episode.total_reward:+.4f}", "right")
    panels = lay_out(labels, episode.coefficients)
    if len(labels) <= MAX_BARS and not all(panel.unit == "head" for panel in panels):
        top = _draw_bars(figure, labels, episode.coefficients)
    else:
        top = _draw_maps(figure, panels)
    _draw_scores(figure.add_axes((0.1, FLOOR, 0.87, top - FLOOR)), episode)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def lay_out(labels: Sequence[str], coefficients: NDArray[np.float64]) -> list[Panel]:
    """Arrange coefficients by the layer and the number in their names, else in reading order.

    Args:
        labels: (A,), such as "log-sharpness layer 0 head 3" or "cut query layer 1".
        coefficients: (A,).
    """
    places = [_place(label) for label in labels]
    titles = [*dict.fromkeys(place.panel for place in places if place)]
    known = [place for place in places if place]
    if len(set(known)) < len(labels) or len(titles) > MAX_PANELS:
        return [_in_reading_order(coefficients)]
    panels = []
    for title in titles:
        here = [(p, c) for p, c in zip(known, coefficients, strict=True) if p.panel == title]
        rows = [*dict.fromkeys(place.row for place, _ in here)]
        columns = [*dict.fromkeys(place.column for place, _ in here)]
        values = np.full((len(rows), len(columns)), math.nan)
        for place, value in here:
            values[rows.index(place.row), columns.index(place.column)] = value
        panels.append(Panel(title, here[0][0].unit, rows, columns, values))
    return panels


def _place(label: str) -> _Place | None:
    """Parse a label: "log-gain band 2 query layer 0" is row 0, column 2 of "log-gain query"."""
    found = re.search(r" ?\blayer (\S+)", label)
    if not found:
        return None
    row, rest = found[1], (label[: found.start()] + label[found.end() :]).strip()
    number = re.search(r"(\S+) (\d+)\b", rest)
    if not number:
        return _Place("", "", row, rest)
    title = f"{rest[: number.start()].strip()} {rest[number.end() :].strip()}".strip()
    return _Place(title, number[1], row, number[2])


def _in_reading_order(coefficients: NDArray[np.float64]) -> Panel:
    n_columns = min(len(coefficients), math.ceil(math.sqrt(3 * len(coefficients))))
    n_rows = math.ceil(len(coefficients) / n_columns)
    values = np.full(n_rows * n_columns, math.nan)
    values[: len(coefficients)] = coefficients
    rows = [f"{row * n_columns} +" for row in range(n_rows)]
    columns = [str(column) for column in range(n_columns)]
    return Panel("coefficients by number", "", rows, columns, values.reshape(n_rows, n_columns))


def _draw_bars(figure: Figure, labels: Sequence[str], coefficients: NDArray[np.float64]) -> float:
    """Draw a bar for each coefficient, with its name; return the top of the score's plot."""
    height = 0.035 * len(labels) + 0.02
    axes = figure.add_axes((0.44, CEILING - height, 0.53, height))
    places = range(len(labels))
    colours = ["#b2182b" if c > 0 else "#2166ac" for c in coefficients]
    axes.barh(places, coefficients, color=colours, height=0.7)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set(xlim=(-1.0, 1.0), ylim=(len(labels) - 0.5, -0.5))
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    names = [label if len(label) <= 38 else label[:37] + "..." for label in labels]
    axes.set_yticks(places, names)
    _plain(axes)
    return CEILING - height - 0.13


def _draw_maps(figure: Figure, panels: Sequence[Panel]) -> float:
    """Draw heat maps side by side; return the top of the score's plot."""
    n_rows = max(len(panel.rows) for panel in panels)
    longest = max(len(name) for panel in panels for name in panel.columns)
    slanted = longest * sum(len(panel.columns) for panel in panels) > MAX_LETTERS and longest > 4
    most = 0.28 if slanted else 0.38
    height = min(most, max(0.12, 0.075 * n_rows))
    floor = CEILING - 0.04 - height
    gap, left, right = 0.03, 0.1, 0.9
    width = (right - left + gap) / len(panels) - gap
    image = None
    for index, panel in enumerate(panels):
        axes = figure.add_axes((left + index * (width + gap), floor, width, height))
        image = axes.imshow(
            panel.values, cmap=COLOURS, vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_facecolor("#dddddd")  # of cells without a coefficient
        _label_map(axes, panel, first=index == 0, slanted=slanted)
        if n_rows <= MAX_VALUES[0] and len(panel.columns) * len(panels) <= MAX_VALUES[1]:
            _write_values(axes, panel.values)
    assert image is not None
    bar = figure.colorbar(image, cax=figure.add_axes((0.925, floor, 0.015, height)))
    bar.set_ticks([-1, 0, 1])
    bar.ax.tick_params(labelsize=SMALL, length=2, colors=INK)
    return floor - (0.28 if slanted else 0.165)


def _label_map(axes: Axes, panel: Panel, *, first: bool, slanted: bool) -> None:
    axes.set_title(panel.title, fontsize=NORMAL, color=INK, pad=4, parse_math=False)
    shown = range(0, len(panel.columns), math.ceil(len(panel.columns) / MAX_TICKS))
    axes.set_xticks(shown, [panel.columns[i] for i in shown])
    if slanted:
        for name in axes.get_xticklabels():
            name.set(rotation=30, ha="right")
    shown = range(0, len(panel.rows), math.ceil(len(panel.rows) / MAX_TICKS))
    axes.set_yticks(shown, [panel.rows[i] for i in shown] if first else [])
    if panel.unit:
        axes.set_xlabel(panel.unit, fontsize=SMALL, color=INK, labelpad=1)
    if first and not panel.title.startswith("coefficients"):
        axes.set_ylabel("layer", fontsize=SMALL, color=INK, labelpad=2)
    _plain(axes)


def _write_values(axes: Axes, values: NDArray[np.float64]) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "white" if abs(value) > 0.6 else INK
            text = f"{value:+.2f}" if abs(value) >= 0.005 else "0"
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)


def _draw_scores(axes: Axes, episode: Episode) -> None:
    """Draw the baseline's score and the score after each step."""
    scores, episode_length = episode.scores, episode.config.episode_length
    survived = scores[:-1] if episode.flatline else scores
    low, high = min(survived), max(survived)
    margin = 0.15 * (high - low) or 0.1
    axes.set(
        xlim=(-0.04 * episode_length, 1.04 * episode_length), ylim=(low - margin, high + margin)
    )
    axes.axhline(scores[0], color=FAINT, linewidth=1, linestyle="--")
    axes.plot(survived, color=RISE, marker="o", markersize=5, linewidth=1.6)
    title = f"score: {scores[0]:.3f} before, {survived[-1]:.3f} now"
    if episode.flatline:
        # The score after a flatline is not drawn: it would dwarf the others.
        axes.axvline(episode.n_done, color=DEAD, linewidth=1.6)
        axes.plot([episode.n_done], [low], color=DEAD, marker="x", markersize=8, markeredgewidth=2)
        note = f"flatline: {episode.flatline}"
        axes.set_title(note, fontsize=NORMAL, color=DEAD, pad=4, loc="right", parse_math=False)
        title = f"score: {scores[0]:.3f} before"
    axes.set_title(title, fontsize=NORMAL, color=INK, pad=4, loc="left")
    ticks = range(0, episode_length + 1, math.ceil((episode_length + 1) / MAX_TICKS))
    axes.set_xticks(ticks, ["baseline" if tick == 0 else str(tick) for tick in ticks])
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    _plain(axes)


def _write(figure: Figure, x: float, y: float, text: str, side: str) -> None:
    figure.text(x, y, text, ha=side, va="center", fontsize=LARGE, color=INK, weight="bold")


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=SMALL, length=2, colors=INK)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    for spine in axes.spines.values():
        spine.set(color=FAINT, linewidth=0.6)
