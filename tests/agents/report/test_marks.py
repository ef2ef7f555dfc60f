from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.report.curves import CURVES
from agents.report.data import RunRecord
from agents.report.marks import (
    HEIGHT,
    LIMIT,
    MARGIN,
    level_labels,
    phase_labels,
    phase_shapes,
    reference_levels,
    spread,
)

REFERENCES = [
    {"name": "bigram", "loss": 2.5, "accuracy": 0.27},
    {"name": "trigram", "loss": 2.0, "accuracy": None},
]


def record(*phases: tuple[str, int], **summary: object) -> RunRecord:
    rows = [{"kind": "grpo", "phase": name, "forward_tokens": tokens} for name, tokens in phases]
    return RunRecord(name="run", config={}, rows=rows, summary=dict(summary))


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([0.0, 10.0, 20.0], [0.0, 10.0, 20.0]),
        ([0.0, 4.0], [-3.0, 7.0]),
        ([0.0, 4.0, 8.0], [-6.0, 4.0, 14.0]),
        ([0.0, 30.0, 30.0], [0.0, 25.0, 35.0]),
    ],
)
def test_points_that_touch_move_apart_around_their_middle(
    wanted: list[float], placed: list[float]
) -> None:
    assert spread(wanted, 10.0) == placed


@given(st.lists(st.floats(-1e3, 1e3), max_size=8).map(sorted))
def test_neighbours_end_up_a_gap_apart_and_in_order(wanted: list[float]) -> None:
    placed = spread(wanted, 13.0)
    assert len(placed) == len(wanted)
    assert all(high - low >= 13.0 - 1e-6 for low, high in itertools.pairwise(placed))


def test_levels_are_the_references_of_the_curve_and_the_limit_of_the_loss() -> None:
    run = record(references=REFERENCES, corpus_nats_per_char=1.25)
    levels = {curve.key: reference_levels(run, curve) for curve in CURVES}
    assert levels.pop("accuracy") == {"bigram": 0.27}
    assert levels.pop("loss") == {"bigram": 2.5, "trigram": 2.0, LIMIT: 1.25}
    assert all(level == {} for level in levels.values())


def test_labels_stand_beside_their_lines_unless_they_would_touch() -> None:
    pixels = HEIGHT - MARGIN["t"] - MARGIN["b"]
    far, near, other = level_labels({"a": 1.0, "b": 0.0, "c": 0.01}, 0.0, 1.0)[::-1]
    assert (far["text"], far["y"], far["yshift"]) == ("a", 1.0, 0.0)
    distance = 0.01 * pixels + near["yshift"] - other["yshift"]
    assert distance == pytest.approx(13, abs=0.11)


def test_phases_are_tinted_end_to_end_and_named_where_there_is_room() -> None:
    run = record(("a", 50), ("<b>", 60), ("c", 100))
    assert [(shape["x0"], shape["x1"]) for shape in phase_shapes(run)] == [
        (0, 50),
        (50, 60),
        (60, 100),
    ]
    assert [(label["text"], label["x"]) for label in phase_labels(run)] == [("a", 25), ("c", 80)]


def test_the_name_of_a_phase_is_escaped() -> None:
    assert phase_labels(record(("<b>", 9)))[0]["text"] == "&lt;b&gt;"
