from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC

from agents.surgeons.sb3 import ALGORITHMS, SB3Surgeon
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import global_random_states, tiny_patient
from tests.training_runs import (
    CE,
    QUICK_SAC,
    ToyOperations,
    first_actions,
    make_learner,
    small_env,
)


def sac(env: Any, seed: int = 0, **options: Any) -> SB3Surgeon:
    return SB3Surgeon("sac", env, seed, **{**QUICK_SAC, **options})


def actor(surgeon: SB3Surgeon) -> list[torch.Tensor]:
    return [p.detach().clone() for p in surgeon.model.policy.parameters()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def n_updates(surgeon: SB3Surgeon) -> int:
    return surgeon.model._n_updates


def test_learning_begins_after_the_warm_up_and_changes_the_networks() -> None:
    surgeon = sac(ToyOperations(0.1, 0.2, n_rows=2), learning_starts=4, gradient_steps=3)
    before = actor(surgeon)
    surgeon.operate(1)  # two steps of two rows: not more than learning_starts
    assert n_updates(surgeon) == 0
    assert surgeon.stats() == {"surgeon/replay_buffer_size": 4.0}
    assert equal(actor(surgeon), before)
    surgeon.operate(1)
    assert n_updates(surgeon) == 6  # three after each step on all rows
    changed = [not torch.equal(a, b) for a, b in zip(before, actor(surgeon), strict=True)]
    assert all(changed)
    stats = surgeon.stats()
    assert stats.keys() >= {"surgeon/actor_loss", "surgeon/critic_loss", "surgeon/n_updates"}
    assert np.isfinite(list(stats.values())).all()


def test_every_round_has_as_many_steps_whatever_dies() -> None:
    toys = ToyOperations(0.5, 0.5, 0.5, n_rows=2)
    surgeon = sac(toys)
    assert [record.length for record in surgeon.operate(2)] == [3] * 4
    toys.envs[1].rewards = (-1.0,)  # from now on this patient dies at once
    assert [record.length for record in surgeon.operate(1)] == [1, 1, 3, 1]
    assert surgeon.operate(0) == []
    assert surgeon.model.num_timesteps == (3 * 2 + 3 + 0) * 2


def test_what_was_unfinished_is_learned_from_but_never_paid_in_another_round() -> None:
    toys = ToyOperations(1.0, 2.0, n_rows=2)
    toys.envs[1].rewards = (-1.0, 8.0, 16.0)
    surgeon = sac(toys, gradient_steps=0)
    assert [record.total for record in surgeon.operate(1)] == [3.0]
    assert [record.total for record in surgeon.operate(2)] == [3.0, 23.0, 3.0]
    buffer = surgeon.model.replay_buffer
    assert buffer is not None
    assert buffer.rewards[:6, 1].tolist() == [-1.0, 8.0, -1.0, 8.0, 16.0, -1.0]


def test_transitions_are_stored_as_they_were() -> None:
    surgeon = sac(ToyOperations(0.25, -3.0, n_rows=2), gradient_steps=0)
    surgeon.operate(2)
    buffer = surgeon.model.replay_buffer
    assert buffer is not None
    for row in range(2):
        assert buffer.rewards[:4, row].tolist() == [0.25, -3.0, 0.25, -3.0]
        assert buffer.dones[:4, row].tolist() == [0.0, 1.0, 0.0, 1.0]
        # The last observation of an operation is its own, not the first of the next.
        assert buffer.observations[:4, row, 0].tolist() == [0.0, 1.0, 0.0, 1.0]
        assert buffer.next_observations[:4, row, 0] == pytest.approx([1.0, 2.0] * 2, abs=1e-6)


def improve(env: AttentionSurgeryVectorEnv) -> None:
    """Train the model on the table for a while."""
    patient = env.patient
    learner = make_learner(patient.model, patient.splits["train"], learning_rate=1e-2, **CE)
    for _ in range(5):
        learner.update()


HAIR = 1e-6  # a step so small that what it does is not seen, but evaluated all the same


def still(surgeon: SB3Surgeon, monkeypatch: pytest.MonkeyPatch, effort: float = 0.0) -> None:
    """Let the surgeon hold its hands still, or nearly, and learn all the same."""
    shape = (surgeon.model.n_envs, *(surgeon.model.action_space.shape or ()))
    actions = np.full(shape, effort, np.float32)
    surgeon.model.learning_starts = 0
    monkeypatch.setattr(surgeon.model, "predict", lambda *_, **__: (actions, None))


@pytest.mark.parametrize(("effort", "tolerance"), [(0.0, 0.0), (HAIR, 1e-4)])
def test_the_models_own_progress_is_never_paid_to_the_surgeon(
    effort: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = small_env()
    surgeon = sac(env)
    still(surgeon, monkeypatch, effort)
    baselines = []
    for _ in range(3):
        records = surgeon.operate(2)
        assert all(abs(record.total) <= tolerance for record in records)
        assert len(records) == 4
        baselines.append(records[0].baseline_terms["heldout_loss"])
        improve(env)
        env.model_changed()
    assert baselines[0] > baselines[1] + 0.05  # the model did learn in between
    buffer = surgeon.model.replay_buffer
    assert buffer is not None
    assert (abs(buffer.rewards[: buffer.pos]) <= tolerance).all()
    assert buffer.pos == 12


def test_going_on_from_the_last_observation_would_pay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_env(n_rows=1)
    surgeon = sac(env)
    still(surgeon, monkeypatch, HAIR)
    surgeon.operate(1)
    improve(env)
    # What learn() does by itself, where nobody says that the model changed:
    surgeon.model.learn(2, reset_num_timesteps=False)
    (record,) = surgeon._recorder.collect()
    assert abs(record.total) > 1e-3
    # Where somebody does, the environment refuses.
    env.model_changed()
    with pytest.raises(RuntimeError, match="the model changed during the operation"):
        surgeon.model.learn(1, reset_num_timesteps=False)


def test_two_runs_of_a_seed_are_equal_whatever_others_draw_in_between() -> None:
    def run(foreign: int) -> tuple[list[torch.Tensor], list[list[float]]]:
        torch.manual_seed(foreign)
        np.random.seed(foreign)  # noqa: NPY002
        surgeon = sac(small_env(), seed=4)
        records = []
        for _ in range(2):
            torch.rand(foreign)
            np.random.rand(foreign)  # noqa: NPY002
            records += surgeon.operate(1)
        return actor(surgeon), [[r.total, *r.coefficients] for r in records]

    weights, records = run(1)
    weights_again, records_again = run(7)
    assert equal(weights, weights_again)
    assert records == records_again


def test_another_seed_is_another_surgeon() -> None:
    left, right = (sac(small_env(), seed=seed) for seed in (0, 1))
    assert not equal(actor(left), actor(right))
    mine, yours = left.operate(1), right.operate(1)
    for one in mine:
        for other in yours:
            assert one.coefficients.tolist() != other.coefficients.tolist()
            assert one.baseline_terms != other.baseline_terms


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    before = global_random_states()
    surgeon = sac(ToyOperations(0.1, 0.2, n_rows=2))
    surgeon.operate(2)
    assert n_updates(surgeon) > 0
    first_actions(surgeon, np.zeros((1, 3), np.float32))
    surgeon.stats()
    surgeon.save(tmp_path)
    assert global_random_states() == before


def test_a_broken_off_round_gives_the_generators_back_and_can_be_followed_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toys = ToyOperations(0.1, 0.2)
    surgeon = sac(toys)
    before = global_random_states()
    with monkeypatch.context() as patch:
        patch.setattr(toys.envs[0], "rewards", ())
        with pytest.raises(IndexError):
            surgeon.operate(1)
    assert global_random_states() == before
    assert [record.total for record in surgeon.operate(2)] == pytest.approx([0.3, 0.3])


def test_acting_is_deterministic_and_teaches_nothing() -> None:
    surgeon = sac(ToyOperations(0.1, 0.2, n_rows=2))
    surgeon.operate(2)
    rms: Any = surgeon._env.obs_rms
    weights, mean = actor(surgeon), rms.mean.copy()
    observations = np.array([[0.3, -2.0, 7.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], np.float32)
    seen = observations.copy()
    actions = first_actions(surgeon, observations)
    assert actions.tolist() == first_actions(surgeon, observations).tolist()
    assert equal(actor(surgeon), weights)
    assert rms.mean.tolist() == mean.tolist()
    assert observations.tolist() == seen.tolist()


def value(surgeon: SB3Surgeon) -> float:
    """Return what the critics expect of the first observation, averaged over actions."""
    observation = surgeon._env.normalize_obs(np.zeros((1, 3), np.float32))
    actions = torch.linspace(-0.8, 0.8, 5).repeat_interleave(2).view(5, 2)
    with torch.no_grad():
        rows = torch.as_tensor(observation).expand(5, -1)
        critics = surgeon.model.critic(rows, actions)  # type: ignore[attr-defined]
    return float(torch.cat(critics).mean())


def bandit(*, truncates: bool, **options: Any) -> float:
    surgeon = sac(
        ToyOperations(1.0, truncates=truncates),
        learning_rate=1e-2,
        gradient_steps=25,
        policy_kwargs={"net_arch": [16]},
        ent_coef=1e-3,
        tau=0.1,
        **options,
    )
    surgeon._env.norm_reward = False  # so that values are in the units of the reward
    surgeon.operate(11)  # the first three warm up
    assert n_updates(surgeon) == 200
    return value(surgeon)


def test_a_finite_task_of_one_step_is_worth_what_that_step_pays() -> None:
    assert bandit(truncates=False) == pytest.approx(1.0, abs=0.1)


def test_the_same_task_cut_off_by_a_time_limit_would_look_worth_more_and_more() -> None:
    assert bandit(truncates=True, gamma=0.99) > 2.5


def test_nothing_is_discounted() -> None:
    surgeon = sac(ToyOperations(1.0))
    assert surgeon.model.gamma == 1.0
    assert surgeon._env.gamma == 1.0


def test_options_given_by_the_caller_win_over_the_table() -> None:
    assert ALGORITHMS["sac"].options["buffer_size"] != 77
    surgeon = sac(ToyOperations(1.0), buffer_size=77)
    assert surgeon.model.buffer_size == 77
    assert surgeon.model.learning_rate == ALGORITHMS["sac"].options["learning_rate"]
    assert "learning_rate" not in QUICK_SAC


def test_what_was_saved_acts_like_the_surgeon(tmp_path: Path) -> None:
    env = small_env()
    surgeon = sac(env)
    surgeon.operate(2)
    surgeon.save(tmp_path)
    loaded = SAC.load(tmp_path / "surgeon.zip", device="cpu")
    scales = json.loads((tmp_path / "surgeon_normalisation.json").read_text(encoding="utf-8"))
    assert scales.keys() >= {"mean", "var", "count", "return_var"}
    n_observed = (1 + 2 * 2) * 2  # the first and one after each step, of two rows
    assert scales["count"] == pytest.approx(n_observed, abs=1e-3)
    observations, _ = env.reset(seed=9)
    normalised = (observations - scales["mean"]) / np.sqrt(np.array(scales["var"]) + 1e-8)
    actions, _ = loaded.predict(np.clip(normalised, -10, 10).astype(np.float32), deterministic=True)
    assert actions.tolist() == first_actions(surgeon, observations).tolist()


def test_learning_an_easy_operation() -> None:
    # The best action is (0.5, -0.5), and each step is paid at once by how close it is.
    class Aim(ToyOperations):
        def step(self, actions: np.ndarray) -> Any:
            for env, action in zip(self.envs, actions, strict=True):
                env.rewards = (-float(np.square(action - [0.5, -0.5]).sum()),) * 2
            return super().step(actions)

    surgeon = sac(
        Aim(0.0, 0.0, n_rows=2),
        learning_rate=1e-2,
        gradient_steps=10,
        learning_starts=20,
        batch_size=64,
        policy_kwargs={"net_arch": [32]},
    )
    surgeon.operate(25)
    actions = first_actions(surgeon, np.array([[0.0] * 3, [1.0] * 3], np.float32))
    np.testing.assert_allclose(actions, [[0.5, -0.5]] * 2, atol=0.25)


def test_the_patient_is_the_same_after_a_round() -> None:
    patient = tiny_patient()
    before = [p.detach().clone() for p in patient.model.parameters()]
    sac(small_env(patient)).operate(2)
    assert equal(before, list(patient.model.parameters()))


def test_first_actions_and_first_prompts_are_not_made_of_the_same_dice() -> None:
    env = small_env()
    surgeon = sac(env, seed=3)
    surgeon.operate(1)  # seeds the rows
    space = surgeon.model.action_space
    for rng in env.get_state()["rngs"]:
        assert space.np_random.bit_generator.state != rng.bit_generator.state
    again = sac(small_env(), seed=3)
    again.operate(1)
    assert np.array_equal(space.sample(), again.model.action_space.sample())


def saved(name: str, n_rows: int, folder: Path, **options: Any) -> SB3Surgeon:
    """Return a surgeon that was saved after two operations on every row."""
    surgeon = SB3Surgeon(name, toys(0.1, 0.2, 0.3, n_rows=n_rows), 3, **options)
    surgeon.operate(2)
    surgeon.save(folder)
    return surgeon


def test_a_loaded_surgeon_throws_dice_that_nobody_has_thrown(tmp_path: Path) -> None:
    def dice(surgeon: SB3Surgeon) -> list[Any]:
        surgeon._vector.reset(seed=surgeon._env.venv.unwrapped._seeds[0])  # type: ignore[attr-defined]
        rows = [rng.bit_generator.state for rng in surgeon._vector.get_state()["rngs"]]
        state = surgeon._randomness.get_state()
        private = (state["python"], state["numpy"]["keys"].tolist(), state["torch"].tolist())
        space = surgeon.model.action_space
        return [*private, space.np_random.bit_generator.state, *rows]

    start = dice(sac(toys(0.1, 0.2, 0.3, n_rows=2), seed=3))
    saved("sac", 2, tmp_path, **QUICK_SAC)
    loaded = [sac(toys(0.1, 0.2, 0.3, n_rows=2), seed=3) for _ in range(2)]
    for surgeon in loaded:
        surgeon.load(tmp_path)
    found = dice(loaded[0])
    assert found == dice(loaded[1])
    assert all(one != other for one, other in zip(found, start, strict=True))
    assert found[3] not in found[4:]


@pytest.mark.usefixtures("quick_surgeons")
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_what_was_saved_can_be_loaded_onto_another_number_of_rows(
    name: str, tmp_path: Path
) -> None:
    surgeon = saved(name, 3, tmp_path)
    for n_rows in (2, 5):
        env = toys(0.1, 0.2, 0.3, n_rows=n_rows)
        loaded, fresh = (SB3Surgeon(name, env, 3) for _ in range(2))
        loaded.load(tmp_path)
        for setting in ("n_envs", "batch_size", "n_steps", "n_eval_episodes"):
            assert getattr(loaded.model, setting, 0) == getattr(fresh.model, setting, 0)
        observations = np.ones((2, 3), np.float32)
        expected = first_actions(surgeon, observations).tolist()
        assert first_actions(loaded, observations).tolist() == expected
        before = actor(loaded)
        loaded.operate(1)
        loaded.operate(2)
        # By tries ARS learns nothing where all are paid the same.
        assert equal(before, actor(loaded)) == (name == "ars")


def test_a_loaded_surgeon_collects_before_it_learns_on(tmp_path: Path) -> None:
    options = {**QUICK_SAC, "learning_starts": 8}
    n_learned = n_updates(saved("sac", 2, tmp_path, **options))  # 12 steps
    assert n_learned > 0
    for n_done in (12, 24):
        loaded = SB3Surgeon("sac", toys(0.1, 0.2, 0.3, n_rows=2), 3, **options)
        loaded.load(tmp_path)
        assert loaded.model.num_timesteps == n_done
        loaded.operate(1)
        assert n_updates(loaded) == n_learned  # six steps are too few
        loaded.operate(1)
        assert n_updates(loaded) > n_learned
        n_learned = n_updates(loaded)
        loaded.save(tmp_path)


def test_a_loaded_surgeon_scales_as_the_saved_one_did(tmp_path: Path) -> None:
    surgeon = saved("sac", 2, tmp_path, **QUICK_SAC)
    loaded = sac(toys(0.1, 0.2, 0.3, n_rows=2), seed=3)
    loaded.load(tmp_path)
    for mine, its in zip(loaded._normalisations(), surgeon._normalisations(), strict=True):
        assert np.array_equal(mine.mean, its.mean)
        assert np.array_equal(mine.var, its.var)
        assert mine.count == its.count
    for each in (loaded, surgeon):
        each.operate(1)
    left, right = loaded._env.ret_rms, surgeon._env.ret_rms
    assert (left.mean, left.var, left.count) == (right.mean, right.var, right.count)
    rewards = np.ones(2)
    assert loaded._env.normalize_reward(rewards).tolist() == (
        surgeon._env.normalize_reward(rewards).tolist()
    )


def test_a_discount_that_is_asked_for_scales_the_rewards_too() -> None:
    surgeon = sac(toys(0.1), gamma=0.9)
    assert surgeon.model.gamma == surgeon._env.gamma == 0.9
    ars = SB3Surgeon("ars", toys(0.1), 0)  # knows no discount
    assert ars._env.gamma == 1.0


def test_the_spread_of_exploration_may_be_a_number() -> None:
    surgeon = SB3Surgeon("td3", toys(0.1), 0, **QUICK_SAC, action_noise=0.25)
    noise = np.stack([surgeon.model.action_noise() for _ in range(4000)])  # type: ignore[attr-defined]
    assert noise.shape == (4000, 2)
    np.testing.assert_allclose(noise.std(0), 0.25, atol=0.02)


@pytest.mark.parametrize("name", ["ppo", "a2c", "trpo", "recurrent_ppo"])
def test_an_on_policy_algorithm_learns_from_one_operation_on_every_row(name: str) -> None:
    surgeon = SB3Surgeon(name, toys(0.1, 0.2, 0.3, n_rows=4), 0)
    before = actor(surgeon)
    surgeon.operate(1)
    assert surgeon.model.num_timesteps == 12
    assert not equal(before, actor(surgeon))


def test_a_recurrent_policy_remembers_until_the_next_operation_begins() -> None:
    surgeon = SB3Surgeon("recurrent_ppo", toys(0.1, 0.2, n_rows=2), 0)
    observations = np.ones((2, 3), np.float32)
    first = first_actions(surgeon, observations)
    second = surgeon.act(observations, np.array([True, False]))
    assert second[0].tolist() == first[0].tolist()
    assert second[1].tolist() != first[1].tolist()
    assert first_actions(surgeon, observations).tolist() == first.tolist()


def toys(*rewards: float, n_rows: int = 1) -> Any:
    return ToyOperations(*rewards, n_rows=n_rows)
