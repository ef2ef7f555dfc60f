"""A real run beside a real run of supervised training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from agents.cli.main import avatarl, main
from agents.training.curriculum import CurriculumConfig
from tests.agents.report.browser import find_browser, opened
from tests.agents.report.pages import Page
from tests.training_runs import flags, small_config, write_text

pytestmark = pytest.mark.slow

CONTROL = ("--grpo.estimator", "ce", "--grpo.exploration", "all_actions", "--surgeon", "none")


class Pages(NamedTuple):
    run: Path
    control: Path
    comparison: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Train both by the command line, and lay them side by side."""
    root = tmp_path_factory.mktemp("runs")
    text = write_text(root)
    short = CurriculumConfig(
        bootstrap_updates=30,
        surgery_rounds=2,
        joint_rounds=1,
        updates_per_round=2,
        n_rows=3,
        paired_prompts=4,
        evaluate_every=10,
    )
    for name, more in (("paid", ()), ("shown", CONTROL)):
        words = flags(small_config(text, root / name, curriculum=short))
        assert main([*words, *more]) == 0
    comparison = root / "comparison.html"
    folders = [str(root / name) for name in ("paid", "shown")]
    assert avatarl(["report", *folders, "--out", str(comparison)]) == 0
    return Pages(root / "paid" / "report.html", root / "shown" / "report.html", comparison)


def test_the_control_is_marked_and_beside_the_run_on_its_page(pages: Pages) -> None:
    page = Page(pages.run)
    assert "The supervised control is the run shown, whose model was shown the right" in page.text
    assert '<th scope="row">supervised control</th>' in page.html
    assert "The broken curve is the supervised control." in page.text
    for key in ("accuracy", "loss", "entropy"):
        (curve,) = (t for t in page.figures[key]["data"] if t.get("meta") == "control")
        assert curve["line"]["dash"] == "dash"
    control = Page(pages.control)
    assert "so this is not reinforcement learning" in control.text
    assert '<th scope="row">supervised control</th>' not in control.html


def test_the_control_is_marked_and_beside_the_run_on_the_page_of_both(pages: Pages) -> None:
    page = Page(pages.comparison)
    assert "shown supervised control" in page.text
    assert "paid supervised control" not in page.text
    row = '<th scope="row">grpo.estimator</th><td>proper_maxrl</td><td>ce</td>'
    assert row in page.html
    styles = [trace["line"].get("dash", "solid") for trace in page.figures["loss"]["data"]]
    assert styles == ["solid", "dash"]


@pytest.mark.skipif(find_browser() is None, reason="needs a browser")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [420, 1280])
def test_a_reader_sees_the_control_and_can_hide_it(pages: Pages, width: int, dark: bool) -> None:
    traces = "document.getElementById('plot-loss').data.map(trace => trace.meta ?? '')"
    places = ((pages.run, "control"), (pages.comparison, "run-1"))
    with opened() as browser:
        for path, layer in places:
            browser.open(path, width=width, dark=dark)
            browser.until("document.querySelectorAll('.plot .main-svg').length > 0")
            assert layer in browser.run(traces)
            label = browser.run(
                f"document.querySelector('input[data-layer={layer}]').parentElement.textContent"
            )
            assert "supervised control" in label
            browser.click(f"input[data-layer={layer}]")
            browser.until(f"!{traces}.includes('{layer}')")
            assert browser.errors == []
            # The caption of a table stays within the page, however far the table reaches.
            ends = "[...document.querySelectorAll('.scroll caption span')]"
            ends = browser.run(f"{ends}.map(span => span.getBoundingClientRect().right)")
            assert ends
            assert max(ends) <= width
