"""Tests of avatarl_env/choices.py."""

from __future__ import annotations

import re
from typing import Any

import gymnasium
import pytest

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.errors import check_choice, check_keywords, keywords_of, takes_any_keyword
from tests.patients import store_tiny_patient, tiny_env, tiny_patient, tiny_vector_env


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


# --- keywords -------------------------------------------------------------------------------------


class Maker:
    def __init__(self, first: int, *rest: int, second: int = 2, **more: int) -> None:
        """Take something of every kind."""


def test_keywords_are_those_that_have_a_name() -> None:
    assert keywords_of(Maker) == ["first", "second"]
    assert takes_any_keyword(Maker)
    assert not takes_any_keyword(check_keywords)


def test_what_any_of_the_makers_takes_is_known() -> None:
    check_keywords("keyword", ["first", "given"], Maker, check_keywords)
    with pytest.raises(ValueError, match=r"^keyword must be one of \['argument', 'first', 'given'"):
        check_keywords("keyword", ["third"], Maker, check_keywords)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("injurry", "injury"), ("n_prompt", "n_prompts"), ("rendermode", "render_mode")],
)
def test_a_misspelt_keyword_of_either_environment_is_told_with_the_closest(
    misspelt: str, meant: str
) -> None:
    rule = rf"^keyword must be one of \[.*'corpus'.*\], .* '{misspelt}', did you mean '{meant}'\?$"
    for make in (tiny_env, tiny_vector_env):
        with pytest.raises(ValueError, match=rule):
            make(patient=tiny_patient(), **{misspelt: 1})


def test_the_vector_environment_knows_keywords_of_its_own() -> None:
    for misspelt, meant in (("num_env", "num_envs"), ("autoreset", "autoreset_mode")):
        with pytest.raises(ValueError, match=rf" argument '{misspelt}', did you mean '{meant}'\?"):
            tiny_vector_env(**{misspelt: 1})


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_gymnasium_shows_the_line(make: Any, tmp_path: Any) -> None:
    folder = store_tiny_patient(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"argument 'n_pompts', did you mean 'n_prompts'\?"
    ) as caught:
        make("avatarl_env:AttentionSurgery-v0", lm=folder, n_pompts=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "misspelt", "hint"),
    [
        ("head_gain", "scal", ", did you mean 'scale'?"),
        ("spectral_bands", "bands", ", did you mean 'n_bands'?"),
        ("head_gain", "targets", ""),
        ("output_temperature", "tied", ""),
    ],
)
def test_a_misspelt_option_of_an_operator_is_told_with_the_closest(
    operator: str, misspelt: str, hint: str
) -> None:
    rule = f"^operator_options of '{operator}' must be one of .*'scale'.* '{misspelt}'{hint}"
    for make in (tiny_env, tiny_vector_env):
        with pytest.raises(ValueError, match=rule.replace("?", r"\?")) as caught:
            make(operator=operator, operator_options={misspelt: 1})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_code_that_goes_by_pythons_own_error_finds_it(make: Any, tmp_path: Any) -> None:
    """TorchRL offers every environment a `frameskip`, and takes it back on this."""
    folder = store_tiny_patient(tmp_path / "model")
    with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'"):
        make("avatarl_env:AttentionSurgery-v0", lm=folder, frameskip=1)


def test_what_the_environments_refuse_is_no_keyword_of_theirs() -> None:
    with pytest.raises(ValueError, match="keyword must be one of") as caught:
        AttentionSurgeryEnv(tiny_patient(), nonsense=1)
    assert "'unknown'" not in str(caught.value)
    assert "'self'" not in str(caught.value)
