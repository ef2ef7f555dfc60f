"""Tests of avatarl_env/vector_env.py beyond the contract: rows, autoreset, seeds and masks."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers import vector as wrappers

from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import (
    SIZES,
    actions,
    assert_same_reading,
    plain,
    tiny_env,
    tiny_patient,
    tiny_vector_env,
)

MODES = list(AutoresetMode)
SAME_STEP, NEXT_STEP, DISABLED = (
    AutoresetMode.SAME_STEP,
    AutoresetMode.NEXT_STEP,
    AutoresetMode.DISABLED,
)
BRIEF = {**SIZES, "n_prompts": 6, "episode_length": 2}
KILL, SPARE = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]
BRUTAL: dict[str, Any] = {"operator_options": {"scale": 300.0}, "step_size": 1.0}
"""With these, `KILL` scales heads by e^300, beyond float32."""


def vector(
    n: int = 3, mode: AutoresetMode = SAME_STEP, **keywords: Any
) -> AttentionSurgeryVectorEnv:
    """Return N operations of two steps side by side, unless keywords say otherwise."""
    return tiny_vector_env(n, autoreset_mode=mode, **{**BRIEF, **keywords})


def separate(
    n: int = 3, mode: AutoresetMode = SAME_STEP, limit: int | None = None, **keywords: Any
) -> SyncVectorEnv:
    """Return N single environments, each on its own patient, with the same settings."""

    def one() -> gymnasium.Env[Any, Any]:
        env = tiny_env(**{**BRIEF, **keywords})
        return env if limit is None else TimeLimit(env, limit)

    return SyncVectorEnv([one] * n, autoreset_mode=mode)


def choices(n_steps: int, n: int = 3, n_coefficients: int = 4, seed: int = 0) -> np.ndarray:
    """Draw actions (n_steps, n, A) small enough to be survived."""
    return 0.3 * actions(n_steps * n, n_coefficients, seed).reshape(n_steps, n, n_coefficients)


def operate(env: VectorEnv[Any, Any, Any], moves: np.ndarray) -> list[Any]:
    """Make these steps, in mode DISABLED with a reset of the rows that ended after each."""
    trajectory = []
    for move in moves:
        step = env.step(move)
        trajectory.append(step)
        ended = step[2] | step[3]
        if env.metadata["autoreset_mode"] == DISABLED and ended.any():
            trajectory.append(env.reset(options={"reset_mask": ended}))
    return trajectory


def assert_agree(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Check kinds, shapes, keys and values; floating-point numbers may differ by `tolerance`."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = [*found.values()], [expected[key] for key in found]
    if isinstance(found, np.ndarray):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if found.dtype == object:
            found, expected = [*found], [*expected]
    if isinstance(found, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_agree(one, other, tolerance)
    elif isinstance(found, np.ndarray | float):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance)
    else:
        assert found == expected


def n_rounded(env: AttentionSurgeryVectorEnv, other: SyncVectorEnv) -> int:
    """Compare the rows' evaluations; return how many texts differ, each by rounding alone."""
    twins = [single.unwrapped.get_state()["episode"] for single in other.envs]
    count = 0
    for one, twin in zip(env.get_state()["episodes"], twins, strict=True):
        assert one.injury.tolist() == twin.injury.tolist()
        assert one.prompts.tokens.tolist() == twin.prompts.tokens.tolist()
        assert one.coefficients.tolist() == twin.coefficients.tolist()
        count += assert_same_reading(one.present, twin.present, one.prompts.uniforms)
    return count


def test_make_vec_returns_the_vector_environment(folder: str) -> None:
    for mode in (None, "vector_entry_point"):
        env = gymnasium.make_vec(
            "AttentionSurgery-v0", num_envs=2, vectorization_mode=mode, lm=folder, **BRIEF
        )
        assert type(env) is AttentionSurgeryVectorEnv
        assert env.reset(seed=0)[0] in env.observation_space
        env.close()
        env.close()
        assert env.closed


@pytest.mark.parametrize("mode", MODES)
def test_autoreset_mode_is_set_by_either_name(mode: AutoresetMode) -> None:
    patient = tiny_patient()
    for given in (mode, mode.value):
        env = AttentionSurgeryVectorEnv(2, patient, autoreset_mode=given, **BRIEF)
        assert env.metadata["autoreset_mode"] is env.autoreset_mode is mode
    assert AttentionSurgeryVectorEnv(2, patient, **BRIEF).autoreset_mode is NEXT_STEP
    assert AttentionSurgeryVectorEnv.metadata["autoreset_mode"] is NEXT_STEP


# --- the same as single environments --------------------------------------------------------------


