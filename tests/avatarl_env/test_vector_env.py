"""Tests of avatarl_env/vector_env.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers import vector as wrappers

import avatarl_env.patient
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.patient import Patient
from avatarl_env.surgery import OPERATORS, SurgicalTheater
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import fingerprint
from tests.patients import (
    SIZES,
    InPlaceGain,
    actions,
    assert_same_reading,
    count_hooks,
    global_random_states,
    store_tiny_patient,
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
"""With these, `KILL` makes heads e^300 times louder, which leaves float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_tiny_patient(tmp_path_factory.mktemp("model"))


def vector(
    n: int = 3, mode: AutoresetMode = SAME_STEP, patient: Patient | None = None, **keywords: Any
) -> AttentionSurgeryVectorEnv:
    """Return N operations of two steps side by side, unless keywords say otherwise."""
    return tiny_vector_env(n, patient, autoreset_mode=mode, **{**BRIEF, **keywords})


def separate(
    n: int = 3, mode: AutoresetMode = SAME_STEP, limit: int | None = None, **keywords: Any
) -> SyncVectorEnv:
    """Return the same as N single environments, each on a patient of its own."""

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


def assert_agree(found: object, expected: object, tolerance: float = 0.0) -> None:
    """Check kinds, shapes, keys and values; floating-point arrays may differ by `tolerance`."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_agree(found[key], expected[key], tolerance)
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_agree(one, other, tolerance)
    elif isinstance(found, np.ndarray):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if found.dtype == object:
            assert_agree(list(found), list(expected), tolerance)
        elif found.dtype.kind == "f" and tolerance:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance)
        else:
            assert found.tolist() == expected.tolist()
    else:
        assert found == expected


def agree(found: object, expected: object) -> bool:
    """Whether two trajectories are equal to the last bit."""
    try:
        assert_agree(found, expected)
    except AssertionError:
        return False
    return True


def arrays(value: object) -> Iterator[np.ndarray]:
    """Yield every array inside."""
    if isinstance(value, np.ndarray):
        yield value
        value = list(value) if value.dtype == object else ()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from arrays(one)


def assert_same_operations(env: AttentionSurgeryVectorEnv, other: SyncVectorEnv) -> int:
    """Check the rows' hidden state; return how many texts differ, each by rounding alone."""
    n_differing = 0
    for row, single in enumerate(other.envs):
        episode, twin = env._episodes[row], single.unwrapped._episode
        assert episode.prompts.tokens.tolist() == twin.prompts.tokens.tolist()
        assert episode.prompts.uniforms.tolist() == twin.prompts.uniforms.tolist()
        assert episode.injury.tolist() == twin.injury.tolist()
        assert episode.coefficients.tolist() == twin.coefficients.tolist()
        assert (episode.n_done, episode.is_over) == (twin.n_done, twin.is_over)
        for name in ("baseline", "present"):
            readings = getattr(episode, name), getattr(twin, name)
            n_differing += assert_same_reading(*readings, episode.prompts.uniforms)
    return n_differing


# --- made by gymnasium ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AttentionSurgery-v0", "avatarl_env:AttentionSurgery-v0"])
@pytest.mark.parametrize("mode", [None, "vector_entry_point"])
def test_make_vec_makes_it(name: str, mode: str | None, folder: str) -> None:
    env = gymnasium.make_vec(
        name, num_envs=2, vectorization_mode=mode, lm=folder, injury=0.5, layers=[1], **BRIEF
    )
    assert type(env) is AttentionSurgeryVectorEnv
    assert (env.num_envs, env.config.episode_length, env.config.injury) == (2, 2, 0.5)
    assert [target.layer for target in env.operator.targets] == [1]
    observations, _ = env.reset(seed=0)
    assert observations in env.observation_space
    env.close()


def test_spec_says_how_to_make_it_again(folder: str) -> None:
    keywords = {"lm": folder, "autoreset_mode": "NextStep", "injury": 0.5, **BRIEF}
    env = gymnasium.make_vec("AttentionSurgery-v0", num_envs=2, render_mode="ansi", **keywords)
    restored = EnvSpec.from_json(env.spec.to_json())
    assert restored == env.spec
    again = gymnasium.make_vec(restored)
    assert type(again) is AttentionSurgeryVectorEnv
    assert again.autoreset_mode == NEXT_STEP
    assert again.render_mode == "ansi"
    assert agree(again.reset(seed=3), env.reset(seed=3))
    assert agree(operate(again, choices(3, 2)), operate(env, choices(3, 2)))


def test_gymnasiums_own_vector_environments_still_do(folder: str) -> None:
    native = gymnasium.make_vec("AttentionSurgery-v0", num_envs=2, lm=folder, **BRIEF)
    expected = native.reset(seed=4)[0]
    sync = gymnasium.make_vec(
        "AttentionSurgery-v0", num_envs=2, vectorization_mode="sync", lm=folder, **BRIEF
    )
    assert sync.reset(seed=4)[0] == pytest.approx(expected, abs=1e-4)
    processes = gymnasium.make_vec(
        "avatarl_env:AttentionSurgery-v0",
        num_envs=1,
        vectorization_mode="async",
        vector_kwargs={"context": "spawn"},
        lm=folder,
        **BRIEF,
    )
    try:
        assert processes.reset(seed=4)[0] == pytest.approx(expected[:1], abs=1e-4)
    finally:
        processes.close()


