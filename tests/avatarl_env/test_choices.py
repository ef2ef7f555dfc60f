"""Tests of avatarl_env/choices.py."""

from __future__ import annotations

import re

import pytest

from avatarl_env.choices import check_choice


def test_known_names_pass() -> None:
    for name in ("trim", "graft"):
        check_choice("operation", name, ("graft", "trim"))
    check_choice("operation", "trim", {"trim": 1})
    check_choice("operation", "trim", (name for name in ["trim"]))


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ("grafft", "got 'grafft', did you mean 'graft'?"),
        ("TRIM", "got 'TRIM'"),
        ("", "got ''"),
        (None, "got None"),
        (3, "got 3"),
        (["trim"], "got ['trim'], did you mean 'trim'?"),
    ],
)
def test_others_are_refused_in_one_line_that_names_the_closest(value: str, end: str) -> None:
    message = re.escape(f"operation must be one of ['graft', 'trim'], {end}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_choice("operation", value, ("trim", "graft"))
