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
    ("value", "message"),
    [
        ("grafft", "operation must be one of ['graft', 'trim'], got 'grafft', did you mean 'graft'?"),
        ("TRIM", "operation must be one of ['graft', 'trim'], got 'TRIM'"),
        ("", "operation must be one of ['graft', 'trim'], got ''"),
        (None, "operation must be one of ['graft', 'trim'], got None"),
        (3, "operation must be one of ['graft', 'trim'], got 3"),
        (["trim"], "operation must be one of ['graft', 'trim'], got ['trim'], did you mean 'trim'?"),
    ],
)
def test_others_are_refused_in_one_line_that_names_the_closest(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choice("operation", value, ("trim", "graft"))
