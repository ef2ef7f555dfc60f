from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import A2C
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from agents.surgeons.vec_env import SB3VecEnv
from tests.patients import actions
from tests.training_runs import ToyOperations, small_env

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SAME_STEP = AutoresetMode.SAME_STEP
gentle_env = functools.partial(small_env, operator_options={"scale": 0.05})
"""No operation flatlines."""


def adapt(env: Any) -> Any:
    return SB3VecEnv(env)


def side_by_side(make: Callable[[], gymnasium.Env[Any, Any]], **options: Any) -> Any:
    return SyncVectorEnv([make] * 2, **{"autoreset_mode": SAME_STEP, **options})


def pendulums(**options: Any) -> Any:
    make = functools.partial(gymnasium.make, "Pendulum-v1", max_episode_steps=3)
    return side_by_side(make, **options)


def chosen(n_steps: int, n_rows: int) -> np.ndarray:
    """Draw actions (n_steps, n_rows, 4)."""
    return actions(n_steps * n_rows).reshape(n_steps, n_rows, 4)


def test_stable_baselines_is_told_what_the_environment_said() -> None:
    adapter, env = adapt(gentle_env(n_rows=3)), gentle_env(n_rows=3)
    adapter.seed(5)
    found, (expected, _) = adapter.reset(), env.reset(seed=5)
    assert np.array_equal(found, expected)
    first = [info["baseline_terms"] for info in adapter.reset_infos]
    for step, action in enumerate(chosen(4, 3)):
        found, rewards, dones, infos = adapter.step(action)
        expected, paid, terminated, _, all_infos = env.step(action)
        assert np.array_equal(found, expected)
        assert rewards.dtype == np.float32
        assert rewards.tolist() == paid.astype(np.float32).tolist()
        assert dones.tolist() == terminated.tolist() == [step % 2 == 1] * 3
        for row, info in enumerate(infos):
            assert info["TimeLimit.truncated"] is False
            if dones.all():
                assert np.array_equal(info["terminal_observation"], all_infos["final_obs"][row])
                assert info["is_success"] is (info["improvement"] > 0)
                assert info["coefficients"].any()
                assert not adapter.reset_infos[row]["coefficients"].any()
            if step == 1:
                assert info["baseline_terms"] == first[row]
                assert adapter.reset_infos[row]["baseline_terms"] != first[row]


def test_infos_are_plain_values_of_one_row() -> None:
    adapter = adapt(small_env())
    adapter.seed(0)
    adapter.reset()
    *_, (left, right) = adapter.step(np.full((2, 4), 0.1, np.float32))
    before = right["coefficients"].tolist()
    json.dumps({**left, "coefficients": left["coefficients"].tolist()})
    left["coefficients"][:] = 9.0
    left["score_terms"].clear()
    assert right["coefficients"].tolist() == before
    assert right["score_terms"]


def test_a_flatline_is_told_by_its_row_only() -> None:
    toys = ToyOperations(1.0, 1.0, n_rows=2)
    toys.envs[1].rewards = (-1.0,)
    toys.envs[1].flatline = "entropy"
    adapter = adapt(toys)
    adapter.reset()
    _, rewards, dones, infos = adapter.step(np.zeros((2, 2), np.float32))
    assert rewards.tolist() == [1.0, -1.0]
    assert dones.tolist() == [False, True]
    assert [info["flatline"] for info in infos] == ["", "entropy"]


@pytest.mark.parametrize(
    ("limit", "episode_length", "expected"),
    [(None, 2, False), (3, 4, True), (2, 2, False)],
    ids=["the end", "time is up", "both at once"],
)
def test_only_a_time_limit_before_the_end_is_a_truncation(
    limit: int | None, episode_length: int, expected: bool
) -> None:
    adapter = adapt(gentle_env(episode_length=episode_length, max_episode_steps=limit))
    adapter.reset()
    for step, action in enumerate(chosen(limit or episode_length, 2), start=1):
        _, _, dones, infos = adapter.step(action)
        assert dones.tolist() == [step == (limit or episode_length)] * 2
    assert [info["TimeLimit.truncated"] for info in infos] == [expected] * 2


