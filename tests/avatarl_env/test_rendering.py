"""Tests of avatarl_env/rendering: an operation as text and as a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.rendering.rgb_array import Panel, draw, lay_out
from avatarl_env.surgery import OPERATORS
from tests.fakes import fingerprint
from tests.patients import actions, tiny_env, tiny_vector_env


def picture(env: AttentionSurgeryEnv) -> np.ndarray:
    drawn = env.render()
    assert isinstance(drawn, np.ndarray)
    return drawn


def painted(image: np.ndarray, colour: str) -> float:
    """Return the share of pixels that are clearly red, or clearly blue."""
    red, blue = image[..., 0].astype(int), image[..., 2].astype(int)
    return float(np.mean(red - blue > 60 if colour == "red" else blue - red > 60))


# --- layout of coefficients ----------------------------------------------------------------------


def parts(panel: Panel) -> tuple[Any, ...]:
    return panel.title, panel.unit, panel.rows, panel.columns, panel.values.tolist()


def test_layers_are_rows_and_heads_are_columns() -> None:
    labels = tiny_env(operator_options={"tied": False}).operator.labels
    sharpness, gain = lay_out(labels, np.arange(8) / 10)
    assert parts(sharpness) == (
        "log-sharpness",
        "head",
        ["0", "1"],
        ["0", "1"],
        [[0.0, 0.1], [0.4, 0.5]],
    )
    assert gain.title == "log-value-gain"
    assert gain.values.tolist() == [[0.2, 0.3], [0.6, 0.7]]


@pytest.mark.parametrize(
    "labels",
    [
        [f"gain of blocks.{k}.attn" for k in range(7)],
        ["gain layer 0"] * 7,
        [f"{k} layer 0 head 0" for k in "abcdefg"],
    ],
)
def test_labels_without_a_position_are_laid_out_in_reading_order(labels: list[str]) -> None:
    """Also where labels repeat, or each would need a panel of its own."""
    (panel,) = lay_out(labels, np.arange(7) / 10)
    assert panel.columns == ["0", "1", "2", "3", "4"]
    assert panel.rows == ["0 +", "5 +"]
    assert panel.values[0].tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert panel.values[1, :2].tolist() == [0.5, 0.6]
    assert np.isnan(panel.values[1, 2:]).all()


# --- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_drawn(operator: str) -> None:
    env = tiny_env(operator=operator, render_mode="rgb_array", n_prompts=2)
    env.reset(seed=0)
    first = picture(env)
    assert (first.shape, first.dtype) == ((400, 600, 3), np.uint8)
    env.step(actions(1, *env.action_space.shape)[0])
    second = picture(env)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("options", [{}, {"tied": False}])
def test_positive_coefficients_are_red_negative_blue_and_zero_white(
    options: dict[str, Any],
) -> None:
    env = tiny_env(render_mode="rgb_array", operator_options=options, step_size=1.0)
    env.reset(seed=0)
    # The colour bar and the score's line have a little of both.
    assert max(painted(picture(env), colour) for colour in ("red", "blue")) < 0.01
    for sign, colour, other in ((0.9, "red", "blue"), (-0.9, "blue", "red")):
        env.reset(seed=0)
        env.step(np.full(env.action_space.shape, sign, dtype=np.float32))
        image = picture(env)
        assert painted(image, colour) > 0.08
        assert painted(image, other) < 0.02


def test_a_flatline_is_marked() -> None:
    env = tiny_env(render_mode="rgb_array", operator_options={"scale": 300.0}, flatline_penalty=0.5)
    env.reset(seed=0)
    *_, info = env.step(np.array([0, 0, 0.001, 1], dtype=np.float32))
    assert info["flatline"]
    image, episode = picture(env), env.get_state()["episode"]
    episode.flatline = ""
    without = draw(episode, env.operator.labels)
    assert painted(image, "red") > painted(without, "red")


def test_drawing_changes_nothing() -> None:
    env, twin = tiny_env(render_mode="rgb_array"), tiny_env()
    for each in (env, twin):
        each.reset(seed=0)
    settings = dict(mpl.rcParams)
    before = fingerprint(env.patient.model)
    picture(env)
    assert dict(mpl.rcParams) == settings
    assert fingerprint(env.patient.model) == before
    assert env.step(0.3 * actions(1)[0])[1] == twin.step(0.3 * actions(1)[0])[1]


# --- videos --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_video_is_written(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = RecordVideo(tiny_env(render_mode="rgb_array"), str(tmp_path / "video"), lambda _: True)
    env.reset(seed=0)
    for action in 0.3 * actions(4):
        env.step(action)
    env.close()
    (path,) = (tmp_path / "video").glob("*.mp4")
    assert path.stat().st_size > 1000


# --- as text --------------------------------------------------------------------------------------


def section(text: str, title: str, end: str) -> str:
    """Return the text between the first line `--- title` and the next line `--- end`."""
    return text.split(f"--- {title}\n", 1)[1].split(f"\n--- {end}", 1)[0]


def test_texts_before_and_after_are_shown_with_their_prompts() -> None:
    env = tiny_env(render_mode="ansi")
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.render()
    env.reset(seed=1)
    text = str(env.render())
    assert text.startswith("step 0 of 4\n")
    assert section(text, "before", "after") == section(text, "after", "prompt 2")
    env.step(actions(1)[0])
    text = str(env.render())
    assert text == env.render()
    episode, decode = env.get_state()["episode"], env.patient.tokenizer.decode
    before, after = episode.baseline.generations, episode.present.generations
    assert before.tokens.tolist() != after.tokens.tolist()
    for row, title in enumerate(["prompt 1", "prompt 2", "prompt 3"]):
        shown = text.split(f"--- {title}\n")[1]
        assert shown.split("\n--- before")[0] == decode(before.tokens[row, :8])
        assert section(shown, "before", "after") == decode(before.tokens[row, 8:])
        assert section(shown, "after", "") == decode(after.tokens[row, 8:])
    assert "prompt 4" not in text


def test_steps_terms_and_coefficients_are_shown() -> None:
    env = tiny_env(render_mode="ansi")
    env.reset(seed=1)
    env.step(np.array([1.0, -0.5, 0.0, 0.2], dtype=np.float32))
    *_, info = env.step(np.array([1.0, 0.0, 0.0, 0.0], dtype=np.float32))
    text = str(env.render())
    assert text.startswith("step 2 of 4\n")
    assert f"return so far {info['improvement']:+.4f}" in text
    for name, value in info["score_terms"].items():
        before = info["baseline_terms"][name]
        assert re.search(rf"\b{name} +{before:.4f} -> +{re.escape(f'{value:.4f}')}\n", text)
    bars = [line.split(" head ")[1] for line in text.splitlines() if " head " in line]
    assert bars == [
        "0 +1.000           |##########",
        "1 -0.250         ##|          ",
        "0 +0.000           |          ",
        "1 +0.100           |#         ",
    ]
    assert text.count("log-sharpness layer all head") == 2


@pytest.mark.parametrize("make", [tiny_env, tiny_vector_env])
def test_without_a_render_mode_there_is_only_a_warning(make: Any) -> None:
    env = make()
    env.reset(seed=1)
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None


def test_each_row_is_rendered() -> None:
    env = tiny_vector_env(2, render_mode="ansi", autoreset_mode="Disabled")
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.render()
    env.reset(seed=0)
    first, second = env.render() or ("", "")
    assert first != second
    single = tiny_env(render_mode="ansi")
    single.reset(seed=1)
    assert second == single.render()
