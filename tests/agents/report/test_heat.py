from __future__ import annotations

from typing import Any

from agents.report.data import RunRecord
from agents.report.heat import coefficient_cells, coefficient_figure


def record(*rounds: list[list[float | None]]) -> RunRecord:
    rows: list[dict[str, Any]] = []
    for tokens, operations in enumerate(rounds, start=1):
        for values in operations:
            clock = {"phase": "joint", "forward_tokens": tokens, "operation": len(rows) + 1}
            rows.append({"kind": "operation", **clock, "surgeon/coefficients": values})
    return RunRecord(name="run", config={}, rows=rows, summary={})


def test_a_cell_is_as_strong_as_its_coefficient_and_says_it() -> None:
    cells = coefficient_cells([0.5, -0.25, 0.0, None, -3.0])
    assert 'aria-label="0.50, \u22120.25, 0.00, \u2013, \u22123.00"' in cells
    assert '<i class="plus" style="--share:50%" title="1: 0.50"></i>' in cells
    assert '<i class="minus" style="--share:25%" title="2: \u22120.25"></i>' in cells
    assert (
        '<i class="plus" style="--share:0%" title="3: 0.00"></i><i title="4: \u2013"></i>' in cells
    )
    assert '<i class="minus" style="--share:100%" title="5: \u22123.00"></i>' in cells


def test_of_very_many_coefficients_the_first_are_shown() -> None:
    cells = coefficient_cells([0.5] * 100)
    assert cells.count("<i ") == 64
    assert "and 36 more" in cells
    assert coefficient_cells([]) == "\u2013"


def test_the_figure_has_a_column_per_round_and_a_row_per_coefficient() -> None:
    figure = coefficient_figure(record([[1.0, 0.0], [0.5, -0.5]], [[0.25, None]]))
    assert figure is not None
    (trace,) = figure["data"]
    assert trace["x"] == [2, 3]
    assert trace["y"] == [1, 2]
    assert trace["z"] == [[0.75, 0.25], [-0.25, None]]
    assert (trace["zmin"], trace["zmax"]) == (-1, 1)


def test_a_long_run_is_thinned_and_keeps_its_last_round() -> None:
    figure = coefficient_figure(record(*([[n / 500] * 100] for n in range(500))))
    assert figure is not None
    (trace,) = figure["data"]
    assert len(trace["z"]) == 100
    assert {len(row) for row in trace["z"]} == {167}
    assert trace["x"][-1] == 500


def test_without_coefficients_or_with_unlike_ones_there_is_no_figure() -> None:
    assert coefficient_figure(record()) is None
    assert coefficient_figure(record([[]])) is None
    assert coefficient_figure(record([[1.0], [1.0, 2.0]])) is None
