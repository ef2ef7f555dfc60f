from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.report.diff import mark_changes

TEXTS = st.text(alphabet="ab, .\n<&\u00e9", max_size=40)


@pytest.mark.parametrize(
    ("before", "after", "marked", "changed"),
    [
        ("a b", "a b", ("a b", "a b"), 0.0),
        ("", "", ("", ""), 0.0),
        ("a b c", "a x c", ("a <del>b</del> c", "a <ins>x</ins> c"), 1 / 3),
        ("a", "a b", ("a", "a<ins> b</ins>"), 1 / 3),
        ("a b", "b", ("<del>a </del>b", "b"), 1 / 3),
        ("a!", "a?", ("a<del>!</del>", "a<ins>?</ins>"), 0.0),
        ("!", "?", ("<del>!</del>", "<ins>?</ins>"), 1.0),
        # A blank that both have between two changes is a part of the change.
        ("o a b o", "o x y o", ("o <del>a b</del> o", "o <ins>x y</ins> o"), 0.5),
        ("<b>", "<i>", ("&lt;<del>b</del>&gt;", "&lt;<ins>i</ins>&gt;"), 1.0),
    ],
)
def test_changes_are_marked_word_by_word(
    before: str, after: str, marked: tuple[str, str], changed: float
) -> None:
    made = mark_changes(before, after)
    assert made[:2] == marked
    assert made.changed == pytest.approx(changed)


@given(TEXTS, TEXTS)
def test_without_the_marks_the_texts_are_what_they_were(before: str, after: str) -> None:
    made = mark_changes(before, after)
    for marked, text in zip(made[:2], (before, after), strict=True):
        assert html.unescape(re.sub("</?(del|ins)>", "", marked)) == text
    assert 0.0 <= made.changed <= 1.0


@given(TEXTS, TEXTS)
def test_what_is_not_marked_is_the_same_on_both_sides(before: str, after: str) -> None:
    made = mark_changes(before, after)
    rests = [re.sub(r"<(del|ins)>.*?</\1>", "", side, flags=re.S) for side in made[:2]]
    assert rests[0] == rests[1]


def test_texts_too_long_to_compare_are_marked_as_a_whole() -> None:
    long = "a " * 1500
    made = mark_changes(long, long + "b")
    assert made.before == f"<del>{long}</del>"
    assert made.after == f"<ins>{long}b</ins>"
    assert mark_changes(long, long) == (long, long, 0.0)
