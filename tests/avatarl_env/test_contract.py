"""The contract of both environments, with every operator.

An operator added to `OPERATORS` is tested here without further code.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import nn

from avatarl_env.patient import Patient
from avatarl_env.surgery import OPERATORS, SurgicalTheater
from avatarl_env.verification import verify
from tests.fakes import fingerprint
from tests.patients import (
    SIZES,
    actions,
    count_hooks,
    plain,
    tiny_env,
    tiny_patient,
    tiny_vector_env,
)

ENV_ID = "avatarl_env:AttentionSurgery-v0"
BRIEF: dict[str, Any] = {**SIZES, "n_prompts": 4, "episode_length": 3}
NAMES = [*OPERATORS, "in_place"]
KINDS = ["single", "NextStep", "SameStep", "Disabled"]
pytestmark = pytest.mark.usefixtures("in_place")


def make(kind: str, patient: Patient | None = None, **keywords: Any) -> Any:
    """Return a single environment, or a vector environment of two rows with an autoreset mode."""
    if kind == "single":
        return tiny_env(patient, **{**BRIEF, **keywords})
    return tiny_vector_env(2, patient, autoreset_mode=kind, **{**BRIEF, **keywords})


def moves(env: Any, n: int, seed: int = 0) -> np.ndarray:
    """Draw n actions that are small enough to be survived."""
    shape = env.action_space.shape
    return 0.3 * actions(n, int(np.prod(shape)), seed).reshape(n, *shape)


def rollout(env: Any, acts: np.ndarray) -> list[Any]:
    """Step through `acts`, reset where the caller must; return everything that was returned."""
    seen: list[Any] = []
    for act in acts:
        seen.append(env.step(act))
        ended = seen[-1][2] | seen[-1][3]
        if isinstance(ended, bool):
            if ended:
                seen.append(env.reset())
        elif env.metadata["autoreset_mode"].value == "Disabled" and ended.any():
            seen.append(env.reset(options={"reset_mask": ended}))
    return plain(seen)


def rewards(env: Any, acts: np.ndarray) -> np.ndarray:
    return np.array([env.step(act)[1] for act in acts])


def commit(env: Any) -> None:
    env.commit(*([] if isinstance(env, gymnasium.Env) else [0]))


# --- checkers of other libraries ------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        *({"operator": name, "injury": 0.3} for name in NAMES),
        {"episode_length": 1, "step_size": 1.0, "injury": [0.5, -0.25, 0.0, 1.0]},
        {"score": {"collision_l2": 1.0}, "operator_options": {"tied": False, "scale": 3.0}},
        {"render_mode": "ansi", "split": "train", "flatline_penalty": 0},
    ],
    ids=str,
)
def test_both_checkers_pass_without_a_warning(keywords: dict[str, Any], folder: str) -> None:
    env = gymnasium.make(ENV_ID, lm=folder, **{**BRIEF, **keywords}).unwrapped
    check_env(env, skip_render_check=True)
    sb3_check_env(env)


@pytest.mark.parametrize("render_mode", ["ansi", "rgb_array"])
def test_gymnasium_renders_every_mode(render_mode: str, folder: str) -> None:
    check_env(gymnasium.make(ENV_ID, lm=folder, render_mode=render_mode, **BRIEF).unwrapped)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("head_gain", {"tied": False, "scale": 0.5}),
        ("spectral_bands", {"projections": ["query", "value"], "n_bands": 2}),
        ("low_rank_seed", {"n_directions": 3, "rank": 2, "seed": 5}),
    ],
)
def test_a_spec_survives_json(
    operator: str, options: dict[str, object], vector: bool, folder: str
) -> None:
    keywords = {
        **BRIEF,
        "lm": folder,
        "operator": operator,
        "operator_options": options,
        "layers": [-1, "blocks.0.*"],
        "score": {"kl_ref": 1.0, "distinct": 0.1},
        "injury": 0.5,
        "render_mode": "ansi",
    }
    if vector:
        keywords |= {"num_envs": 2, "autoreset_mode": "SameStep"}
    maker = gymnasium.make_vec if vector else gymnasium.make
    env = maker(ENV_ID, **keywords)
    restored = EnvSpec.from_json(env.spec.to_json())
    assert restored == env.spec
    again = maker(restored)
    assert again.unwrapped.render_mode == "ansi"
    assert plain(again.reset(seed=3)) == plain(env.reset(seed=3))
    acts = moves(env, 3)
    assert rewards(again, acts).tolist() == rewards(env, acts).tolist()


# --- weights and rewards --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "SameStep"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_unoperated_between_calls_and_its_mode_is_kept(name: str, kind: str) -> None:
    env = make(kind, operator=name, injury=0.3)
    model = env.patient.model.train()
    before = fingerprint(model)
    env.reset(seed=0)
    paid = []
    for act in moves(env, 3):
        paid.append(env.step(act)[1])
        assert fingerprint(model) == before
        assert count_hooks(model) == 0
        assert model.training
    assert np.any(paid)


@pytest.mark.parametrize(("kind", "injury"), [("single", 0.3), ("SameStep", 0.3), ("SameStep", 0)])
@pytest.mark.parametrize("name", NAMES)
def test_zero_actions_earn_exactly_zero(name: str, kind: str, injury: float) -> None:
    """Without rounding errors, which depend on the size of a batch."""
    env = make(kind, operator=name, injury=injury)
    env.reset(seed=0)
    assert not rewards(env, 0 * moves(env, 3)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_add_up_to_the_improvement(kind: str) -> None:
    score = {"heldout_loss": 0.3, "distinct": 1.7, "entropy": -0.1}
    env = make(kind, injury=0.5, score=score, n_prompts=32)
    env.reset(seed=0)
    steps = [env.step(act) for act in moves(env, 3)]
    total = sum(step[1] for step in steps)
    info = steps[-1][4].get("final_info", steps[-1][4])
    assert np.all(steps[-1][2])
    assert np.array_equal(total, info["improvement"])
    assert np.all(total != 0)


@pytest.mark.parametrize("kind", ["single", "Disabled"])
def test_max_coefficient_limits_the_coefficients(kind: str) -> None:
    """Verification applies the same limit; the default is no limit."""
    env = make(kind, max_coefficient=0.1, n_prompts=32)
    env.reset(seed=5)
    acts = np.ones((3, *env.action_space.shape), np.float32)
    steps = [env.step(act) for act in acts]
    assert all((step[4]["coefficients"] == 0.1).all() for step in steps)
    assert not np.any(steps[1][1])
    mine = acts if kind == "single" else acts[:, 0]
    assert verify(env.task, mine, 5, float(np.ravel(steps[0][1])[0])).agrees
    assert make(kind, max_coefficient=1).config == make(kind).config


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["head_gain", "low_rank_seed", "in_place"])
def test_a_seed_determines_everything(name: str, kind: str) -> None:
    """To the last bit, including later resets without a seed, whatever was done before."""
    env, other = (make(kind, operator=name, injury=0.3) for _ in range(2))
    acts = moves(env, 5)
    other.reset(seed=9)
    rollout(other, acts[:2])
    other.action_space.sample()
    first, second = ([plain(each.reset(seed=3)), rollout(each, acts)] for each in (env, other))
    assert first == second
    assert plain(env.reset()) == plain(other.reset()) != first[0]
    assert plain(env.reset(seed=4)) != first[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_before", [1, 3])
def test_a_state_replays_exactly(n_before: int, kind: str) -> None:
    """Also from the end of an operation, and after pickling."""
    env = make(kind, injury=0.3)
    env.reset(seed=0)
    acts = moves(env, 8)
    for act in acts[:n_before]:
        env.step(act)
    state = env.get_state()
    stored = pickle.loads(pickle.dumps(state))
    over = n_before == 3 and kind in ("single", "Disabled")

    def future(each: Any) -> list[Any]:
        if over:
            with pytest.raises(RuntimeError, match=r"reset\(\)"):
                each.step(acts[0])
            each.reset()
        return [rollout(each, acts[n_before:]), plain(each.reset())]

    expected, other = future(env), make(kind, injury=0.3)
    for each, kept in ((env, state), (other, stored), (other, stored)):
        each.set_state(kept)
        assert future(each) == expected


@pytest.mark.parametrize(
    ("kind", "duplicate"),
    [("single", lambda env: pickle.loads(pickle.dumps(env))), ("SameStep", copy.deepcopy)],
)
@pytest.mark.parametrize("name", NAMES)
def test_copies_continue_identically_on_their_own_model(
    name: str, kind: str, duplicate: Callable[[Any], Any]
) -> None:
    env = make(kind, operator=name, injury=0.3)
    env.reset(seed=0)
    acts = moves(env, 4)
    env.step(acts[0])
    other, spoilt = duplicate(env), duplicate(env)
    before = fingerprint(env.patient.model)
    commit(spoilt)
    assert fingerprint(env.patient.model) == before != fingerprint(spoilt.patient.model)
    assert rollout(other, acts[1:]) == rollout(env, acts[1:])


def test_a_fork_continues_as_its_parent_without_changing_it() -> None:
    env = make("single", injury=0.3)
    env.action_space.seed(0)
    env.reset(seed=0)
    acts = moves(env, 5)
    env.step(acts[0])
    fork, again = env.fork(), env.fork()
    assert fork.patient is env.patient
    first = rollout(fork, acts[1:])
    assert fork.action_space.sample().tolist() == env.action_space.sample().tolist()
    assert rollout(again, acts[1:]) == first == rollout(env, acts[1:])


@pytest.mark.parametrize("kind", ["single", "SameStep", "NextStep"])
def test_returned_arrays_belong_to_the_caller(kind: str) -> None:
    env, twin = make(kind, injury=0.3), make(kind, injury=0.3)
    env.reset(seed=0)
    twin.reset(seed=0)
    for act in moves(env, 5):
        given = act.copy()
        observation, *_, info = step = env.step(given)
        assert plain(step) == plain(twin.step(act))
        assert given.tolist() == act.tolist()
        for array in (observation, info["coefficients"], given):
            array[...] = 0.5
        info["score_terms"].clear()
        if kind == "single" and step[2]:
            assert plain(env.reset()) == plain(twin.reset())


# --- commit and change ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "injury"), [("single", 0.5), ("SameStep", 0.0)])
@pytest.mark.parametrize("name", NAMES)
def test_a_commit_keeps_the_operation_and_never_the_injury(
    name: str, injury: float, kind: str
) -> None:
    env = make(kind, operator=name, injury=injury)
    with pytest.raises(RuntimeError, match=r"commit\(\) needs an operation"):
        commit(env)
    env.reset(seed=0)
    *_, info = env.step(moves(env, 1)[0])
    model = env.patient.model
    coefficients = np.reshape(info["coefficients"], (-1, len(env.operator.labels)))[0]
    with SurgicalTheater(model, [env.operator]) as theater:
        env.operator.apply(theater, coefficients)
        expected = fingerprint(model)
    parameters, places = [*model.parameters()], [p.data_ptr() for p in model.parameters()]
    before = fingerprint(model)
    commit(env)
    assert fingerprint(model) == expected != before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == places
    for refused in (lambda: env.step(moves(env, 1)[0]), lambda: commit(env)):
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            refused()
    _, start = env.reset(seed=0)
    assert not rewards(env, 0 * moves(env, 1)).any()
    if not injury:
        for term, value in start["baseline_terms"].items():
            scored = np.ravel(info["score_terms"][term])[0]
            assert np.ravel(value)[0] == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_model_invalidates_every_operation_on_it(kind: str) -> None:
    """Forks and other environments may share the model."""
    patient = tiny_patient()
    env, other, bystander = make(kind, patient), make("single", patient), make(kind)
    for each in (env, other, bystander):
        each.reset(seed=0)
    fork, state, act = other.fork(), env.get_state(), moves(env, 1)[0]
    other.step(moves(other, 1)[0])
    other.commit()
    env.set_state(state)  # from before the change
    later = make(kind)
    later.set_state(env.get_state())  # an invalid operation is not part of a state
    for each in (env, fork, later):
        with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
            each.step(moves(each, 1)[0])
        each.reset()
        each.step(moves(each, 1)[0])
    bystander.step(act)
    env.model_changed()
    with pytest.raises(RuntimeError, match="the model changed during the operation"):
        env.step(act)


# --- failures -------------------------------------------------------------------------------------


@contextmanager
def failing(model: nn.Module, n: int, error: type[BaseException]) -> Iterator[None]:
    """Let n forwards succeed and the next one raise, which is expected."""
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) > n:
            raise error("stop")

    hook = model.blocks[1].register_forward_hook(count)
    before = fingerprint(model)
    try:
        with pytest.raises(error, match="stop"):
            yield
    finally:
        hook.remove()
    assert fingerprint(model) == before
    assert count_hooks(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["head_gain", "in_place"])
def test_a_failed_step_changes_nothing(name: str, kind: str, error: type[BaseException]) -> None:
    env, twin = (make(kind, operator=name, injury=0.3) for _ in range(2))
    acts = moves(env, 4)
    for each in (env, twin):
        each.reset(seed=0)
        each.step(acts[0])
    for n in (0, 3):
        with failing(env.patient.model, n, error):
            env.step(acts[3])
    assert rollout(env, acts[1:]) == rollout(twin, acts[1:])


@pytest.mark.parametrize(("name", "n_of_step"), [("head_gain", 4), ("in_place", 8)])
def test_a_failed_reset_of_rows_changes_nothing(name: str, n_of_step: int) -> None:
    """Whether the caller resets or the autoreset does."""
    rules: dict[str, Any] = {"operator": name, "injury": 0.3, "episode_length": 2}
    env, twin = make("SameStep", **rules), make("SameStep", **rules)
    acts = moves(env, 4)
    for each in (env, twin):
        each.reset(seed=0)
        each.step(acts[0])
    for n in (0, 5):  # the healthy and the injured evaluation
        with failing(env.patient.model, n, RuntimeError):
            env.reset(seed=5)
        with failing(env.patient.model, n_of_step + n, RuntimeError):
            env.step(acts[1])
    assert rollout(env, acts[1:]) == rollout(twin, acts[1:])


# --- verification ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "injury"), [("single", 0.4), ("Disabled", 0.0)])
@pytest.mark.parametrize("name", NAMES)
def test_a_correct_record_is_confirmed(name: str, injury: float, kind: str) -> None:
    env, judge = make(kind, operator=name, injury=injury), make(kind, operator=name, injury=injury)
    env.reset(seed=5)
    acts = moves(env, 3)
    totals = np.ravel(rewards(env, acts).sum(0))
    for row, total in enumerate(totals):
        mine = acts if kind == "single" else acts[:, row]
        found = verify(judge.task, mine, 5 + row, float(total))
        assert (found.agrees, found.reason) == (True, "")
        assert found.recomputed == pytest.approx(found.total, abs=1e-4) != 0
        json.dumps(found._asdict())
