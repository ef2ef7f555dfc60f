from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC

from agents.surgeons.algorithms import ALGORITHMS, GAMMA, settings_of
from agents.surgeons.sb3 import SB3Surgeon
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.training_runs import (
    CE,
    QUICK_SAC,
    ToyOperations,
    first_actions,
    make_learner,
    same,
    small_env,
)


def toys(*rewards: float, n_rows: int = 1) -> Any:
    return ToyOperations(*rewards, n_rows=n_rows)


def sac(env: Any, seed: int = 0, **options: Any) -> SB3Surgeon:
    return SB3Surgeon("sac", env, seed, **{**QUICK_SAC, **options})


def weights(surgeon: SB3Surgeon) -> list[torch.Tensor]:
    return [p.detach().clone() for p in surgeon.model.policy.parameters()]


def buffer_of(surgeon: SB3Surgeon) -> Any:
    return surgeon.model.replay_buffer  # type: ignore[attr-defined]


# Settings.


def settings(
    name: str, *, n_rows: int = 3, episode_length: int = 2, **options: Any
) -> dict[str, Any]:
    return settings_of(name, toys(*[0.1] * episode_length, n_rows=n_rows), options)


def test_settings_are_the_tables_then_those_of_the_caller() -> None:
    ppo = settings("ppo")
    assert (ppo["n_steps"], ppo["batch_size"]) == (2, 6)  # one operation on every row
    assert settings("ppo", batch_size=3)["batch_size"] == 3
    assert settings("ars")["n_eval_episodes"] == 3
    assert "n_steps" not in settings("sac")
    for name in set(ALGORITHMS) - {"ars"}:
        assert settings(name)["gamma"] == GAMMA == 1.0
    own = {"net_arch": [8]}
    settings("sac", policy_kwargs=own)["policy_kwargs"]["net_arch"].append(9)
    settings("sac")["policy_kwargs"]["net_arch"].append(9)
    assert own == {"net_arch": [8]}
    assert settings("sac")["policy_kwargs"]["net_arch"] == [128, 128]


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
        ("td3", "action_noise", None),
    ],
)
def test_an_option_that_fits_is_taken_as_it_is(name: str, option: str, value: Any) -> None:
    assert settings(name, **{option: value})[option] == value


def test_options_may_come_from_json() -> None:
    assert settings("sac", train_freq=[2, "step"])["train_freq"] == (2, "step")
    noise = settings("td3", action_noise=0.25)["action_noise"]
    drawn = np.stack([noise() for _ in range(4000)])
    assert drawn.shape == (4000, 2)
    np.testing.assert_allclose(drawn.std(0), 0.25, atol=0.02)
    again = settings("td3", action_noise=noise)["action_noise"]
    assert repr(again) == repr(noise)


@pytest.mark.parametrize("name", ["ppo", "trpo", "a2c", "recurrent_ppo"])
def test_a_rollout_of_one_transition_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*rows times steps must be at least 2.*1"):
        settings(name, n_rows=1, episode_length=1)
    assert settings(name, n_rows=2, episode_length=1)["n_steps"] == 1


# Learning.


def test_learning_starts_after_the_warm_up_and_changes_the_networks() -> None:
    surgeon = sac(toys(0.1, 0.2, n_rows=2), learning_starts=4, gradient_steps=3)
    before = weights(surgeon)
    surgeon.operate(1)  # two steps of two rows: not more than learning_starts
    assert surgeon.stats() == {"surgeon/replay_buffer_size": 4.0}
    assert same(weights(surgeon), before)
    surgeon.operate(1)
    stats = surgeon.stats()
    assert stats["surgeon/n_updates"] == 6  # three after each step on all rows
    assert stats.keys() >= {"surgeon/actor_loss", "surgeon/critic_loss"}
    assert not any(map(torch.equal, before, weights(surgeon)))


