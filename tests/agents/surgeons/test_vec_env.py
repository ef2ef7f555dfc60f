from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize, VecVideoRecorder
from stable_baselines3.common.vec_env.base_vec_env import tile_images

from agents.surgeons.vec_env import SB3VecEnv
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import actions, tiny_patient
from tests.training_runs import (
    ToyOperation,
    ToyOperations,
    small_env,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SAME_STEP = AutoresetMode.SAME_STEP


def adapt(env: VectorEnv[Any, Any, Any]) -> Any:
    return SB3VecEnv(env)


def side_by_side(n_rows: int, make: Callable[[], gymnasium.Env[Any, Any]], **options: Any) -> Any:
    return SyncVectorEnv([make] * n_rows, **{"autoreset_mode": SAME_STEP, **options})


def pendulums(n_rows: int = 2, **options: Any) -> Any:
    make = functools.partial(gymnasium.make, "Pendulum-v1", max_episode_steps=3)
    return side_by_side(n_rows, make, **options)


def twin(n_rows: int = 3, **options: Any) -> tuple[Any, AttentionSurgeryVectorEnv]:
    """Return an adapter, and the environment in it again, on a patient of its own."""
    return adapt(small_env(n_rows=n_rows, **options)), small_env(n_rows=n_rows, **options)


def chosen(n_steps: int, n_rows: int) -> np.ndarray:
    """Draw actions (n_steps, n_rows, 4)."""
    return actions(n_steps * n_rows).reshape(n_steps, n_rows, 4)


# What Stable-Baselines3 is told is what the environment said.


@pytest.mark.usefixtures("immortal")
def test_observations_rewards_and_ends_are_those_of_the_environment() -> None:
    adapter, env = twin()
    adapter.seed(5)
    found, (expected, _) = adapter.reset(), env.reset(seed=5)
    assert np.array_equal(found, expected)
    for step, action in enumerate(chosen(5, 3)):
        found, rewards, dones, infos = adapter.step(action)
        expected, paid, terminated, _, all_infos = env.step(action)
        assert np.array_equal(found, expected)
        assert rewards.dtype == np.float32
        assert rewards.tolist() == paid.astype(np.float32).tolist()
        assert dones.tolist() == terminated.tolist() == [step % 2 == 1] * 3
        assert len(infos) == 3
        if dones.all():
            for row, info in enumerate(infos):
                assert np.array_equal(info["terminal_observation"], all_infos["final_obs"][row])
                assert not np.array_equal(info["terminal_observation"], found[row])


@pytest.mark.usefixtures("immortal")
def test_the_terminal_observation_is_the_true_last_one() -> None:
    # What a single environment, which starts nothing by itself, shows at the end.
    adapter = adapt(small_env(n_rows=1))
    single = small_env(n_rows=1, autoreset_mode=AutoresetMode.DISABLED)
    adapter.seed(2)
    adapter.reset()
    single.reset(seed=2)
    for action in chosen(2, 1):
        _, _, dones, infos = adapter.step(action)
        last, *_ = single.step(action)
    assert dones.all()
    assert np.array_equal(infos[0]["terminal_observation"], last[0])
    assert last[0, -1] == 0.0  # no time left


@pytest.mark.usefixtures("immortal")
def test_an_operation_done_is_told_with_all_of_its_info_and_the_next_ones_apart() -> None:
    adapter, _ = twin(n_rows=2)
    adapter.seed(0)
    adapter.reset()
    assert [info["improvement"] for info in adapter.reset_infos] == [0.0, 0.0]
    first = [info["baseline_terms"] for info in adapter.reset_infos]
    for action in chosen(2, 2):
        _, _, _, infos = adapter.step(action)
    for row, info in enumerate(infos):
        assert info.keys() == {
            "score",
            "improvement",
            "score_terms",
            "baseline_terms",
            "coefficients",
            "flatline",
            "is_success",
            "lost_score",
            "terminal_observation",
            "TimeLimit.truncated",
        }
        assert info["baseline_terms"] == first[row]
        assert info["is_success"] is (info["improvement"] > 0)
        assert info["coefficients"].any()
        assert adapter.reset_infos[row]["improvement"] == 0.0
        assert not adapter.reset_infos[row]["coefficients"].any()
        assert adapter.reset_infos[row]["baseline_terms"] != first[row]


def test_infos_are_plain_values_and_nobody_elses() -> None:
    adapter, _ = twin(n_rows=2)
    adapter.seed(0)
    adapter.reset()
    _, _, _, infos = adapter.step(np.full((2, 4), 0.1, np.float32))
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False]
    for info in infos:
        assert type(info["score"]) is type(info["improvement"]) is float
        assert all(type(value) is float for value in info["score_terms"].values())
        json.dumps({**info, "coefficients": info["coefficients"].tolist()})
    left, right = infos
    before = right["coefficients"].tolist()
    left["coefficients"][:] = 9.0
    left["score_terms"].clear()
    assert right["coefficients"].tolist() == before
    assert right["score_terms"]
    _, _, _, later = adapter.step(np.zeros((2, 4), np.float32))
    assert later[0]["coefficients"].tolist() == before