@pytest.mark.parametrize(("mode", "limit"), [(SAME_STEP, 2), (NEXT_STEP, None), (DISABLED, 3)])
def test_rows_are_the_single_environments_with_their_seeds(
    mode: AutoresetMode, limit: int | None
) -> None:
    keywords = {"injury": 0.5, "episode_length": 4, "n_prompts": 3}
    env = vector(3, mode, max_episode_steps=limit, **keywords)
    other = separate(3, mode, limit, **keywords)
    assert_agree(env.reset(seed=7), other.reset(seed=7))
    n_differing = n_rounded(env, other)
    for move in choices(5):
        found, expected = (operate(each, move[None]) for each in (env, other))
        n_differing += n_rounded(env, other)
        # Where a uniform lay within rounding of a boundary, scores cannot be compared.
        assert_agree(found, expected, 1e-4 if n_differing == 0 else 1e3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keywords", [{"injury": 0.5}, BRUTAL])
def test_a_single_row_is_the_single_environment_to_the_last_bit(
    keywords: dict[str, Any], mode: AutoresetMode
) -> None:
    env, other = vector(1, mode, **keywords), separate(1, mode, **keywords)
    assert plain(env.reset(seed=3)) == plain(other.reset(seed=3))
    moves = choices(5, 1, env.single_action_space.shape[0])
    assert plain(operate(env, moves)) == plain(operate(other, moves))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_flatlines_ends_alone(mode: AutoresetMode) -> None:
    env = vector(3, mode, episode_length=4, **BRUTAL)
    env.reset(seed=0)
    move = np.array([SPARE, KILL, SPARE], dtype=np.float32)
    observations, rewards, terminated, truncated, infos = env.step(move)
    assert rewards[[0, 2]].tolist() == [0.0, 0.0]
    assert terminated.tolist() == [False, True, False]
    assert not truncated.any()
    final = infos["final_info"] if mode == SAME_STEP else infos
    others = None if mode == SAME_STEP else ""  # without a final info, or alive
    assert rewards[1] == -1.0
    assert final["flatline"].tolist() == [others, "non-finite logits", others]
    last = infos["final_obs"][1] if mode == SAME_STEP else observations[1]
    assert last in env.single_observation_space
    if mode == DISABLED:
        env.reset(options={"reset_mask": terminated})
    left = env.step(0 * move)[0][:, -1].tolist()  # after its reset a row has made one step, or none
    assert left == [0.5, 1.0 if mode == NEXT_STEP else 0.75, 0.5]


# --- autoreset ------------------------------------------------------------------------------------


def test_same_step_returns_the_last_and_the_first_of_rows_that_end() -> None:
    env = vector(3)
    first, start = env.reset(seed=0)
    moves = choices(2)
    middle, *_, infos = env.step(moves[0])
    assert "final_obs" not in start
    assert "final_obs" not in infos
    assert (middle[:, -1] == 0.5).all()
    observations, _, terminated, truncated, infos = env.step(moves[1])
    assert terminated.all()
    assert not truncated.any()
    assert infos["final_obs"].shape == (3,)  # also where all rows end together
    for row in range(3):
        last = infos["final_obs"][row]
        assert last in env.single_observation_space
        assert last[-1] == 0
        assert observations[row, -1] == 1
        assert observations[row].tolist() != first[row].tolist()
    final = infos["final_info"]
    assert infos["_final_obs"].all()
    assert infos["_final_info"].all()
    assert final["coefficients"] == pytest.approx(0.5 * moves.sum(0), abs=1e-6)
    assert final["is_success"].tolist() == (final["improvement"] > 0).tolist()
    assert not infos["coefficients"].any()
    assert not infos["is_success"].any()  # of the operations that have just begun


def test_next_step_begins_one_step_later_and_ignores_that_action() -> None:
    env, twin = vector(3, NEXT_STEP), vector(3, NEXT_STEP)
    moves = choices(2)
    for each in (env, twin):
        each.reset(seed=0)
        *_, terminated, _, infos = operate(each, moves)[-1]
    assert terminated.all()
    assert infos["is_success"].tolist() == (infos["improvement"] > 0).tolist()
    env.model_changed()  # an ended operation is not invalid: a new one begins
    twin.model_changed()
    step = env.step(np.full((3, 4), np.nan, dtype=np.float32))
    observations, rewards, terminated, truncated, _ = step
    assert not np.any([rewards, terminated, truncated])
    assert (observations[:, -1] == 1).all()
    assert plain(step) == plain(twin.step(moves[0]))
    assert plain(operate(env, moves)) == plain(operate(twin, moves))


def test_disabled_waits_for_a_reset_of_the_rows_in_the_mask() -> None:
    env = vector(3, DISABLED, **BRUTAL)
    env.reset(seed=0)
    move = np.array([KILL, SPARE, SPARE], dtype=np.float32)
    observations, _, terminated, *_ = env.step(move)
    assert terminated.tolist() == [True, False, False]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"reset\(\) is needed where .*\[True, False, Fal"):
            env.step(0 * move)
    options = {"reset_mask": np.array([True, False, True])}
    after, infos = env.reset(options=options)
    assert [*options] == ["reset_mask"]  # the caller's still
    assert after[:, -1].tolist() == [1.0, 0.5, 1.0]
    assert after[1].tolist() == observations[1].tolist()
    assert infos["_score"].tolist() == [True, False, True]
    assert env.step(0 * move)[2].tolist() == [False, True, False]


