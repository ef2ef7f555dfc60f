"""The pages as a reader has them: in a real browser, with a mouse."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.report import rebuild, write_report
from tests.agents.fake_runs import MadeUpRun, make_run
from tests.agents.report.browser import NAMES, Browser, find_browser

MISSING = f"needs a browser: none of {', '.join(NAMES)}, nor playwright's"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_browser() is None, reason=MISSING)]

DRAWN = "document.querySelectorAll('.plot .main-svg').length > 0"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
RANGE = "document.getElementById('plot-loss').layout.xaxis.range"
TRACES = "document.getElementById('plot-loss').data.map(trace => trace.meta ?? '')"
SHAPES = "document.getElementById('plot-loss').layout.shapes.map(shape => shape.name)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path is not None
    with Browser(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    going = MadeUpRun(root / "going")
    going.train("bootstrap", 60)
    going.operate("surgery", 16)
    going.save()
    folders = [make_run(root / "run").folder, going.folder]
    report, unfinished, comparison = rebuild(folders, root / "comparison.html")
    return {"report": report, "unfinished": unfinished, "comparison": comparison}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "unfinished", "comparison"])
def test_a_page_opens_without_complaint_and_fits_narrow_and_wide(
    browser: Browser, pages: dict[str, Path], name: str, dark: bool
) -> None:
    browser.open(pages[name], width=420, dark=dark)
    browser.until(DRAWN)
    for width in (420, 1280, 420):
        browser.resize(width)
        browser.until("document.querySelector('#plot-loss .main-svg').clientWidth < innerWidth")
        browser.until(f"{OVERFLOW} === 0")
    assert browser.errors == []
    # It asks for itself, and for nothing that is not within it.
    assert browser.requests[0] == pages[name].resolve().as_uri()
    assert all(url.startswith("data:") for url in browser.requests[1:])


def test_figures_follow_the_colours_of_the_reader(browser: Browser, pages: dict[str, Path]) -> None:
    ink = "getComputedStyle(document.body).color"
    line = "document.getElementById('plot-loss').data[0].line.color"
    seen = []
    for dark in (False, True):
        browser.open(pages["report"], dark=dark)
        seen.append((browser.run(ink), browser.until(line)))
    assert seen[0][0] != seen[1][0]
    assert [colour for _, colour in seen] == ["#0b6a73", "#62c4cc"]
    # Also if they change while the page is open.
    scheme = {"name": "prefers-color-scheme", "value": "light"}
    browser.call("Emulation.setEmulatedMedia", features=[scheme])
    browser.until(f"{line} === '#0b6a73'")


def test_pointing_at_a_curve_tells_its_value(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"])
    browser.until(DRAWN)
    x, y = browser.middle("#plot-loss .nsewdrag")
    browser.mouse("move", x, y)
    browser.mouse("move", x + 3, y)
    told = browser.until("document.querySelector('#plot-loss .hoverlayer').textContent")
    assert re.search(r"\d\.\d+ at [\d.]+M tokens", told)


def test_dragging_zooms_and_a_double_click_comes_back(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["report"])
    browser.until(DRAWN)
    before = browser.run(RANGE)
    x, y = browser.middle("#plot-loss .nsewdrag")
    browser.mouse("move", x, y)
    browser.mouse("press", x, y)
    for step in range(1, 6):
        browser.mouse("move", x + 20 * step, y, button="left", buttons=1)
    browser.mouse("release", x + 100, y)
    browser.until(f"{RANGE}[0] > {before[0]}")
    zoomed = browser.run(RANGE)
    assert zoomed[1] < before[1]
    # What is hidden or shown meanwhile leaves the zoom as it is.
    browser.click("input[data-layer=phases]")
    browser.until(f"!{SHAPES}.includes('phases')")
    assert browser.run(RANGE) == zoomed
    x, y = browser.middle("#plot-loss .nsewdrag")
    for _ in range(20):  # on a busy machine two clicks may come too far apart to be a double one
        for count in (1, 2):
            browser.mouse("press", x, y, button="left", clickCount=count)
            browser.mouse("release", x, y, button="left", clickCount=count)
        time.sleep(0.5)
        if browser.run(RANGE) == before:
            break
    assert browser.run(RANGE) == before
    assert browser.errors == []


def test_layers_are_switched_off_and_on(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"])
    browser.until(DRAWN)
    for layer in ("phases", "references", "kept"):
        assert layer in browser.run(SHAPES)
        browser.click(f"input[data-layer={layer}]")
        browser.until(f"!{SHAPES}.includes('{layer}')")
        browser.click(f"input[data-layer={layer}]")
        browser.until(f"{SHAPES}.includes('{layer}')")
    assert browser.errors == []


def test_runs_of_a_comparison_are_switched_off_and_on(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["comparison"], width=420)
    browser.until(DRAWN)
    assert browser.run(TRACES) == ["run-0", "run-1"]
    browser.click("input[data-layer=run-0]")
    browser.until(f"JSON.stringify({TRACES}) === '[\"run-1\"]'")
    # In every figure, and with the keyboard too.
    browser.run("document.querySelector('input[data-layer=run-0]').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", text=" ")
    browser.until(f"{TRACES}.length === 2")
    assert browser.errors == []


def test_the_other_metrics_are_drawn_when_they_are_unfolded(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["report"])
    count = "document.querySelectorAll('.plot .main-svg').length"
    before = browser.until(count)
    browser.click("#curves details > summary")
    browser.until(f"{count} > {before}")
    assert browser.run("[...document.querySelectorAll('.plot')].every(p => p.clientWidth)") is True
    assert browser.errors == []


def test_links_of_a_comparison_lead_to_the_reports(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["comparison"])
    browser.click("#numbers a[href]")
    browser.until("document.title === 'What the surgeon was worth \u00b7 run'")


def test_the_page_of_a_run_that_goes_on_loads_the_newest_by_itself(
    browser: Browser, tmp_path: Path
) -> None:
    run = MadeUpRun(tmp_path)
    run.train("bootstrap", 20)
    run.save()
    browser.open(write_report(tmp_path, reload_seconds=1))
    browser.until("document.body.textContent.includes('update 20,')")
    run.train("bootstrap", 20)
    run.finish()
    write_report(tmp_path, reload_seconds=1)
    browser.until("document.body.textContent.includes('raised the score by 0.021')")
    browser.until("document.readyState === 'complete'")
    assert browser.run("document.querySelector('meta[http-equiv=refresh]')") is None
    assert browser.errors == []
