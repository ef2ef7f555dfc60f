"""Tests of avatarl_env/picture.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib as mpl
import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo
from gymnasium.wrappers.vector import RecordVideo as RecordVectorVideo

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.rendering.rgb_array import Panel, draw, lay_out
from avatarl_env.surgery import OPERATORS
from tests.fakes import fingerprint
from tests.patients import actions, global_random_states, tiny_env, tiny_vector_env


def picture(env: AttentionSurgeryEnv) -> np.ndarray:
    drawn = env.render()
    assert isinstance(drawn, np.ndarray)
    return drawn


def painted(image: np.ndarray, colour: str) -> float:
    """Return the share of pixels that are clearly red, or clearly blue."""
    red, blue = image[..., 0].astype(int), image[..., 2].astype(int)
    return float(np.mean(red - blue > 60 if colour == "red" else blue - red > 60))


# --- where coefficients stand --------------------------------------------------------------------


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


def test_tied_layers_are_one_row() -> None:
    sharpness, gain = lay_out(tiny_env().operator.labels, np.arange(4) / 10)
    assert parts(sharpness) == ("log-sharpness", "head", ["all"], ["0", "1"], [[0.0, 0.1]])
    assert gain.values.tolist() == [[0.2, 0.3]]


def test_layers_with_other_numbers_of_heads_leave_a_gap() -> None:
    labels = ["gain layer 0 head 0", "gain layer 0 head 1", "gain layer 1 head 0"]
    (panel,) = lay_out(labels, np.array([0.1, 0.2, 0.3]))
    assert panel.values[0].tolist() == [0.1, 0.2]
    assert panel.values[1, 0] == 0.3
    assert math.isnan(panel.values[1, 1])


def test_other_numbers_in_names_are_columns_too_and_the_rest_is_the_title() -> None:
    labels = [f"log-gain band {b} {p} layer all" for p in ("query", "output") for b in range(2)]
    query, output = lay_out(labels, np.arange(4) / 10)
    assert parts(query) == ("log-gain query", "band", ["all"], ["0", "1"], [[0.0, 0.1]])
    assert (output.title, output.values.tolist()) == ("log-gain output", [[0.2, 0.3]])
    (panel,) = lay_out(["cut query layer 0", "cut key layer 0"], np.array([0.1, 0.2]))
    assert parts(panel) == ("", "", ["0"], ["cut query", "cut key"], [[0.1, 0.2]])


@pytest.mark.parametrize(
    "labels",
    [
        [f"gain of blocks.{k}.attn" for k in range(7)],
        ["gain layer 0"] * 7,
        [f"{k} layer 0 head 0" for k in "abcdefg"],
    ],
)
def test_names_that_say_no_place_are_laid_out_in_reading_order(labels: list[str]) -> None:
    """Also where two say the same, or each wants a map of its own."""
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
def test_louder_is_red_softer_is_blue_and_untouched_white(options: dict[str, Any]) -> None:
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
    image, episode = picture(env), env._episode
    assert episode is not None
    episode.flatline = ""
    without = draw(episode, env.operator.labels)
    assert painted(image, "red") > painted(without, "red")


def test_a_thousand_coefficients_are_drawn_and_names_of_any_kind() -> None:
    env = tiny_env()
    env.reset(seed=0)
    episode = env._episode
    assert episode is not None
    for labels in (
        [f"gain layer {k // 32} head {k % 32}" for k in range(1024)],
        [f"$direction_{k} layer" for k in range(1000)],
        ["$\\frac{ layer all head 0", "x" * 100, ""],
        ["one"],
    ):
        episode.coefficients = np.linspace(-1, 1, len(labels))
        assert draw(episode, labels).shape == (400, 600, 3)


def test_drawing_changes_nothing() -> None:
    env, twin = tiny_env(render_mode="rgb_array"), tiny_env()
    for each in (env, twin):
        each.reset(seed=0)
    states, settings = global_random_states(), dict(mpl.rcParams)
    before = fingerprint(env.patient.model)
    picture(env)
    assert global_random_states() == states
    assert dict(mpl.rcParams) == settings
    assert fingerprint(env.patient.model) == before
    assert env.step(0.3 * actions(1)[0])[1] == twin.step(0.3 * actions(1)[0])[1]


def test_a_fork_and_a_state_draw_the_same_picture_of_their_own() -> None:
    env, other = tiny_env(render_mode="rgb_array"), tiny_env(render_mode="rgb_array")
    env.reset(seed=0)
    env.step(0.3 * actions(1)[0])
    env.step(0.3 * actions(1)[0])
    other.set_state(env.get_state())
    pictures = [picture(each) for each in (env, env.fork(), other)]
    for image in pictures[1:]:
        assert np.array_equal(image, pictures[0])
        assert not np.shares_memory(image, pictures[0])


def test_every_row_has_a_picture() -> None:
    env = tiny_vector_env(2, render_mode="rgb_array", autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(0.3 * actions(2))
    pictures = env.render()
    assert pictures is not None
    assert [image.shape for image in pictures] == [(400, 600, 3)] * 2
    assert (pictures[0] != pictures[1]).any()


# --- videos --------------------------------------------------------------------------------------


def test_a_video_is_written(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = RecordVideo(tiny_env(render_mode="rgb_array"), str(tmp_path / "video"), lambda _: True)
    env.reset(seed=0)
    for action in 0.3 * actions(4):
        env.step(action)
    env.close()
    (path,) = (tmp_path / "video").glob("*.mp4")
    assert path.stat().st_size > 1000


def test_a_video_of_the_rows_is_written(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = RecordVectorVideo(
        tiny_vector_env(2, render_mode="rgb_array", autoreset_mode="NextStep"),
        str(tmp_path / "video"),
        step_trigger=lambda step: step == 0,
        video_length=2,
    )
    env.reset(seed=0)
    for _ in range(3):
        env.step(0.3 * actions(2))
    env.close()
    (path,) = (tmp_path / "video").glob("*.mp4")
    assert path.stat().st_size > 1000


def test_frames_can_be_collected_by_gymnasium() -> None:
    env = gymnasium.make(
        "avatarl_env:AttentionSurgery-v0", n_prompts=2, n_new=4, render_mode="rgb_array_list"
    )
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape, np.float32))
    assert [frame.shape for frame in env.render()] == [(400, 600, 3)] * 2