def test_seeds_count_up_by_row_and_are_used_up_by_one_reset() -> None:
    adapter, env = adapt(small_env()), small_env()
    assert list(adapter.seed(40)) == [40, 41]
    found = [adapter.reset(), adapter.reset()]
    expected = [env.reset(seed=40)[0], env.reset()[0]]
    assert np.array_equal(found, expected)
    assert not np.array_equal(*found)
    np.testing.assert_allclose(found[0][1], small_env(n_rows=1).reset(seed=41)[0][0], atol=1e-5)


def test_attributes_methods_and_images_are_those_of_the_environment() -> None:
    env = small_env(n_rows=3, render_mode="rgb_array")
    adapter = adapt(env)
    assert adapter.get_attr("render_mode") == ["rgb_array"] * 3
    assert adapter.get_attr("patient", indices=[0, 2]) == [env.patient] * 2
    assert adapter.get_attr("patient", indices=1) == [env.patient]
    assert adapter.has_attr("operator")
    assert not adapter.has_attr("no_such_thing")
    adapter.set_attr("nickname", "Tom")
    assert adapter.get_attr("nickname") == ["Tom"] * 3
    assert adapter.env_method("model_changed", indices=[0, 1]) == [None, None]
    assert env.patient.n_changes == 1  # once, not for each row
    assert adapter.env_is_wrapped(TimeLimit, indices=0) == [False]
    assert adapter.num_envs == 3
    assert adapter.action_space == env.single_action_space
    assert adapter.observation_space == env.single_observation_space
    adapter.reset()
    assert np.array_equal(adapter.get_images(), env.render())
    adapter.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(adapt(small_env()).get_images()) == [None] * 2


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED, None])
def test_other_autoreset_modes_are_switched_or_refused(mode: AutoresetMode | None) -> None:
    if mode is None:
        other: VectorEnv[Any, Any, Any] = VectorEnv()
        other.metadata = {}
    else:
        env = small_env(autoreset_mode=mode)
        assert adapt(env).env.autoreset_mode is SAME_STEP
        assert env.metadata["autoreset_mode"] is SAME_STEP
        other = pendulums(autoreset_mode=mode)
    with pytest.raises(ValueError, match=rf"autoreset_mode must be SAME_STEP .*{mode}"):
        adapt(other)


def test_monitor_normalisation_and_evaluation_work_on_it() -> None:
    monitored = VecMonitor(adapt(gentle_env()), info_keywords=("is_success",))
    venv: Any = VecNormalize(monitored, gamma=1.0)
    venv.seed(0)
    venv.reset()
    total = np.zeros(2)
    for action in chosen(2, 2):
        _, _, dones, infos = venv.step(action)
        total += venv.get_original_reward()
    assert dones.all()
    for row, info in enumerate(infos):
        assert info["episode"]["r"] == pytest.approx(total[row])
        assert (info["episode"]["l"], info["episode"]["is_success"]) == (2, info["is_success"])
        assert np.abs(info["terminal_observation"]).max() <= 10
    model = A2C("MlpPolicy", monitored, n_steps=8, seed=0, device="cpu")
    model.learn(32)
    returns = [entry["r"] for entry in model.ep_info_buffer or ()]
    assert len(returns) == 2 * 16 / 2
    assert list(model.ep_success_buffer or ()) == [total > 0 for total in returns]
    returns, lengths = evaluate_policy(
        model, monitored, n_eval_episodes=3, return_episode_rewards=True
    )
    assert lengths == [2, 2, 2]


def test_a_time_limit_of_another_environment_is_a_truncation() -> None:
    adapter = adapt(RecordEpisodeStatistics(pendulums()))
    adapter.reset()
    for _ in range(3):
        _, _, dones, infos = adapter.step(np.zeros((2, 1), np.float32))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [True] * 2