def test_what_a_patient_died_of_is_told_by_its_row_only() -> None:
    toys = ToyOperations(1.0, 1.0, n_rows=2)
    toys.envs[1].rewards = (-1.0,)
    toys.envs[1].flatline = "entropy"
    adapter = adapt(toys)
    adapter.reset()
    _, rewards, dones, infos = adapter.step(np.zeros((2, 2), np.float32))
    assert rewards.tolist() == [1.0, -1.0]
    assert dones.tolist() == [False, True]
    assert infos[1]["flatline"] == "entropy"
    assert infos[0]["flatline"] == ""


@pytest.mark.parametrize(
    ("limit", "episode_length", "expected"),
    [(None, 2, False), (3, 4, True), (2, 2, False)],
    ids=["the end", "time is up", "both at once"],
)
@pytest.mark.usefixtures("immortal")
def test_only_time_that_was_up_before_the_end_is_a_truncation(
    limit: int | None, episode_length: int, expected: bool
) -> None:
    env = small_env(episode_length=episode_length, max_episode_steps=limit)
    adapter = adapt(env)
    adapter.seed(0)
    adapter.reset()
    for step, action in enumerate(chosen(limit or episode_length, 2), start=1):
        _, _, dones, infos = adapter.step(action)
        assert dones.tolist() == [step == (limit or episode_length)] * 2
    assert [info["TimeLimit.truncated"] for info in infos] == [expected] * 2


# Seeds, options and attributes.


def test_row_i_is_seeded_as_the_only_row_of_seed_and_i_would_be() -> None:
    adapter = adapt(small_env(n_rows=3))
    assert list(adapter.seed(40)) == [40, 41, 42]
    found = adapter.reset()
    for row in range(3):
        expected, _ = small_env(n_rows=1).reset(seed=40 + row)
        np.testing.assert_allclose(found[row], expected[0], atol=1e-5)


def test_seeds_are_used_up_by_one_reset() -> None:
    adapter, env = twin(n_rows=2)
    adapter.seed(3)
    first, second = adapter.reset(), adapter.reset()
    assert not np.array_equal(first, second)
    expected = [env.reset(seed=3)[0], env.reset()[0]]
    assert np.array_equal(first, expected[0])
    assert np.array_equal(second, expected[1])
    adapter.seed(3)
    assert np.array_equal(adapter.reset(), first)


def test_options_reach_the_environment_once() -> None:
    asked: list[dict[str, Any] | None] = []

    class Asked(ToyOperation):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            asked.append(options)
            return super().reset(seed=seed, options=options)

    adapter = adapt(side_by_side(2, functools.partial(Asked, 1.0)))
    adapter.set_options({"depth": 3})
    adapter.reset()
    adapter.reset()
    assert asked == [{"depth": 3}, {"depth": 3}, None, None]
    adapter.set_options([{"depth": 3}, {"depth": 4}])
    with pytest.raises(ValueError, match=r"^options must be the same for all rows, got "):
        adapter.reset()


def test_attributes_and_methods_are_those_of_the_environment() -> None:
    env = small_env(n_rows=3, render_mode="ansi")
    adapter = adapt(env)
    assert adapter.render_mode == "ansi"
    assert adapter.get_attr("render_mode") == ["ansi"] * 3
    assert adapter.get_attr("patient", indices=[0, 2]) == [env.patient] * 2
    assert adapter.get_attr("patient", indices=1) == [env.patient]
    assert adapter.has_attr("operator")
    assert not adapter.has_attr("no_such_thing")
    adapter.set_attr("nickname", "Tom")
    assert adapter.get_attr("nickname") == ["Tom"] * 3
    assert env.patient.n_changes == 0
    assert adapter.env_method("model_changed", indices=[0, 1]) == [None, None]
    assert env.patient.n_changes == 1  # once, not for each row
    assert adapter.env_is_wrapped(Monitor) == [False] * 3
    assert adapter.env_is_wrapped(TimeLimit, indices=0) == [False]
    assert list(adapter.get_images()) == [None] * 3
    assert adapter.num_envs == 3
    assert adapter.action_space == env.single_action_space
    assert adapter.observation_space == env.single_observation_space
    adapter.close()


