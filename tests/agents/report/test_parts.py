from __future__ import annotations

import pytest

from agents.report.parts import (
    Html,
    bars,
    duration,
    escape,
    figure,
    interval,
    number,
    paragraph,
    percent,
    settings,
    signed,
    table,
    tile,
)

HOSTILE = "</script><b title='x' id=\"y\">&"
SAFE = "&lt;/script&gt;&lt;b title=&#x27;x&#x27; id=&quot;y&quot;&gt;&amp;"


@pytest.mark.parametrize(
    "made",
    [
        escape(HOSTILE),
        paragraph(HOSTILE),
        table(HOSTILE, [HOSTILE], [(HOSTILE, HOSTILE)]),
        settings(HOSTILE, {HOSTILE: {HOSTILE: HOSTILE}}),
        bars(HOSTILE, [(HOSTILE, 1.0, HOSTILE)], HOSTILE),
        tile(HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        figure(HOSTILE, HOSTILE, HOSTILE, HOSTILE),
    ],
)
def test_text_is_escaped_wherever_it_goes_in(made: Html) -> None:
    assert SAFE in made
    assert HOSTILE not in made
    assert "<b" not in made.replace("<body", "").replace("<br", "")


def test_markup_goes_in_as_it_is() -> None:
    assert paragraph(Html("<em>yes</em>"), "note") == '<p class="note"><em>yes</em></p>'
    assert "<td><em>x</em></td>" in table("t", ["a", "b"], [("row", Html("<em>x</em>"))])


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
        (duration(59.99), "60.0 s"),
        (duration(228.4), "3 min 48 s"),
        (duration(7325.0), "2 h 2 min"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected


def test_a_missing_number_is_a_dash() -> None:
    assert number(None) == percent(None) == signed(None) == "\u2013"


def test_settings_are_flattened() -> None:
    made = settings("Settings", {"grpo": {"adam": {"beta": 0.9}}, "out": None})
    assert '<th scope="row">grpo.adam.beta</th><td>0.9</td>' in made
    assert '<th scope="row">out</th><td>\u2013</td>' in made


def test_bars_are_as_long_as_their_numbers_and_the_own_one_stands_out() -> None:
    made = bars("Loss", [("bigram", 2.0, "two"), ("this model", 0.5, "half")], "this model")
    assert '<tr><th scope="row">bigram</th><td><span style="width:100.0%"></span></td>' in made
    assert 'class="own"><th scope="row">this model</th><td><span style="width:25.0%">' in made


def test_bars_of_nothing_have_no_length() -> None:
    assert "width:0.0%" in bars("Accuracy", [("this model", 0.0, "0")], "this model")
