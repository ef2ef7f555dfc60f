"""The pages as a reader sees them, in a real browser: agents/report/draw.js and style.css."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from agents.report import write_reports
from tests.agents.fake_runs import MadeUpRun, make_run
from tests.agents.report.browser import NAMES, find_browser, run_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason=f"needs one of {', '.join(NAMES)}"),
    pytest.mark.xdist_group("browser"),
]

DRAW_ALL = """
    document.querySelectorAll("details").forEach((fold) => { fold.open = true; });
    await pause(500);
    const loss = document.getElementById("plot-validation/loss");
    const style = getComputedStyle(document.documentElement);
    const plots = [...document.querySelectorAll(".plot")];
    const seen = {
      undrawn: plots.filter((plot) => !plot.querySelector(".main-svg")).length,
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
      paper: style.getPropertyValue("--paper").trim(),
      theme: style.getPropertyValue("--model").trim(),
      colour: loss.data[0].line.color};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    run = make_run(root / "<i>run")
    run.finish(corpus_nats_per_char=1.66)  # so close to the 5-gram that the labels would touch
    other = MadeUpRun(root / "other")
    other.train("bootstrap", 60)
    other.operate("surgery", 16)
    other.save()
    names = ("report", "unfinished", "comparison")
    written = write_reports([run.folder, other.folder], root / "comparison.html")
    return dict(zip(names, written, strict=True))


@pytest.fixture(scope="module")
def report(pages: dict[str, Path]) -> dict[str, Any]:
    """What the figures of one run hold, and what becomes of them by zooming and switching."""
    script = """
      const {shapes, annotations, yaxis} = loss.layout;
      const named = (name) => loss.layout.shapes.filter((shape) => shape.name === name);
      const scale = (300 - 26 - 44) / (yaxis.range[1] - yaxis.range[0]);
      const labels = annotations.filter((label) => label.name === "levels");
      const returns = document.getElementById("plot-surgeon/return");
      const effect = document.getElementById("plot-effect-kl_ref_gain");
      const heat = document.getElementById("plot-coefficients-0").data[0];
      Object.assign(seen, {
        phases: named("phases").map((shape) => [shape.x0, shape.x1]),
        levels: named("levels").map((shape) => shape.y0),
        texts: annotations.map((label) => label.text),
        places: labels.map((label) => label.y * scale + label.yshift).sort((a, b) => a - b),
        commits: named("commits").map((shape) => shape.x0),
        line: loss.data[0], diamonds: loss.data.at(-1), range: yaxis.range,
        crosses: returns.data.find((trace) => trace.marker.symbol === "x"),
        returns: returns.layout.yaxis.range,
        effect: effect.data, labels: effect.layout.yaxis.ticktext,
        heat: [heat.z.length, heat.zmin]});
      const drag = loss.querySelector(".nsewdrag"), box = drag.getBoundingClientRect();
      const mouse = (type, share) => (document.querySelector(".dragcover") ?? drag).dispatchEvent(
        new MouseEvent(type, {bubbles: true, buttons: 1, clientY: box.top + 50,
                              clientX: box.left + share * box.width}));
      mouse("mousedown", 0.25);
      mouse("mousemove", 0.4);
      mouse("mousemove", 0.5);
      mouse("mouseup", 0.5);
      await pause(500);
      seen.zoomed = [...loss.layout.xaxis.range];
      seen.counts = [];
      for (const name of ["phases", "levels", "commits"]) {
        const input = document.querySelector(`input[data-layer=${name}]`);
        for (let n = 0; n < 2; n++) {
          input.click();
          await pause(100);
          seen.counts.push(named(name).length);
        }
      }
      seen.kept = loss.layout.xaxis.range;
      return seen;"""
    answer, problems = run_in(pages["report"], DRAW_ALL + script)
    assert problems == []
    check(answer, dark=False)
    return dict(answer)


def check(seen: dict[str, Any], *, dark: bool) -> None:
    assert seen["undrawn"] == 0
    assert seen["overflow"] <= 0
    assert [url for url in seen["loaded"] if not url.startswith(("data:", "blob:"))] == []
    assert seen["paper"] == ("#171614" if dark else "#fbfaf7")
    assert seen["colour"] == seen["theme"]


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("report", 500, True), ("unfinished", 500, False)]
)
def test_a_page_opens_without_a_problem_draws_every_figure_and_fits(
    pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    seen, problems = run_in(pages[name], DRAW_ALL + "return seen;", width=width, dark=dark)
    assert problems == []
    check(seen, dark=dark)


def test_the_curve_of_one_run_has_phases_levels_and_commits(report: dict[str, Any]) -> None:
    assert len(report["phases"]) == 3
    assert all(a[1] == b[0] for a, b in itertools.pairwise(report["phases"]))
    assert report["levels"] == [2.486, 2.049, 1.774, 1.669, 1.66]
    assert {"bootstrap", "surgery", "joint", "5-gram", "limit"} <= set(report["texts"])
    assert min(b - a for a, b in itertools.pairwise(report["places"])) > 12.9
    assert len(report["commits"]) == 2
    assert report["diamonds"]["x"] == report["commits"]
    assert all(1.8 < y < 2.1 for y in report["diamonds"]["y"])  # on the curve
    low, high = report["range"]
    assert low < 1.66
    assert 2.486 < high < 4.0  # the loss of random weights, 4.2, is cut off


def test_flatlines_are_marked_at_the_edge_of_the_returns(report: dict[str, Any]) -> None:
    low, high = report["returns"]
    assert low > -1.0  # their penalty
    assert all(low < y < low + 0.1 * (high - low) for y in report["crosses"]["y"])
    assert all("entropy" in text for text in report["crosses"]["text"])


def test_the_effect_and_the_coefficients_are_drawn(report: dict[str, Any]) -> None:
    surgeon, random, zero = report["effect"]
    assert [trace["name"] for trace in report["effect"]] == ["surgeon", "random", "zero"]
    assert surgeon["x"] == [0.012, 0.021]
    assert surgeon["error_x"]["array"] == pytest.approx([0.008, 0.008])
    assert surgeon["y"] > random["y"] > zero["y"]
    assert report["labels"] == ["after surgery", "after joint"]
    assert report["heat"] == [8, -1]


def test_layers_are_switched_off_and_on_and_the_zoom_stays(report: dict[str, Any]) -> None:
    low, high = report["zoomed"]
    assert 1e6 < low < high < 5e6
    assert report["counts"] == [0, 3, 0, 5, 0, 2]
    assert report["kept"] == report["zoomed"]


def test_runs_of_a_comparison_are_switched_in_every_figure(pages: dict[str, Path]) -> None:
    script = """
      const runs = () => loss.data.map((trace) => trace.meta);
      const before = runs();
      seen.looks = new Set(loss.data.map((trace) => trace.line.color + trace.line.dash)).size;
      document.querySelector("input[data-layer=run-0]").click();
      await pause(100);
      Plotly.Fx.hover(loss, {xval: 1e5});
      await pause(100);
      seen.told = loss.querySelector(".hoverlayer").textContent;
      return {...seen, before, after: runs()};"""
    seen, problems = run_in(pages["comparison"], DRAW_ALL + script)
    assert problems == []
    check(seen, dark=False)
    assert (seen["before"], seen["after"], seen["looks"]) == (["run-0", "run-1"], ["run-1"], 2)
    assert "other" in seen["told"]