def test_transitions_are_stored_as_they_were_and_unfinished_operations_end_with_the_round() -> None:
    env = toys(0.25, -3.0, n_rows=2)
    env.envs[1].rewards = (-1.0, 8.0, 16.0)
    surgeon = sac(env, gradient_steps=0)
    assert [record.total for record in surgeon.operate(1)] == [-2.75]
    assert [record.total for record in surgeon.operate(2)] == [-2.75, 23.0, -2.75]
    assert surgeon.operate(0) == []
    buffer = buffer_of(surgeon)
    assert buffer.pos == 6  # as many steps in every round, whatever ends when
    assert buffer.rewards[:6].T.tolist() == [[0.25, -3.0] * 3, [-1.0, 8.0, -1.0, 8.0, 16.0, -1.0]]
    assert buffer.dones[:6, 0].tolist() == [0.0, 1.0] * 3
    # The last observation of an operation is its own, not the first of the next.
    assert buffer.observations[:6, 0, 0].tolist() == [0.0, 1.0] * 3
    assert buffer.next_observations[:6, 0, 0] == pytest.approx([1.0, 2.0] * 3, abs=1e-6)


def improve(env: AttentionSurgeryVectorEnv) -> None:
    """Train the language model for a while."""
    patient = env.patient
    learner = make_learner(patient.model, patient.splits["train"], learning_rate=1e-2, **CE)
    for _ in range(5):
        learner.update()


HAIR = 1e-6  # a step so small that its effect is not seen, but evaluated all the same


def still(surgeon: SB3Surgeon, monkeypatch: pytest.MonkeyPatch, effort: float) -> None:
    """Let the surgeon take next to no action."""
    actions = np.full((surgeon.model.n_envs, 4), effort, np.float32)
    surgeon.model.learning_starts = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(surgeon.model, "predict", lambda *_, **__: (actions, None))