@pytest.mark.parametrize("mode", MODES)
def test_autoreset_mode_is_a_member_of_its_own_by_either_name(mode: AutoresetMode) -> None:
    patient = tiny_patient()
    for given in (mode, mode.value):
        env = AttentionSurgeryVectorEnv(2, patient, autoreset_mode=given, **BRIEF)
        assert env.metadata["autoreset_mode"] is mode
        assert env.autoreset_mode is mode
    assert AttentionSurgeryVectorEnv.metadata["autoreset_mode"] is NEXT_STEP  # the default
    assert AttentionSurgeryVectorEnv(2, patient, **BRIEF).autoreset_mode is NEXT_STEP


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"autoreset_mode": "SameSteps"}, "autoreset_mode must .* did you mean 'SameStep'?"),
        ({"autoreset_mode": "next_step"}, "autoreset_mode must .* did you mean 'NextStep'?"),
        ({"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be an integer of at least 1, got 0"),
        ({"render_mode": "human"}, "render_mode must be None or"),
        ({"operator": "head_gian"}, "operator must be .* did you mean 'head_gain'?"),
        ({"layers": [7]}, "layers must match attention layers of the model, got 7"),
        ({"n_new": 57}, "must fit the model's context of 64"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        AttentionSurgeryVectorEnv(**{"lm": tiny_patient(), **BRIEF, **keywords})
    assert "\n" not in str(caught.value)


def test_spaces_are_the_single_environments_in_rows() -> None:
    env, single = vector(5), tiny_env()
    assert env.single_observation_space == single.observation_space
    assert env.single_action_space == single.action_space
    assert env.observation_space == Box(-10, 10, (5, 36), np.float32)
    assert env.action_space == Box(-1, 1, (5, 4), np.float32)


def test_from_model_shares_the_callers_model_and_may_name_its_corpus(tmp_path: Path) -> None:
    """Also one whose context is too short for the default operation."""
    patient = tiny_patient()
    path = tmp_path / "text.txt"
    path.write_text(patient.corpus.text, encoding="utf-8")
    for corpus in (patient.corpus, str(path)):
        env = AttentionSurgeryVectorEnv.from_model(
            patient.model, patient.tokenizer, corpus, 2, injury=0.5, **BRIEF
        )
        assert env.patient.model is patient.model
        assert agree(env.reset(seed=0), vector(2, injury=0.5).reset(seed=0))


def test_closing_twice_is_no_error() -> None:
    env = vector()
    env.close()
    env.close()
    assert env.closed


# --- the same as single environments -------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("keywords", "limit"),
    [
        ({}, None),
        ({"injury": [0.5, -0.5, 0.25, 0.0]}, None),
        ({"injury": 0.5, "episode_length": 5, "n_prompts": 3}, 3),
        ({"operator": "spectral_bands", "operator_options": {"n_bands": 2}}, None),
    ],
)
def test_rows_are_the_single_environments_with_their_seeds(
    keywords: dict[str, Any], limit: int | None, mode: AutoresetMode
) -> None:
    env = vector(3, mode, max_episode_steps=limit, **keywords)
    other = separate(3, mode, limit, **keywords)
    assert_agree(env.reset(seed=7), other.reset(seed=7), 1e-4)
    n_differing = assert_same_operations(env, other)
    for move in choices(5):
        found, expected = (operate(each, move[None]) for each in (env, other))
        n_differing += assert_same_operations(env, other)
        # Where a uniform lay within rounding of a boundary, the texts' scores say nothing.
        assert_agree(found, expected, 1e-4 if n_differing == 0 else 1e3)


@pytest.mark.parametrize(
    "name",
    [name for name in OPERATORS],
)
def test_rows_are_the_single_environments_whatever_the_operator(name: str) -> None:
    env, other = (each(2, operator=name, injury=0.3) for each in (vector, separate))
    assert_agree(env.reset(seed=0), other.reset(seed=0), 1e-4)
    for move in choices(3, 2, env.single_action_space.shape[0]):
        assert_agree(env.step(move), other.step(move), 1e-4)


@pytest.mark.parametrize(("injury", "mode"), [*zip([0.3] * 3, MODES, strict=True), (0, SAME_STEP)])
def test_rows_that_flatline_end_early_while_others_go_on(
    injury: float, mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Survivable are here only changes of a few percent of the entropy."""
    monkeypatch.setattr("avatarl_env.episode.ENTROPY_RANGE", (0.97, 1.03))
    rules = {"episode_length": 4, "injury": injury}
    env, other = vector(4, mode, **rules), separate(4, mode, **rules)
    assert_agree(env.reset(seed=1), other.reset(seed=1), 1e-4)
    n_ended, causes = [], set()
    for move in choices(7, 4):
        move[0] *= 0.05  # nothing happens to this row
        found, expected = (operate(each, move[None]) for each in (env, other))
        assert_agree(found, expected, 1e-4)
        infos = found[0][4]
        final = infos.get("final_info", infos)
        causes |= {cause for cause in final["flatline"] if cause}
        n_ended.append(int((found[0][2] | found[0][3]).sum()))
    assert {0, 1} < {*n_ended}  # they ended one by one
    assert len(causes) > 1


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_leaves_float32_ends_alone_and_pays_the_penalty(mode: AutoresetMode) -> None:
    env, other = vector(3, mode, **BRUTAL), separate(3, mode, **BRUTAL)
    for each in (env, other):
        each.reset(seed=0)
    before = fingerprint(env.patient.model)
    move = np.array([SPARE, KILL, SPARE], dtype=np.float32)
    found, expected = env.step(move), other.step(move)
    for _, rewards, terminated, truncated, infos in (found, expected):
        assert rewards.tolist() == [0.0, -1.0, 0.0]
        assert terminated.tolist() == [False, True, False]
        assert truncated.tolist() == [False] * 3
        final = infos["final_info"] if mode == SAME_STEP else infos
        others = None if mode == SAME_STEP else ""  # have no final info, or live
        assert final["flatline"].tolist() == [others, "non-finite logits", others]
        assert final["_flatline"].tolist() == [mode != SAME_STEP, True, mode != SAME_STEP]
        assert final["flatline"].dtype == object
        assert final["is_success"].tolist() == [False] * 3
    # What the dead patient's readings were is not the same in both, but they are readings.
    last = found[4]["final_obs"][1] if mode == SAME_STEP else found[0][1]
    assert last in env.single_observation_space
    assert_agree(found[4], expected[4] | {k: found[4][k] for k in ("final_obs",) if k in found[4]})
    if mode == DISABLED:
        for each in (env, other):
            each.reset(options={"reset_mask": terminated})
    assert_agree(env.step(0 * move)[:4], other.step(0 * move)[:4], 1e-4)
    assert fingerprint(env.patient.model) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keywords", [{"injury": 0.5}, BRUTAL, {"operator": "low_rank_seed"}])
def test_a_single_row_is_the_single_environment_to_the_last_bit(
    keywords: dict[str, Any], mode: AutoresetMode
) -> None:
    env, other = vector(1, mode, **keywords), separate(1, mode, **keywords)
    n = env.single_action_space.shape[0]
    assert_agree(env.reset(seed=3), other.reset(seed=3))
    moves = choices(7, 1, n)
    assert_agree(operate(env, moves), operate(other, moves))
    assert_agree(env.reset(), other.reset())


@pytest.mark.parametrize("mode", MODES)
def test_an_operator_that_cannot_act_on_rows_does_the_same_row_after_row(
    mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(OPERATORS, "in_place", InPlaceGain)
    avatarl_env.patient._say_once.cache_clear()
    rules = {"injury": 0.5, "n_prompts": 3, "operator_options": {"tied": False}}
    env, overlaid = vector(3, mode, operator="in_place", **rules), vector(3, mode, **rules)
    other = separate(3, mode, operator="in_place", **rules)
    assert_agree(env.reset(seed=0), other.reset(seed=0), 1e-4)
    overlaid.reset(seed=0)
    before = fingerprint(env.patient.model)
    moves = choices(6, 3, 8)
    found, expected = operate(env, moves), operate(other, moves)
    assert_agree(found, expected, 1e-4)
    assert_agree(operate(overlaid, moves), expected, 1e-4)
    assert fingerprint(env.patient.model) == before
    assert caplog.messages.count(
        "InPlaceGain has no row_edits: its operations are performed one by one"
    ) == len(caplog.messages)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("name", [*OPERATORS, "in_place"])
@pytest.mark.parametrize("injury", [0.0, 0.3])
def test_zero_actions_give_exactly_nothing(
    name: str, injury: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even rounding, which differs with the size of a batch."""
    monkeypatch.setitem(OPERATORS, "in_place", InPlaceGain)
    env = vector(3, operator=name, injury=injury, n_prompts=3, n_new=6)
    env.reset(seed=0)
    moves = np.zeros((3, *env.action_space.shape), dtype=np.float32)
    assert all(not step[1].any() for step in operate(env, moves))


def test_a_row_at_zero_earns_exactly_nothing_beside_others() -> None:
    env = vector(3, n_prompts=3, n_new=12, episode_length=4)
    env.reset(seed=0)
    moves = choices(4)
    moves[:, 1] = 0
    rewards = np.array([step[1] for step in operate(env, moves)])
    assert not rewards[:, 1].any()
    assert rewards[:, [0, 2]].all()


def test_many_rows_are_evaluated_a_forward_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    generate = avatarl_env.patient.generate

    def noted(model: Any, tokens: Any, *arguments: Any, **keywords: Any) -> Any:
        sizes.append(len(tokens))
        return generate(model, tokens, *arguments, **keywords)

    monkeypatch.setattr(avatarl_env.patient, "generate", noted)
    env = vector(5, n_prompts=4)
    env.reset(seed=0)
    env.step(choices(1, 5)[0])
    assert sizes == [20, 20]
    monkeypatch.setattr(avatarl_env.patient, "ROWS_PER_FORWARD", 8)
    env.step(choices(1, 5)[0])  # and begins anew
    assert sizes[2:] == [8, 8, 4, 8, 8, 4]


# --- autoreset -----------------------------------------------------------------------------------


def test_same_step_shows_the_last_and_the_first_of_rows_that_end() -> None:
    env = vector(3)
    first, start = env.reset(seed=0)
    assert "final_obs" not in start
    moves = choices(2)
    middle, _, terminated, _, infos = env.step(moves[0])
    assert not terminated.any()
    assert "final_obs" not in infos
    assert (middle[:, -1] == 0.5).all()
    observations, _, terminated, truncated, infos = env.step(moves[1])
    assert terminated.all()
    assert not truncated.any()
    assert infos["final_obs"].dtype == object
    assert infos["final_obs"].shape == (3,)  # also where all rows end together
    for row in range(3):
        last = infos["final_obs"][row]
        assert last.dtype == np.float32
        assert last in env.single_observation_space
        assert last[-1] == 0
        assert observations[row, -1] == 1  # all the time of the next operation
        assert observations[row].tolist() != first[row].tolist()
    assert infos["_final_obs"].all()
    assert infos["_final_info"].all()
    assert infos["final_info"]["coefficients"] == pytest.approx(0.5 * moves.sum(0), abs=1e-6)
    final = infos["final_info"]
    assert final["is_success"].tolist() == (final["improvement"] > 0).tolist()
    assert final["_is_success"].all()
    assert not infos["coefficients"].any()
    assert infos["is_success"].tolist() == [False] * 3  # of the operations that have just begun


def test_next_step_begins_a_step_later_and_ignores_that_action() -> None:
    env, twin = vector(3, NEXT_STEP), vector(3, NEXT_STEP)
    for each in (env, twin):
        each.reset(seed=0)
    moves = choices(2)
    *_, terminated, _, infos = operate(env, moves)[-1]
    operate(twin, moves)
    assert terminated.all()
    assert "final_obs" not in infos
    assert infos["is_success"].tolist() == (infos["improvement"] > 0).tolist()
    wild = np.full((3, 4), np.nan, dtype=np.float32)
    step = env.step(wild)
    observations, rewards, terminated, truncated, infos = step
    assert not rewards.any()
    assert not terminated.any()
    assert not truncated.any()
    assert (observations[:, -1] == 1).all()
    assert infos["is_success"].tolist() == [False] * 3
    assert agree(step, twin.step(moves[0]))
    assert agree(operate(env, moves), operate(twin, moves))


def test_disabled_refuses_to_step_over_and_begins_where_the_mask_says() -> None:
    env = vector(3, DISABLED, **BRUTAL)
    env.reset(seed=0)
    move = np.array([KILL, SPARE, SPARE], dtype=np.float32)
    observations, _, terminated, *_ = env.step(move)
    assert terminated.tolist() == [True, False, False]
    assert observations[:, -1].tolist() == [0.5] * 3
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"reset\(\) is needed where .*\[True, False, Fal"):
            env.step(0 * move)
    options = {"reset_mask": np.array([True, False, True])}
    before, after = env._episodes[1], env.reset(options=options)
    assert [*options] == ["reset_mask"]  # the caller's still
    assert env._episodes[1] is before
    assert after[0][:, -1].tolist() == [1.0, 0.5, 1.0]
    assert after[0][1].tolist() == observations[1].tolist()
    assert after[1]["_score"].tolist() == [True, False, True]
    *_, terminated, _, _ = env.step(0 * move)
    assert terminated.tolist() == [False, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_can_begin_anew_what_has_not_ended(mode: AutoresetMode) -> None:
    env, other = vector(3, mode, injury=0.5), separate(3, mode, injury=0.5)
    for each in (env, other):
        each.reset(seed=0)
        each.step(choices(1)[0])
    masks = [np.array([False, True, False]) for _ in range(2)]
    seeds = [5, 6, 7]
    found, expected = (
        each.reset(seed=seeds, options={"reset_mask": mask})
        for each, mask in zip((env, other), masks, strict=True)
    )
    assert_agree(found, expected, 1e-4)
    _, alone = tiny_env(injury=0.5, **BRIEF).reset(seed=6)
    assert found[1]["score"][1] == pytest.approx(alone["score"], abs=1e-4)
    assert_agree(operate(env, choices(4)), operate(other, choices(4)), 1e-4)  # rows 0, 2 unseeded


@pytest.mark.parametrize("mode", MODES)
def test_a_full_reset_forgets_what_had_ended(mode: AutoresetMode) -> None:
    env, twin = vector(2, mode), vector(2, mode)
    env.reset(seed=3)
    env.step(choices(1, 2)[0])
    env.step(choices(1, 2)[0])
    assert agree(env.reset(seed=0), twin.reset(seed=0))
    assert agree(operate(env, choices(3, 2)), operate(twin, choices(3, 2)))


@pytest.mark.parametrize(
    "mask",
    [
        np.array([True, False]),
        np.array([1, 0, 1]),
        np.array([False] * 3),
        np.array([[True], [False], [True]]),
        True,
    ],
)
def test_bad_masks_are_refused_and_change_nothing(mask: Any) -> None:
    env, twin = vector(3), vector(3)
    for each in (env, twin):
        each.reset(seed=0)
    with pytest.raises(ValueError, match=r"^reset_mask must be \(3,\) of bool with at least one"):
        env.reset(seed=9, options={"reset_mask": mask})
    assert agree(operate(env, choices(3)), operate(twin, choices(3)))


def test_rows_that_have_never_begun_cannot_be_stepped() -> None:
    env = vector(2)
    with pytest.raises(RuntimeError, match=r"step\(\) needs an operation under way: call reset"):
        env.step(choices(1, 2)[0])
    observations, infos = env.reset(seed=0, options={"reset_mask": np.array([False, True])})
    assert not observations[0].any()
    assert infos["_score"].tolist() == [False, True]
    with pytest.raises(RuntimeError, match=r"step\(\) needs an operation under way: call reset"):
        env.step(choices(1, 2)[0])
    env.reset(options={"reset_mask": np.array([True, False])})
    env.step(choices(1, 2)[0])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_truncates_as_a_wrapper_would(limit: int) -> None:
    """At the last step it does both, as gymnasium's does."""
    env = vector(2, max_episode_steps=limit, episode_length=2)
    env.reset(seed=0)
    steps = operate(env, np.zeros((limit, 2, 4), dtype=np.float32))[:2]
    flags = [(bool(t.all()), bool(u.all())) for _, _, t, u, _ in steps]
    expected = {1: [(False, True)], 2: [(False, False), (True, True)]}
    assert flags == expected.get(limit, [(False, False), (True, False)])


# --- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seeds",
    [
        [5, 6, 7],
        (5, 6, 7),
        np.array([5, 6, 7]),
        [np.int64(5), np.uint8(6), np.int32(7)],
        np.int64(5),
        np.uint16(5),
    ],
)
def test_a_seed_counts_up_over_the_rows(seeds: Any) -> None:
    env, other = vector(3, injury=0.5), vector(3, injury=0.5)
    assert agree(env.reset(seed=seeds), other.reset(seed=5))
    assert agree(operate(env, choices(3)), operate(other, choices(3)))


def test_reset_with_a_seed_is_repeatable_and_without_goes_on() -> None:
    env, other = vector(injury=0.5), vector(injury=0.5)
    first = env.reset(seed=1)
    second = env.reset()
    assert not agree(first, second)
    assert agree(env.reset(seed=1), first)
    assert agree(env.reset(), second)
    other.reset(seed=9)
    operate(other, choices(3))
    assert agree(other.reset(seed=1), first)
    assert agree(other.reset(), second)


def test_the_first_reset_needs_no_seed_and_draws_another_operation_each_time() -> None:
    env, other = vector(), vector()
    first, second = env.reset()[0], other.reset()[0]
    assert first.tolist() != second.tolist()
    assert len({tuple(row) for row in first}) == 3


def test_rows_without_a_seed_of_their_own_go_on() -> None:
    env, other = vector(injury=0.5), vector(injury=0.5)
    for each in (env, other):
        each.reset(seed=0)
    found, expected = env.reset(seed=[None, 8, None]), other.reset()
    assert found[0][[0, 2]].tolist() == expected[0][[0, 2]].tolist()
    assert found[0][1].tolist() != expected[0][1].tolist()
    other.reset(seed=8)
    assert found[1]["score"][1] == pytest.approx(other.reset(seed=8)[1]["score"][0], abs=1e-4)


def test_seeds_of_rows_outside_the_mask_are_not_used() -> None:
    env, other = vector(injury=0.5), vector(injury=0.5)
    for each in (env, other):
        each.reset(seed=0)
    mask = np.array([False, True, False])
    env.reset(seed=[50, 8, 70], options={"reset_mask": mask})
    other.reset(seed=[None, 8, None], options={"reset_mask": mask})
    assert agree(operate(env, choices(5)), operate(other, choices(5)))


def test_rows_draw_from_generators_of_their_own() -> None:
    """What happens in one row moves no other's future."""
    env, other = vector(**BRUTAL), vector(**BRUTAL)
    for each in (env, other):
        each.reset(seed=0)
    quiet = np.zeros((3, 4), dtype=np.float32)
    lively = quiet.copy()
    lively[1] = KILL
    for _ in range(3):
        env.step(lively)
        other.step(quiet)
    draws = [[each._rngs[row].random() for row in range(3)] for each in (env, other)]
    assert [a == b for a, b in zip(*draws, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    "seed", [[1, 2], [1, 2, 3, 4], [1, 2.5, 3], 2.5, "abc", [1, 2, -3], True, {1: 2}, [1, 2, "3"]]
)
def test_bad_seeds_are_refused_and_change_nothing(seed: Any) -> None:
    env, twin = vector(), vector()
    for each in (env, twin):
        each.reset(seed=0)
    with pytest.raises(ValueError, match=r"^seed must be"):
        env.reset(seed=seed)
    assert agree(env.reset(), twin.reset())


def test_nothing_of_ours_touches_the_global_generators() -> None:
    states = global_random_states()
    for mode in MODES:
        env = vector(2, mode, injury=0.5, operator="spectral_bands")
        env.reset()
        operate(env, choices(3, 2, 8))
        env.reset(seed=0)
        env.step(choices(1, 2, 8)[0])
        env.set_state(copy.deepcopy(env.get_state()))
        env.commit(1)
    assert global_random_states() == states


# --- change and commit ---------------------------------------------------------------------------


def test_a_change_makes_every_row_stale_until_it_begins_anew() -> None:
    env = vector(3)
    env.reset(seed=0)
    env.model_changed()
    for refused in (lambda: env.step(choices(1)[0]), lambda: env.commit(0)):
        with pytest.raises(RuntimeError, match=r"the model .*reset\(\)|commit\(\) needs"):
            refused()
    env.reset(options={"reset_mask": np.array([True, True, False])})
    with pytest.raises(RuntimeError, match="the model changed during the operation"):
        env.step(choices(1)[0])
    env.reset(options={"reset_mask": np.array([False, False, True])})
    env.step(choices(1)[0])


def test_a_row_that_begins_in_the_next_step_is_not_stale() -> None:
    env = vector(2, NEXT_STEP)
    env.reset(seed=0)
    operate(env, choices(2, 2))
    env.model_changed()
    env.step(choices(1, 2)[0])
    env.step(choices(1, 2)[0])


@pytest.mark.parametrize("injury", [0.0, 0.5])
def test_commit_keeps_one_rows_operation_and_never_its_injury(injury: float) -> None:
    env = vector(3, injury=injury)
    with pytest.raises(RuntimeError, match=r"commit\(\) needs an operation"):
        env.commit(1)
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"commit\(\) needs an operation"):
        env.commit(1)  # nothing has been done that could be kept
    *_, infos = env.step(choices(1)[0])
    model = env.patient.model
    with SurgicalTheater(model, env.patient.targets) as theater:
        env.operator.apply(theater, infos["coefficients"][1])
        expected = fingerprint(model)
    before = fingerprint(model)
    env.commit(1)
    assert fingerprint(model) == expected != before
    for refused in (lambda: env.step(choices(1)[0]), lambda: env.commit(0)):
        with pytest.raises(RuntimeError, match="reset"):
            refused()
    if not injury:
        _, after = env.reset(seed=0)
        baselines, scored = after["baseline_terms"], infos["score_terms"]
        for name in baselines:
            assert baselines[name][1] == pytest.approx(scored[name][1], abs=1e-4)


@pytest.mark.parametrize("row", [3, 99, -1])
def test_commit_of_a_row_that_is_not_there_is_refused(row: int) -> None:
    env = vector(3)
    env.reset(seed=0)
    env.step(choices(1)[0])
    with pytest.raises(ValueError, match=rf"^row must be one of 0 to 2, got {row}$"):
        env.commit(row)


class Subclass(AttentionSurgeryVectorEnv):
    """One with a keyword of its own, which it hands on by mistake."""

    def __init__(self, *arguments: Any, extra: int = 1, **keywords: Any) -> None:
        super().__init__(*arguments, extra=extra, **keywords)


def test_a_subclass_keywords_are_not_the_environments() -> None:
    with pytest.raises(ValueError, match=r"keyword must be one of \[.*'corpus'.* argument 'extra'"):
        Subclass(2, tiny_patient())


def test_a_change_elsewhere_is_noticed() -> None:
    patient = tiny_patient()
    env, single = vector(2, patient=patient), tiny_env(patient)
    env.reset(seed=0)
    single.reset(seed=0)
    single.step(actions(1)[0])
    single.commit()
    with pytest.raises(RuntimeError, match="the model changed during the operation"):
        env.step(choices(1, 2)[0])
    env.reset()
    env.step(choices(1, 2)[0])
    env.commit(0)
    with pytest.raises(RuntimeError, match=r"the model changed|under way"):
        single.step(actions(1)[0])


def test_learning_between_operations_is_nobodys_reward() -> None:
    env = vector(3, n_prompts=3)
    env.reset(seed=0)
    env.patient.model.embed.weight.data.mul_(1.1)
    env.model_changed()
    env.reset()
    assert not any(step[1].any() for step in operate(env, np.zeros((2, 3, 4), np.float32)))


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_before", [1, 2])
def test_state_replays_exactly(n_before: int, mode: AutoresetMode) -> None:
    """Also from where rows have just ended."""
    env = vector(3, mode, injury=0.5)
    env.reset(seed=0)
    for move in choices(n_before):
        env.step(move)
    state = pickle.loads(pickle.dumps(env.get_state()))

    def future(each: AttentionSurgeryVectorEnv) -> list[Any]:
        begun = []
        if mode == DISABLED and n_before == 2:
            with pytest.raises(RuntimeError, match="reset"):
                each.step(choices(1)[0])
            begun = [each.reset(options={"reset_mask": np.array([True] * 3)})]
        return [*begun, operate(each, choices(3, seed=1)), each.reset()]

    expected = future(env)
    other = vector(3, mode, injury=0.5)
    for each in (env, other, other):
        each.set_state(state)
        assert agree(future(each), expected)


def test_a_state_is_a_copy() -> None:
    env, twin = vector(), vector()
    for each in (env, twin):
        each.reset(seed=0)
    state = env.get_state()
    state["episodes"][0].coefficients[:] = 1
    state["is_done"][:] = True
    state["rngs"][1].random()
    assert agree(operate(env, choices(3)), operate(twin, choices(3)))


def test_a_stale_state_stays_stale_row_by_row() -> None:
    env = vector(2)
    env.reset(seed=0)
    env.model_changed()
    env.reset(options={"reset_mask": np.array([True, False])})
    other = vector(2)
    other.set_state(env.get_state())
    with pytest.raises(RuntimeError, match="the model changed"):
        other.step(choices(1, 2)[0])


def test_state_before_the_first_reset() -> None:
    env, other = vector(), vector()
    other.reset(seed=0)
    other.set_state(env.get_state())
    with pytest.raises(RuntimeError, match="under way"):
        other.step(choices(1)[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("name", ["spectral_bands", "low_rank_seed"])
def test_copies_go_on_alike_on_a_model_of_their_own(
    name: str, duplicate: Callable[[Any], Any], folder: str
) -> None:
    env = gymnasium.make_vec(
        "AttentionSurgery-v0", num_envs=2, lm=folder, operator=name, injury=0.3, **BRIEF
    )
    env.reset(seed=0)
    n = env.single_action_space.shape[0]
    env.step(choices(1, 2, n)[0])
    other = duplicate(env)
    assert other.spec == env.spec
    assert other.autoreset_mode is env.autoreset_mode
    assert other.patient.model is not env.patient.model
    before = fingerprint(env.patient.model)
    other.commit(0)
    assert fingerprint(env.patient.model) == before != fingerprint(other.patient.model)
    other = duplicate(env)
    assert agree(operate(other, choices(3, 2, n)), operate(env, choices(3, 2, n)))


# --- what it leaves alone ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OPERATORS, "in_place"])
def test_the_model_is_unoperated_between_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "in_place", InPlaceGain)
    env = vector(2, operator=name, injury=0.3)
    env.patient.model.train()
    before = fingerprint(env.patient.model)
    env.reset(seed=0)
    for move in choices(3, 2, env.single_action_space.shape[0]):
        env.step(move)
        assert fingerprint(env.patient.model) == before
        assert count_hooks(env.patient.model) == 0
        assert env.patient.model.training


class Failing:
    """Writes as the real `generate` until it has done so `n` times, then fails."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.n, self.n_calls = error, 1000, 0
        self._generate = avatarl_env.patient.generate

    def __call__(self, model: Any, tokens: Any, *arguments: Any, **keywords: Any) -> Any:
        self.n_calls += 1
        if self.n_calls > self.n:
            model(tokens)  # with every hook in place
            raise self.error("stop")
        return self._generate(model, tokens, *arguments, **keywords)

    def after(self, n: int) -> None:
        self.n, self.n_calls = n, 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "error"), [("head_gain", KeyboardInterrupt), ("in_place", RuntimeError)]
)
def test_a_step_or_reset_that_fails_never_happened(
    name: str, error: type[BaseException], mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails: at a step, or where rows begin anew after theirs."""
    generate = Failing(error)
    monkeypatch.setitem(OPERATORS, "in_place", InPlaceGain)
    monkeypatch.setattr(avatarl_env.patient, "generate", generate)
    rules = {"operator": name, "injury": 0.3, "n_prompts": 4}
    env, twin = vector(2, mode, **rules), vector(2, mode, **rules)
    moves = choices(3, 2)
    for each in (env, twin):
        each.reset(seed=0)
        each.step(moves[0])
        each.reset(options={"reset_mask": np.array([True, False])})  # out of phase
    before, failures = fingerprint(env.patient.model), []
    for move in moves[1:]:
        generate.after(1000)
        expected = operate(twin, move[None])
        n_resets = len(expected) - 1  # the caller's own, in mode DISABLED
        n_evaluations = generate.n_calls if not n_resets else 1
        for n in range(n_evaluations):
            calls = [(lambda move=move: env.step(move), n), (lambda: env.reset(seed=5), min(n, 1))]
            for call, n_before in calls:
                generate.after(n_before)
                with pytest.raises(error, match="stop"):
                    call()
                assert fingerprint(env.patient.model) == before
                assert count_hooks(env.patient.model) == 0
        failures.append(n_evaluations)
        generate.after(1000)
        assert agree(operate(env, move[None]), expected)
    assert mode == DISABLED or max(failures) > 1


BAD_ACTIONS: list[Any] = [
    np.zeros((2, 4), dtype=np.float32),
    np.zeros((3, 3), dtype=np.float32),
    np.zeros(12, dtype=np.float32),
    np.float32(0.5),
    None,
    np.array([SPARE, SPARE, [0, np.nan, 0, 0]], dtype=np.float32),
    np.array([[0, 0, 0, np.inf], SPARE, SPARE], dtype=np.float32),
    [["sharper"] * 4] * 3,
]


@pytest.mark.parametrize("mode", MODES)
def test_bad_actions_are_refused_in_one_line_and_change_nothing(mode: AutoresetMode) -> None:
    env, twin = vector(3, mode), vector(3, mode)
    for each in (env, twin):
        each.reset(seed=0)
    message = r"^actions must (have shape \(3, 4\)|be numbers, got)|^action must be \(4,\) finite"
    for action in BAD_ACTIONS:
        with pytest.raises(ValueError, match=message) as caught:
            env.step(action)
        assert "\n" not in str(caught.value)
    assert agree(operate(env, choices(4)), operate(twin, choices(4)))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_returned_is_the_callers_to_spoil(mode: AutoresetMode) -> None:
    env, twin = vector(3, mode, injury=0.5), vector(3, mode, injury=0.5)
    seen: list[Any] = [env.reset(seed=0)]
    twin.reset(seed=0)
    for move in choices(5):
        given = move.copy()
        found, expected = operate(env, given[None]), operate(twin, move[None])
        assert_agree(found, expected)
        assert given.tolist() == move.tolist()
        for now in arrays(found):
            assert not any(np.shares_memory(now, then) for then in arrays(seen))
        seen.append(found)
        for array in arrays(found):
            if array.dtype != object:
                array[...] = 1
        given[...] = np.nan


def test_a_step_returns_the_types_of_gymnasiums() -> None:
    env = vector()
    observations, infos = env.reset(seed=0)
    assert observations.dtype == np.float32
    observations, rewards, terminated, truncated, infos = env.step(choices(1)[0])
    assert observations in env.observation_space
    assert rewards.dtype == np.float64
    assert terminated.dtype == truncated.dtype == np.bool_
    assert infos["score"].dtype == np.float64


# --- rendering -----------------------------------------------------------------------------------


def test_each_row_is_rendered_as_its_single_environment() -> None:
    env, other = vector(2, DISABLED, render_mode="ansi"), separate(2, DISABLED, render_mode="ansi")
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.render()
    for each in (env, other):
        each.reset(seed=0)
        each.step(choices(1, 2)[0])
    assert env.render() == other.render()
    assert env.render()[0] != env.render()[1]
    silent = vector(2)
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert silent.render() is None


# --- gymnasium's wrappers ------------------------------------------------------------------------


def test_episode_statistics_are_the_improvements() -> None:
    env = wrappers.RecordEpisodeStatistics(vector(3))
    env.reset(seed=0)
    *_, infos = operate(env, choices(4))[-1]
    assert infos["episode"]["l"].tolist() == [2, 2, 2]
    assert infos["episode"]["r"] == pytest.approx(infos["final_info"]["improvement"], abs=1e-6)


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP])
def test_rewards_can_be_normalised_and_clipped(mode: AutoresetMode) -> None:
    plain, clipped = vector(3, mode), wrappers.ClipReward(vector(3, mode), -1e-3, 1e-3)
    scaled = wrappers.NormalizeReward(vector(3, mode), gamma=1.0)
    for env in (plain, clipped, scaled):
        env.reset(seed=0)
    for move in choices(5):
        (_, rewards, *_), (_, small, *_), (_, unit, *_) = (
            env.step(move) for env in (plain, clipped, scaled)
        )
        assert small == pytest.approx(rewards.clip(-1e-3, 1e-3))
        assert np.isfinite(unit).all()
        assert (np.sign(unit) == np.sign(rewards)).all()


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP])
def test_actions_can_be_rescaled(mode: AutoresetMode) -> None:
    low, high = np.zeros(4, dtype=np.float32), np.ones(4, dtype=np.float32)
    env, plain = wrappers.RescaleAction(vector(3, mode), low, high), vector(3, mode)
    for each in (env, plain):
        each.reset(seed=0)
    for move in choices(3):
        assert_agree(env.step((move + 1) / 2), plain.step(move), 1e-4)


def test_observations_can_be_normalised_in_mode_next_step_only() -> None:
    env = wrappers.NormalizeObservation(vector(3, NEXT_STEP))
    observations, _ = env.reset(seed=0)
    for move in choices(5):
        observations, *_ = env.step(move)
        assert np.isfinite(observations).all()
    with pytest.raises(ValueError, match="Expected autoreset_mode to be NEXT_STEP"):
        wrappers.NormalizeObservation(vector(3, SAME_STEP))


def test_infos_can_be_listed_row_by_row() -> None:
    env = wrappers.DictInfoToList(vector(3, **BRUTAL))
    _, rows = env.reset(seed=0)
    assert len(rows) == 3
    *_, rows = env.step(np.array([KILL, SPARE, SPARE], dtype=np.float32))
    assert rows[0]["final_info"]["flatline"] == "non-finite logits"
    assert "final_info" not in rows[1]
    assert isinstance(env.unwrapped, AttentionSurgeryVectorEnv)
    assert not isinstance(env.unwrapped, AttentionSurgeryEnv)
