from __future__ import annotations

from typing import Any

import pytest

from agents.report.curves import CURVES, Curve
from agents.report.data import RunRecord
from agents.report.figures import curve_figure, effect_figure

ACCURACY, LOSS = CURVES[:2]
RETURN = next(curve for curve in CURVES if curve.key == "return")
GAIN = {"mean": 0.5, "low": 0.25, "high": 1.0}


def record(*rows: dict[str, Any], **summary: Any) -> RunRecord:
    return RunRecord(name="run", config={}, rows=list(rows), summary=summary)


def evaluation(tokens: int, accuracy: float | None, loss: float = 2.0) -> dict[str, Any]:
    metrics = {"validation/accuracy": accuracy, "validation/loss": loss}
    return {"kind": "evaluation", "phase": "joint", "forward_tokens": tokens, **metrics}


def operation(tokens: int, value: float, flatline: str | None = None) -> dict[str, Any]:
    metrics = {"surgeon/return": value, "surgeon/flatline": flatline}
    return {"kind": "operation", "phase": "joint", "forward_tokens": tokens, **metrics}


def commit(tokens: int, *, kept: bool) -> dict[str, Any]:
    return {"kind": "commit", "phase": "joint", "forward_tokens": tokens, "commit/kept": kept}


def draw(run: RunRecord, curve: Curve) -> dict[str, Any]:
    figure = curve_figure(run, curve)
    assert figure is not None
    return figure


def test_a_metric_that_the_run_lacks_has_no_figure() -> None:
    assert curve_figure(record(evaluation(0, None)), ACCURACY) is None
    assert curve_figure(record(), RETURN) is None


def test_a_curve_is_drawn_against_compute() -> None:
    figure = draw(record(evaluation(0, 0.125), evaluation(100, 0.375)), ACCURACY)
    (line,) = figure["data"]
    assert (line["x"], line["y"], line["mode"]) == ([0, 100], [0.125, 0.375], "lines")
    assert figure["layout"]["xaxis"]["range"] == [0, 100]
    assert figure["layout"]["yaxis"]["tickformat"] == ".0%"


def test_a_single_point_can_be_seen() -> None:
    assert draw(record(evaluation(0, 0.125)), ACCURACY)["data"][0]["mode"] == "markers"


def test_kept_operations_are_marked_on_the_curve_between_its_points() -> None:
    run = record(
        evaluation(0, 0.1),
        commit(25, kept=True),
        commit(50, kept=False),
        evaluation(100, 0.5),
        commit(200, kept=True),
    )
    figure = draw(run, ACCURACY)
    marks = figure["data"][1]
    assert marks["x"] == [25, 200]
    assert marks["y"] == pytest.approx([0.2, 0.5])
    lines = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["type"] == "line"]
    assert lines == [25, 200]


def test_references_are_lines_with_names_and_always_in_view() -> None:
    references = [{"name": "5-gram", "loss": 1.5, "accuracy": 0.6}]
    figure = draw(record(evaluation(0, 0.1), evaluation(9, 0.4), references=references), ACCURACY)
    layout = figure["layout"]
    assert [shape["y0"] for shape in layout["shapes"] if shape["type"] == "line"] == [0.6]
    assert "5-gram" in [label["text"] for label in layout["annotations"]]
    low, high = layout["yaxis"]["range"]
    assert low < 0.1
    assert high > 0.6


def test_the_steep_begin_of_the_loss_is_cut_off_where_references_tell_the_scale() -> None:
    references = [{"name": "bigram", "loss": 2.5, "accuracy": 0.3}]
    rows = [evaluation(0, 0.1, loss=9.0), evaluation(9, 0.4, loss=2.0)]
    assert draw(record(*rows), LOSS)["layout"]["yaxis"]["range"][1] > 9.0
    top = draw(record(*rows, references=references), LOSS)["layout"]["yaxis"]["range"][1]
    assert 2.5 < top < 4.0


def test_flatlines_are_marked_at_the_edge_and_do_not_squash_the_rest() -> None:
    rows = [operation(tokens, 0.125) for tokens in range(1, 100)]
    figure = draw(record(*rows, operation(100, -1.0, "<i>entropy</i>")), RETURN)
    low, _ = figure["layout"]["yaxis"]["range"]
    cross = figure["data"][-1]
    assert -1.0 < low < cross["y"][0]
    assert cross["x"] == [100]
    assert cross["text"] == ["1 &lt;i&gt;entropy&lt;/i&gt;"]
    assert figure["data"][1]["y"][-1] == pytest.approx((9 * 0.125 - 1.0) / 10)


def test_flatlines_of_one_round_are_one_mark() -> None:
    deaths = ["entropy 0.1 outside [1, 2]", "collision_l2 9 above 8", "entropy 3 outside [1, 2]"]
    rows = [operation(100, -1.0, death) for death in deaths]
    rows += [operation(100, 0.5), operation(200, 0.5), operation(300, -1.0, "non-finite logits")]
    cross = draw(record(*rows), RETURN)["data"][-1]
    assert cross["x"] == [100, 300]
    assert cross["text"] == ["2 entropy, 1 collision_l2", "1 non-finite logits"]
    assert len(set(cross["y"])) == 1


def test_a_round_of_many_operations_stands_at_one_place() -> None:
    rows = [operation(100, value / 64) for value in range(64)]
    rows += [operation(200, 1 + value / 64) for value in range(64)]
    points, mean = draw(record(*rows), RETURN)["data"]
    assert len(points["x"]) == 128
    assert mean["x"] == [100, 200]
    # Never over less than the round.
    assert mean["y"] == pytest.approx([31.5 / 64, 1 + 31.5 / 64], rel=1e-5)


def test_long_runs_are_thinned_to_what_can_be_seen_and_keep_their_end() -> None:
    figure = draw(record(*(operation(tokens, 0.5) for tokens in range(2501))), RETURN)
    points, mean = figure["data"]
    assert len(points["x"]) == len(mean["x"]) == 834
    assert points["x"][-1] == mean["x"][-1] == 2500


def test_a_constant_metric_has_room_around_it() -> None:
    curve = Curve(key="rate", kind="evaluation", metric="validation/loss", title="rate")
    low, high = draw(record(evaluation(0, 0.1, loss=0.002)), curve)["layout"]["yaxis"]["range"]
    assert (low, high) == pytest.approx((0.0018, 0.0022))


def test_the_effect_shows_who_gained_what_with_the_interval() -> None:
    unknown = {"mean": 0.0, "low": None, "high": None}
    whom = {"surgeon": GAIN, "random": unknown, "zero": unknown}
    measurements = [{"after": "<b>", "kl_ref_gain": whom}, {"after": "joint", "kl_ref_gain": whom}]
    figure = effect_figure(measurements, "kl_ref_gain", "nats")
    surgeon, random, zero = figure["data"]
    assert [trace["name"] for trace in figure["data"]] == ["surgeon", "random", "zero"]
    assert surgeon["x"] == [0.5, 0.5]
    assert surgeon["error_x"]["array"] == [0.5, 0.5]
    assert surgeon["error_x"]["arrayminus"] == [0.25, 0.25]
    assert random["error_x"]["array"] == [None, None]
    # From top to bottom: the surgeon, random and zero of the first, then those of the second.
    heights = [trace["y"][index] for index in (0, 1) for trace in (surgeon, random, zero)]
    assert heights == sorted(heights, reverse=True)
    assert figure["layout"]["yaxis"]["ticktext"] == ["after &lt;b&gt;", "after joint"]
