"""The building blocks of the pages: agents/report/html.py."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.report.html import bars, duration, interval, mark_changes, number, percent, signed

TEXTS = st.text(alphabet="ab, .\n<&\u00e9", max_size=40)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(1.23456), "1.235"),
        (number(-0.5, 1), "\u22120.5"),
        (percent(0.4387), "43.9\u202f%"),
        (signed(0.021), "+0.0210"),
        (signed(-0.021), "\u22120.0210"),
        (signed(0.0), "0.0000"),
        (interval({"mean": 0.5, "low": -0.25, "high": 1.25}), "+0.5000 [\u22120.2500, 1.2500]"),
        (interval({"mean": 0.5, "low": None, "high": None}), "+0.5000 [\u2013, \u2013]"),
        (duration(3.21), "3.2 s"),
        (duration(228.4), "3 min 48 s"),
        (duration(7325.0), "2 h 2 min"),
    ],
)
def test_numbers_are_formatted(written: str, expected: str) -> None:
    assert written == expected
    assert interval(None) == percent(None) == signed(None) == "\u2013"


def test_bars_are_as_long_as_their_numbers_and_the_own_one_stands_out() -> None:
    made = bars("Loss", [("bigram", 2.0, "two", False), ("run", 0.5, "half", True)])
    assert '<tr><th scope="row">bigram</th><td><span style="width:100.0%"></span></td>' in made
    assert 'class="own"><th scope="row">run</th><td><span style="width:25.0%">' in made
    assert "width:0.0%" in bars("Accuracy", [("run", None, "none", True)])


@pytest.mark.parametrize(
    ("before", "after", "marked", "changed"),
    [
        ("a b", "a b", ("a b", "a b"), 0.0),
        ("", "", ("", ""), 0.0),
        ("a b c", "a x c", ("a <del>b </del>c", "a <ins>x </ins>c"), 1 / 3),
        ("a b", "b", ("<del>a </del>b", "b"), 1 / 3),
        ("o a b o", "o x y o", ("o <del>a b </del>o", "o <ins>x y </ins>o"), 0.5),
        ("<b>", "<i>", ("<del>&lt;b&gt;</del>", "<ins>&lt;i&gt;</ins>"), 1.0),
    ],
)
def test_changed_words_are_marked(
    before: str, after: str, marked: tuple[str, str], changed: float
) -> None:
    *texts, share = mark_changes(before, after)
    assert tuple(texts) == marked
    assert share == pytest.approx(changed)


@given(TEXTS, TEXTS)
def test_marks_add_nothing_and_what_is_unmarked_is_the_same(before: str, after: str) -> None:
    *sides, share = mark_changes(before, after)
    for marked, text in zip(sides, (before, after), strict=True):
        assert html.unescape(re.sub("</?(del|ins)>", "", str(marked))) == text
    first, second = (re.sub(r"<(del|ins)>.*?</\1>", "", str(s), flags=re.DOTALL) for s in sides)
    assert first == second
    assert 0.0 <= share <= 1.0