# --- seeds and masks ------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(5, 6, 7), np.arange(5, 8), np.int64(5), [5, np.uint8(6), 7]])
def test_a_seed_counts_up_over_the_rows(seeds: Any) -> None:
    env, other = vector(3, injury=0.5), vector(3, injury=0.5)
    assert plain(env.reset(seed=seeds)) == plain(other.reset(seed=5))


def test_rows_have_generators_of_their_own() -> None:
    """Rows without a seed, outside the mask or beside one that ends early keep their state."""
    rules: dict[str, Any] = {"injury": 0.5, **BRUTAL}
    env, other = vector(**rules), vector(**rules)
    mask = {"reset_mask": np.array([False, True, False])}
    for each in (env, other):
        each.reset(seed=0)
    found, expected = env.reset(seed=[None, 8, None])[0], other.reset()[0]
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert found[1].tolist() != expected[1].tolist()
    for seeds, each in (([50, 8, 70], env), ([None, 8, None], other)):
        each.reset(seed=seeds, options=mask)
    assert env.get_rng_state() == other.get_rng_state()
    kept = env.get_rng_state()
    for _ in range(3):
        env.step(np.array([SPARE, KILL, SPARE], dtype=np.float32))
        other.step(np.zeros((3, 4), dtype=np.float32))
    after = zip(env.get_rng_state(), other.get_rng_state(), strict=True)
    assert [a == b for a, b in after] == [True, False, True]
    for each in (env, other):
        each.set_rng_state(kept)
        with pytest.raises(RuntimeError, match="under way"):
            each.step(choices(1)[0])
    assert plain(env.reset()) == plain(other.reset())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"seed": [1, 2]}, "seed must have one entry for each of 3 rows"),
        ({"seed": [1, 2.5, 3]}, "seed must be an integer .* got 2.5"),
        ({"seed": [1, 2, -3]}, "seed must be an integer .* got -3"),
        (
            {"options": {"reset_mask": np.array([True, False])}},
            r"reset_mask must be \(3,\) of bool",
        ),
        ({"options": {"reset_mask": np.zeros(3, bool)}}, r"reset_mask must be .* least one True"),
        ({"options": {"reset_mask": [[True], []]}}, r"reset_mask must be \(3,\) of bool"),
        ({"options": {"reset_masks": True}}, "options must .* did you mean 'reset_mask'"),
    ],
)
def test_bad_seeds_and_masks_are_refused_and_change_nothing(
    keywords: dict[str, Any], message: str
) -> None:
    env, twin = vector(), vector()
    for each in (env, twin):
        each.reset(seed=0)
    with pytest.raises(ValueError, match=f"^{message}"):
        env.reset(**{"seed": 9, **keywords})
    assert plain(operate(env, choices(3))) == plain(operate(twin, choices(3)))


def test_gymnasiums_vector_wrappers_work() -> None:
    env: Any = wrappers.RecordEpisodeStatistics(vector(3))
    env.reset(seed=0)
    *_, infos = operate(env, choices(4))[-1]
    assert infos["episode"]["l"].tolist() == [2, 2, 2]
    assert infos["episode"]["r"] == pytest.approx(infos["final_info"]["improvement"], abs=1e-6)
    listed = wrappers.DictInfoToList(vector(3, **BRUTAL))
    listed.reset(seed=0)
    *_, rows = listed.step(np.array([KILL, SPARE, SPARE], dtype=np.float32))
    assert rows[0]["final_info"]["flatline"] == "non-finite logits"
    assert "final_info" not in rows[1]
    normed = wrappers.NormalizeObservation(vector(3, NEXT_STEP))
    normed.reset(seed=0)
    assert all(np.isfinite(step[0]).all() for step in operate(normed, choices(5)))