def test_its_video_shows_the_pictures_of_all_rows(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    env = small_env(n_rows=2, render_mode="rgb_array")
    adapter = adapt(env)
    video: Any = VecVideoRecorder(adapter, str(tmp_path), lambda _: True, video_length=9)
    video.reset()
    video.step(np.full((2, 4), 0.1, np.float32))
    pictures: Any = env.render()
    assert not np.array_equal(*pictures)
    assert np.array_equal(adapter.get_images(), pictures)
    assert len(video.recorded_frames) == 2  # of the beginning, and after the step
    assert np.array_equal(video.recorded_frames[-1], tile_images(pictures))
    video.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


def test_an_environment_without_a_render_mode_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert adapt(small_env()).render_mode is None
    assert caught == []


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_ways_of_beginning_anew_are_switched_off_or_refused(mode: AutoresetMode) -> None:
    env = small_env(autoreset_mode=mode)
    wrapped = RecordEpisodeStatistics(small_env(autoreset_mode=mode))
    assert adapt(env).env.autoreset_mode is SAME_STEP
    assert env.metadata["autoreset_mode"] is SAME_STEP
    for other in (pendulums(autoreset_mode=mode), wrapped):  # would be told too late
        with pytest.raises(
            ValueError,
            match=r"^autoreset_mode must be SAME_STEP for Stable-Baselines3, got AutoresetMode.*: "
            'make the environment with autoreset_mode="SameStep"$',
        ):
            adapt(other)


def test_an_environment_that_does_not_say_how_it_begins_anew_is_refused() -> None:
    env: VectorEnv[Any, Any, Any] = VectorEnv()
    env.metadata = {}
    with pytest.raises(ValueError, match=r"autoreset_mode must be SAME_STEP .*, got None"):
        adapt(env)
    native = gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point")
    with pytest.raises(ValueError, match=r"autoreset_mode must be SAME_STEP .*NEXT_STEP"):
        adapt(native)


# What Stable-Baselines3 builds on it.


@pytest.mark.usefixtures("immortal")
def test_its_monitor_and_its_normalisation_work_on_it() -> None:
    monitored = VecMonitor(adapt(small_env()), info_keywords=("is_success",))
    venv: Any = VecNormalize(monitored, gamma=1.0)
    venv.seed(0)
    assert venv.reset().shape == (2, *venv.observation_space.shape)
    total = np.zeros(2)
    for action in chosen(2, 2):
        observations, _, dones, infos = venv.step(action)
        total += venv.get_original_reward()
    assert dones.all()
    for row, info in enumerate(infos):
        assert info["episode"]["r"] == pytest.approx(total[row])
        assert info["episode"]["l"] == 2
        assert info["episode"]["is_success"] is info["is_success"]
        assert np.abs(info["terminal_observation"]).max() <= 10
    assert observations.std() > 0.1


@pytest.mark.usefixtures("immortal")
def test_its_success_rate_is_over_operations_and_not_over_steps() -> None:
    env = VecMonitor(adapt(small_env(n_rows=3)))
    model = A2C("MlpPolicy", env, n_steps=8, seed=0, device="cpu")
    model.learn(24)
    returns = [entry["r"] for entry in model.ep_info_buffer or ()]
    assert len(returns) == 3 * 8 / 2
    assert {total > 0 for total in returns} == {False, True}
    assert list(model.ep_success_buffer or ()) == [total > 0 for total in returns]


@pytest.mark.usefixtures("immortal")
def test_its_evaluation_counts_whole_operations() -> None:
    env = VecMonitor(adapt(small_env(n_rows=2)))
    model = A2C("MlpPolicy", env, seed=0, device="cpu")
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=3, return_episode_rewards=True)
    assert lengths == [2, 2, 2]
    assert np.isfinite(returns).all()


ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "sac": (SAC, {"learning_starts": 3, "batch_size": 4}),
    "td3": (TD3, {"learning_starts": 3, "batch_size": 4}),
    "ppo": (PPO, {"n_steps": 4, "batch_size": 4, "n_epochs": 1}),
    "a2c": (A2C, {"n_steps": 4}),
}


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_its_algorithms_learn_on_it_and_can_be_stored(
    name: str, n_rows: int, tmp_path: Path
) -> None:
    kind, options = ALGORITHMS[name]
    env: Any = VecMonitor(adapt(small_env(n_rows=n_rows)))
    policy = {"net_arch": [8]}
    model = kind("MlpPolicy", env, seed=1, device="cpu", policy_kwargs=policy, **options)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(8 * n_rows)
    assert model.num_timesteps == 8 * n_rows
    assert not all(map(torch.equal, before, model.policy.parameters()))
    assert len(model.ep_info_buffer or ()) >= n_rows
    observations = env.reset()
    expected, _ = model.predict(observations, deterministic=True)
    model.save(tmp_path / "model.zip")
    loaded = kind.load(tmp_path / "model.zip", env=env, device="cpu")
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    loaded.learn(4 * n_rows)


