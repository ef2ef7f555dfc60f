"""The coefficients of operations as heat maps: cells in a table, and a figure over the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from agents.report.data import Row, RunRecord
from agents.report.marks import MARGIN, Figure
from agents.report.parts import DASH, Html, escape, number

_MOST_CELLS = 20_000  # of a figure; beyond this neighbouring rounds are left out
_MOST_INLINE = 64  # cells of a table's row; more of them say no more


def coefficient_cells(values: Sequence[float | None]) -> Html:
    """Write coefficients between -1 and 1 as a row of coloured cells, for a table.

    The numbers show where one points, and are read out.
    """
    if not values:
        return Html(DASH)
    shown = list(values[:_MOST_INLINE])
    cells = "".join(_cell(index, value) for index, value in enumerate(shown, start=1))
    words = ", ".join(number(value, 2) for value in shown)
    rest = len(values) - len(shown)
    more = f' <span class="note">and {rest} more</span>' if rest else ""
    return Html(f'<span class="cells" role="img" aria-label="{escape(words)}">{cells}</span>{more}')


def _cell(index: int, value: float | None) -> str:
    if value is None:
        return f'<i title="{index}: {DASH}"></i>'
    css = "plus" if value >= 0 else "minus"
    share = min(abs(value), 1.0)
    shade = f"--share:{100 * share:.0f}%"
    return f'<i class="{css}" style="{shade}" title="{index}: {number(value, 2)}"></i>'


def coefficient_figure(run: RunRecord) -> Figure | None:
    """Draw the mean coefficients of each round of operations, from the first round to the last.

    Returns:
        The figure, or None where there are no coefficients, or not equally many of them.
    """
    rows = [row for row in run.of_kind("operation") if row.get("surgeon/coefficients")]
    if len({len(row["surgeon/coefficients"]) for row in rows}) != 1:
        return None
    rounds = [list(group) for _, group in groupby(rows, key=lambda row: row["forward_tokens"])]
    size = len(rows[0]["surgeon/coefficients"])
    stride = -(-len(rounds) * size // _MOST_CELLS)
    rounds = rounds[(len(rounds) - 1) % stride :: stride]
    columns = [_means(group) for group in rounds]
    return {
        "data": [
            {
                "type": "heatmap",
                "x": [group[-1].get("operation") for group in rounds],
                "y": list(range(1, size + 1)),
                "z": [[column[place] for column in columns] for place in range(size)],
                "zmin": -1,
                "zmax": 1,
                "colorscale": [
                    [0, "var(--surgeon)"],
                    [0.5, "var(--paper)"],
                    [1, "var(--model)"],
                ],
                "colorbar": {"thickness": 10, "outlinewidth": 0, "tickvals": [-1, 0, 1]},
                "hovertemplate": "coefficient %{y}, up to operation %{x}: %{z:.2f}<extra></extra>",
            }
        ],
        "layout": {
            "height": min(max(220, 90 + 22 * size), 460),
            "margin": {**MARGIN, "r": 16},
            "xaxis": {"title": {"text": "operations so far"}, "showgrid": False},
            "yaxis": {
                "title": {"text": "coefficient"},
                "autorange": "reversed",
                "showgrid": False,
                "zeroline": False,
            },
        },
    }


def _means(rows: list[Row]) -> list[float | None]:
    """Average each coefficient over operations, to what a colour can show."""
    means = []
    for values in zip(*(row["surgeon/coefficients"] for row in rows), strict=True):
        known = [value for value in values if value is not None]
        means.append(round(sum(known) / len(known), 3) if known else None)
    return means
