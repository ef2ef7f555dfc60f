"""Tests of avatarl_env/rendering.py."""

from __future__ import annotations

import re

import numpy as np
import pytest

from avatarl_env.env import AttentionSurgeryEnv
from tests.patients import actions, tiny_env


@pytest.fixture
def env() -> AttentionSurgeryEnv:
    return tiny_env(render_mode="ansi")


def rendered(env: AttentionSurgeryEnv) -> str:
    text = env.render()
    assert type(text) is str
    return text


def section(text: str, title: str, end: str) -> str:
    """Return what stands between the first line `--- title` and the next that begins so."""
    return text.split(f"--- {title}\n", 1)[1].split(f"\n--- {end}", 1)[0]


def test_texts_before_and_after_are_shown_with_their_prompts(env: AttentionSurgeryEnv) -> None:
    env.reset(seed=1)
    env.step(actions(1)[0])
    text = rendered(env)
    episode, decode = env._episode, env.patient.tokenizer.decode
    assert episode is not None
    before, after = episode.baseline.generations, episode.present.generations
    assert before.tokens.tolist() != after.tokens.tolist()
    for row, title in enumerate(["prompt 1", "prompt 2", "prompt 3"]):
        shown = text.split(f"--- {title}\n")[1]
        assert shown.split("\n--- before")[0] == decode(before.tokens[row, :8])
        assert section(shown, "before", "after") == decode(before.tokens[row, 8:])
        assert section(shown, "after", "") == decode(after.tokens[row, 8:])
    assert "prompt 4" not in text


def test_nothing_differs_before_the_first_step(env: AttentionSurgeryEnv) -> None:
    env.reset(seed=1)
    text = rendered(env)
    assert text.startswith("step 0 of 4\n")
    assert section(text, "before", "after") == section(text, "after", "prompt 2")
    pairs = re.findall(r"(-?[\d.]+) -> +(-?[\d.]+)", text)
    assert len(pairs) == 6
    assert all(before == after for before, after in pairs)
    assert "return so far +0.0000" in text


def test_steps_terms_and_coefficients_are_shown(env: AttentionSurgeryEnv) -> None:
    env.reset(seed=1)
    env.step(np.array([1.0, -0.5, 0.0, 0.2], dtype=np.float32))
    *_, info = env.step(np.array([1.0, 0.0, 0.0, 0.0], dtype=np.float32))
    text = rendered(env)
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
    assert text.endswith("\n")


def test_scores_and_the_cause_of_death_are_shown() -> None:
    env = tiny_env(render_mode="ansi", operator_options={"scale": 300.0})
    _, start = env.reset(seed=1)
    assert f"--- score: baseline, then after each step\n{start['score']:9.4f}\n" in rendered(env)
    assert "flatline" not in rendered(env)
    *_, info = env.step(np.array([0.0, 0.0, 1.0, 1.0], dtype=np.float32))
    assert f"{start['score']:9.4f} {info['score']:9.4f}\n" in rendered(env)
    assert rendered(env).startswith(f"step 1 of 4\nflatline: {info['flatline']}\n")


def test_two_prompts_are_enough() -> None:
    env = tiny_env(render_mode="ansi", n_prompts=2)
    env.reset(seed=1)
    assert "--- prompt 2" in rendered(env)
    assert "--- prompt 3" not in rendered(env)


def test_rendering_changes_nothing(env: AttentionSurgeryEnv) -> None:
    env.reset(seed=1)
    assert rendered(env) == rendered(env)


def test_rendering_before_the_first_reset_is_refused(env: AttentionSurgeryEnv) -> None:
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.render()


def test_without_a_render_mode_there_is_nothing_but_a_warning() -> None:
    env = tiny_env()
    env.reset(seed=1)
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None


def test_unknown_render_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"render_mode must be None or .*'ansi'.*, got 'human'"):
        tiny_env(render_mode="human")
