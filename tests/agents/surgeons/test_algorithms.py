from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agents.surgeons.algorithms import ALGORITHMS, GAMMA, settings_of
from agents.surgeons.sb3 import SB3Surgeon
from tests.training_runs import QUICK_SAC, ToyOperations


def settings(
    name: str, *, n_rows: int = 3, episode_length: int = 2, **options: Any
) -> dict[str, Any]:
    env: Any = ToyOperations(*[0.1] * episode_length, n_rows=n_rows)
    return settings_of(name, env, options)


def test_a_rollout_is_one_operation_on_every_row() -> None:
    ppo = settings("ppo")
    assert (ppo["n_steps"], ppo["batch_size"]) == (2, 6)
    assert settings("ars")["n_eval_episodes"] == 3
    assert "n_steps" not in settings("sac")
    assert settings("ppo", batch_size=3)["batch_size"] == 3


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"ars"}))
def test_nothing_is_discounted(name: str) -> None:
    assert settings(name)["gamma"] == GAMMA == 1.0


def test_what_is_returned_is_nobody_elses() -> None:
    own = {"net_arch": [8]}
    settings("sac", policy_kwargs=own)["policy_kwargs"]["net_arch"].append(9)
    settings("sac")["policy_kwargs"]["net_arch"].append(9)
    assert own == {"net_arch": [8]}
    assert settings("sac")["policy_kwargs"]["net_arch"] == [128, 128]


def test_what_json_made_a_list_is_a_tuple_again() -> None:
    assert settings("sac", train_freq=[2, "step"])["train_freq"] == (2, "step")
    env: Any = ToyOperations(0.1, 0.2)
    surgeon = SB3Surgeon("sac", env, 0, **{**QUICK_SAC, "train_freq": [1, "step"]})
    assert len(surgeon.operate(2)) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sac", {"learning_rate": "abc"}, "sac option learning_rate must be float or .*'abc'"),
        (
            "sac",
            {"learning_rate": float("nan")},
            "sac option .* must be finite, got nan",
        ),
        ("sac", {"learning_rate": -1}, "sac option learning_rate must be at least 0, got -1"),
        ("sac", {"learning_rate": None}, "sac option learning_rate must be float or .*None"),
        ("sac", {"gradient_steps": 1.5}, "sac option gradient_steps must be int, got 1.5"),
        ("sac", {"gradient_steps": True}, "sac option gradient_steps must be int, got True"),
        ("sac", {"use_sde": 1}, "sac option use_sde must be bool, got 1"),
        ("sac", {"batch_size": 0}, "sac option batch_size must be at least 2, got 0"),
        ("sac", {"action_noise": "abc"}, "sac option action_noise must be ActionNoise or .*'abc'"),
        ("sac", {"action_noise": True}, "action_noise must be a finite number .*, got True"),
        ("td3", {"action_noise": -1}, "action_noise must be a finite number from 0 on, got -1"),
        ("td3", {"action_noise": float("inf")}, "action_noise must be a finite number .*, got inf"),
        ("ppo", {"batch_size": 1}, "ppo option batch_size must be at least 2, got 1"),
        ("ppo", {"clip_range_vf": "x"}, "ppo option clip_range_vf must be .*, got 'x'"),
        ("ars", {"n_delta": 0}, "ars option n_delta must be at least 1, got 0"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        settings(name, **options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sac", "learning_rate", 1),
        ("sac", "learning_rate", lambda left: 1e-3 * left),
        ("sac", "ent_coef", "auto_0.5"),
        ("sac", "ent_coef", 0.1),
        ("sac", "gradient_steps", -1),
        ("sac", "train_freq", 2),
        ("ppo", "target_kl", None),
        ("ars", "n_top", None),
        ("ars", "alive_bonus_offset", 0.5),
    ],
)
def test_an_option_that_fits_is_taken_as_it_is(name: str, option: str, value: Any) -> None:
    assert settings(name, **{option: value})[option] == value


def test_noise_may_be_none_or_a_number_or_of_the_library() -> None:
    assert settings("td3", action_noise=None)["action_noise"] is None
    noise = settings("td3", action_noise=0)["action_noise"]
    assert noise().tolist() == [0.0, 0.0]
    again = settings("td3", action_noise=noise)["action_noise"]
    assert np.array_equal(again._sigma, noise._sigma)


@pytest.mark.parametrize("name", ["ppo", "trpo", "a2c", "recurrent_ppo"])
def test_one_step_cannot_be_compared_with_others(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} .*: rows times steps must be at least 2"):
        settings(name, n_rows=1, episode_length=1)
    assert settings(name, n_rows=2, episode_length=1)["n_steps"] == 1
    more = {"n_steps": 4} if name == "a2c" else {"n_steps": 4, "batch_size": 4}
    assert settings(name, n_rows=1, episode_length=1, **more)["n_steps"] == 4