@pytest.mark.parametrize(("effort", "tolerance"), [(0.0, 0.0), (HAIR, 1e-4)])
def test_the_models_own_progress_is_never_paid_to_the_surgeon(
    effort: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = small_env()
    surgeon = sac(env)
    still(surgeon, monkeypatch, effort)
    baselines = []
    for _ in range(2):
        records = surgeon.operate(2)
        assert all(abs(record.total) <= tolerance for record in records)
        baselines.append(records[0].baseline_terms["heldout_loss"])
        improve(env)
        env.model_changed()
    assert baselines[0] > baselines[1] + 0.05  # the model did learn in between
    assert (abs(buffer_of(surgeon).rewards[:8]) <= tolerance).all()


def bandit(*, truncates: bool, **options: Any) -> float:
    """Return what the critics expect of a task that pays 1 once and ends."""
    env: Any = ToyOperations(1.0, truncates=truncates)
    fast = {"learning_rate": 1e-2, "gradient_steps": 20, "ent_coef": 1e-3, "tau": 0.1}
    surgeon = sac(env, **{**fast, "policy_kwargs": {"net_arch": [16]}, **options})
    normalised: Any = surgeon.model.get_vec_normalize_env()
    normalised.norm_reward = False  # so that values are in the units of the reward
    surgeon.operate(11)  # the first three warm up
    observation = torch.as_tensor(normalised.normalize_obs(np.zeros((1, 3), np.float32)))
    actions = torch.linspace(-0.8, 0.8, 5).repeat_interleave(2).view(5, 2)
    with torch.no_grad():
        critics = surgeon.model.critic(observation.expand(5, -1), actions)  # type: ignore[attr-defined]
    return float(torch.cat(critics).mean())


def test_a_finite_task_is_worth_what_it_pays_and_a_time_limit_would_look_worth_more() -> None:
    assert bandit(truncates=False) == pytest.approx(1.0, abs=0.1)
    assert bandit(truncates=True, gamma=0.99) > 2.5


@pytest.mark.slow
def test_an_easy_operation_is_learned() -> None:
    class Aim(ToyOperations):
        """Pays each step by how close the action is to (0.5, -0.5)."""

        def step(self, actions: np.ndarray) -> Any:
            for env, action in zip(self.envs, actions, strict=True):
                env.rewards = (-float(np.square(action - [0.5, -0.5]).sum()),) * 2
            return super().step(actions)

    fast = {"learning_rate": 1e-2, "gradient_steps": 10, "learning_starts": 20, "batch_size": 64}
    surgeon = sac(Aim(0.0, 0.0, n_rows=2), **fast, policy_kwargs={"net_arch": [32]})
    surgeon.operate(25)
    actions = first_actions(surgeon, np.array([[0.0] * 3, [1.0] * 3], np.float32))
    np.testing.assert_allclose(actions, [[0.5, -0.5]] * 2, atol=0.25)


def test_a_recurrent_policy_remembers_until_the_next_operation_begins() -> None:
    surgeon = SB3Surgeon("recurrent_ppo", toys(0.1, 0.2, n_rows=2), 0)
    observations = np.ones((2, 3), np.float32)
    first = first_actions(surgeon, observations)
    second = surgeon.act(observations, np.array([True, False]))
    assert second[0].tolist() == first[0].tolist()
    assert second[1].tolist() != first[1].tolist()
    assert first_actions(surgeon, observations).tolist() == first.tolist()


# Saving and loading.


def saved(name: str, n_rows: int, folder: Path, **options: Any) -> SB3Surgeon:
    """Return a surgeon that was saved after two operations on every row."""
    surgeon = SB3Surgeon(name, toys(0.1, 0.2, 0.3, n_rows=n_rows), 3, **options)
    surgeon.operate(2)
    surgeon.save(folder)
    return surgeon


def test_the_zip_is_one_that_the_library_reads(tmp_path: Path) -> None:
    env = small_env()
    surgeon = sac(env)
    surgeon.operate(2)
    surgeon.save(tmp_path)
    loaded = SAC.load(tmp_path / "surgeon.zip", device="cpu")
    scales = json.loads((tmp_path / "surgeon_normalisation.json").read_text(encoding="utf-8"))
    n_observed = (1 + 2 * 2) * 2  # the first and one after each step, of two rows
    assert scales["count"] == pytest.approx(n_observed, abs=1e-3)
    observations, _ = env.reset(seed=9)
    normalised = (observations - scales["mean"]) / np.sqrt(np.array(scales["var"]) + 1e-8)
    actions, _ = loaded.predict(np.clip(normalised, -10, 10).astype(np.float32), deterministic=True)
    assert actions.tolist() == first_actions(surgeon, observations).tolist()


@pytest.mark.parametrize("name", ["sac", "ppo", "ars"])
def test_what_was_saved_can_be_loaded_onto_another_number_of_rows(
    name: str, tmp_path: Path
) -> None:
    options = QUICK_SAC if name == "sac" else {}
    surgeon = saved(name, 3, tmp_path, **options)
    for n_rows in (2, 5):
        env = toys(0.1, 0.2, 0.3, n_rows=n_rows)
        loaded, fresh = (SB3Surgeon(name, env, 3, **options) for _ in range(2))
        loaded.load(tmp_path)
        for setting in ("n_envs", "batch_size", "n_steps", "n_eval_episodes"):
            assert getattr(loaded.model, setting, 0) == getattr(fresh.model, setting, 0)
        observations = np.ones((2, 3), np.float32)
        expected = first_actions(surgeon, observations).tolist()
        assert first_actions(loaded, observations).tolist() == expected
        before = weights(loaded)
        loaded.operate(2)
        # ARS learns nothing where all attempts are paid the same.
        assert same(before, weights(loaded)) == (name == "ars")


def test_a_loaded_surgeon_collects_before_it_learns_on(tmp_path: Path) -> None:
    options = {**QUICK_SAC, "learning_starts": 8}
    surgeon = saved("sac", 2, tmp_path, **options)
    for n_done in (12, 24):
        loaded = SB3Surgeon("sac", toys(0.1, 0.2, 0.3, n_rows=2), 3, **options)
        loaded.load(tmp_path)
        assert loaded.stats() == {}  # past transitions are forgotten
        assert loaded.model.num_timesteps == n_done
        before = weights(loaded)
        assert same(before, weights(surgeon))
        loaded.operate(1)
        assert same(before, weights(loaded))  # six steps are too few
        loaded.operate(1)
        assert not same(before, weights(loaded))
        assert loaded.stats()["surgeon/replay_buffer_size"] == 12.0
        loaded.save(tmp_path)
        surgeon = loaded