def test_two_trainings_of_a_seed_are_equal() -> None:
    def train() -> list[torch.Tensor]:
        model = PPO("MlpPolicy", adapt(small_env()), n_steps=4, batch_size=4, seed=9)
        model.learn(8)
        return [*model.policy.parameters()]

    assert all(map(torch.equal, train(), train()))


# Other environments.


@pytest.mark.parametrize("name", ["sac", "ppo"])
def test_pendulums_swing_on_it(name: str) -> None:
    kind, options = ALGORITHMS[name]
    model = kind("MlpPolicy", VecMonitor(adapt(pendulums())), device="cpu", **options)
    model.learn(16)
    assert [entry["l"] for entry in model.ep_info_buffer or ()] == [3] * 4


def test_a_pendulum_is_cut_off_by_its_time_limit() -> None:
    adapter = adapt(pendulums())
    adapter.seed(1)
    adapter.reset()
    flags = []
    for _ in range(3):
        observations, _, dones, infos = adapter.step(np.zeros((2, 1), np.float32))
        flags.append([dones.tolist(), [info["TimeLimit.truncated"] for info in infos]])
    assert flags == [[[False] * 2] * 2] * 2 + [[[True] * 2] * 2]
    assert not np.array_equal(infos[0]["terminal_observation"], observations[0])


def test_discrete_actions_and_single_seeds_will_do() -> None:
    make = functools.partial(gymnasium.make, "CartPole-v1", max_episode_steps=3)
    env = RecordEpisodeStatistics(side_by_side(2, make))  # which knows of one seed only
    adapter = adapt(env)
    adapter.seed(7)
    found = adapter.reset()
    assert np.array_equal(found[1], gymnasium.make("CartPole-v1").reset(seed=8)[0])
    model = PPO("MlpPolicy", adapter, n_steps=8, batch_size=8, device="cpu")
    model.learn(16)


class Rooms(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """Counts its steps in an observation of two parts."""

    def __init__(self) -> None:
        part = Box(0.0, 9.0, (1,), np.float32)
        self.observation_space: Any = Dict({"near": part, "far": part})
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.count = 0

    def _observe(self) -> dict[str, np.ndarray]:
        count = np.array([self.count], np.float32)
        return {"near": count, "far": 2 * count}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Any:
        self.count += 1
        return self._observe(), 1.0, self.count == 2, False, {}


def test_observations_of_several_parts_will_do() -> None:
    adapter = adapt(side_by_side(2, Rooms))
    first = adapter.reset()
    assert isinstance(first, dict)
    assert first["near"].tolist() == [[0.0], [0.0]]
    for _ in range(2):
        observations, _, _, infos = adapter.step(np.zeros((2, 1), np.float32))
    assert isinstance(observations, dict)
    assert observations["far"].tolist() == [[0.0], [0.0]]
    assert infos[1]["terminal_observation"]["far"].tolist() == [4.0]
    PPO("MultiInputPolicy", adapter, n_steps=4, batch_size=4, device="cpu").learn(8)


def test_an_environment_that_writes_into_its_own_arrays_does_no_harm() -> None:
    adapter = adapt(side_by_side(2, functools.partial(ToyOperation, 1.0, 2.0), copy=False))
    first = adapter.reset()
    second, rewards, _, _ = adapter.step(np.zeros((2, 2), np.float32))
    adapter.step(np.zeros((2, 2), np.float32))
    assert isinstance(first, np.ndarray)
    assert first.tolist() == [[0.0] * 3] * 2
    assert isinstance(second, np.ndarray)
    assert second.tolist() == [[1.0] * 3] * 2
    assert rewards.tolist() == [1.0, 1.0]


def test_the_patient_is_the_same_afterwards() -> None:
    patient = tiny_patient()
    before = [p.detach().clone() for p in patient.model.parameters()]
    model = PPO("MlpPolicy", adapt(small_env(patient)), n_steps=4, batch_size=4, device="cpu")
    model.learn(8)
    assert all(map(torch.equal, before, patient.model.parameters()))
