"""What every surgeon of the registry promises; a new one is tested here without further ado."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.surgeons.algorithms import ALGORITHMS, class_of
from agents.surgeons.base import Surgeon
from agents.surgeons.episodes import check_records
from agents.surgeons.registry import (
    NONE,
    SURGEONS,
    EpisodeRecord,
    check_surgeon,
    load_surgeon,
    make_surgeon,
    save_surgeon,
)
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import tiny_patient
from tests.training_runs import QUICK_SAC, first_actions, small_env

every_surgeon = pytest.mark.parametrize("name", sorted(SURGEONS))
NOT_DETERMINISTIC = {"random", "replay"}


patient = functools.cache(tiny_patient)


def new_env(n_rows: int = 2, **rules: Any) -> AttentionSurgeryVectorEnv:
    """Return an environment on one patient for all tests: operations leave it as it is."""
    return small_env(patient(), n_rows, **rules)


@functools.cache
def trained_folder() -> str:
    """Return a folder with a surgeon that `replay` can repeat."""
    import tempfile

    folder = tempfile.mkdtemp()
    save_surgeon(make_surgeon("random", new_env(), 0), folder, "random", 0)
    return folder


def options_of(name: str) -> dict[str, Any]:
    """Return options with which a surgeon learns early and cheaply."""
    if name == "replay":
        return {"source": trained_folder()}
    if name not in ALGORITHMS:
        return {}
    quick = {key: value for key, value in QUICK_SAC.items() if key in ALGORITHMS[name].options}
    has_epochs = "n_epochs" in inspect.signature(class_of(ALGORITHMS[name])).parameters
    return {**quick, "n_epochs": 2} if has_epochs else quick


def make(name: str, env: AttentionSurgeryVectorEnv | None = None, seed: int = 0) -> Surgeon:
    return make_surgeon(name, env or new_env(), seed, options_of(name))


@functools.cache
def practised(name: str) -> tuple[Surgeon, AttentionSurgeryVectorEnv]:
    """Return a surgeon that has operated, for tests that only look; they share it."""
    env = new_env(3)
    surgeon = make(name, env)
    surgeon.operate(2)
    return surgeon, env


def check(record: EpisodeRecord, n_coefficients: int = 4) -> None:
    """Check that the parts of a record fit together."""
    assert 1 <= record.length <= 2
    assert record.length == 2 or record.flatline is not None
    assert 0 <= record.mean_abs_action <= 1
    assert record.coefficients.shape == (n_coefficients,)
    assert np.abs(record.coefficients).max() <= 1
    improvement = record.terms["kl_ref"] - record.baseline_terms["kl_ref"]
    expected = improvement if record.flatline is None else min(-1.0, improvement)
    assert record.total == pytest.approx(expected, abs=1e-9)


def essence(records: list[EpisodeRecord]) -> list[Any]:
    return [(r.total, r.row, r.coefficients.tolist(), r.baseline_terms) for r in records]


@every_surgeon
def test_a_round_is_whole_operations_on_every_row_and_starts_with_a_reset(name: str) -> None:
    env = new_env(3, operator_options={"scale": 0.05})  # no operation flatlines
    surgeon = make(name, env)
    for n_operations in (2, 1):
        records = surgeon.operate(n_operations)
        check_records(records)
        rows = [record.row for record in records]
        assert {rows.count(row) for row in range(3)} == {len(records) // 3}
        assert len(records) >= 3 * n_operations
        assert all(record.length == 2 for record in records)
        for record in records:
            check(record)
        env.model_changed()  # operations in progress are void


@pytest.mark.parametrize("name", ["sac", "random", "es"])
def test_a_row_whose_patient_flatlines_continues_with_another_operation(name: str) -> None:
    hot = {"operator": "output_temperature", "operator_options": {"scale": 8.0}}
    surgeon = make(name, new_env(3, **hot))
    records = surgeon.operate(4)
    assert {record.length for record in records} == {1, 2}
    for record in records + surgeon.operate(1):
        check(record, n_coefficients=1)


@every_surgeon
def test_actions_are_those_of_the_action_space_for_any_number_of_rows(name: str) -> None:
    surgeon, env = practised(name)
    for each in (surgeon, make(name, env)):
        for n_rows in (1, 3, 5):
            other = new_env(n_rows)
            observations, _ = other.reset(seed=0)
            seen = observations.copy()
            actions = first_actions(each, observations)
            assert actions.dtype == np.float32
            assert other.action_space.contains(actions)
            assert observations.tolist() == seen.tolist()
            if name not in NOT_DETERMINISTIC:
                again = first_actions(each, observations[:1])  # whatever the other rows
                np.testing.assert_allclose(again[0], actions[0], atol=1e-6)


@every_surgeon
@pytest.mark.parametrize("has_operated", [False, True])
def test_acting_leaves_operations_in_progress_alone(name: str, has_operated: bool) -> None:
    surgeon, env = practised(name)
    surgeon = surgeon if has_operated else make(name, env)
    observations, _ = env.reset(seed=0)
    before = env.get_rng_state()
    first_actions(surgeon, observations)
    assert env.get_rng_state() == before
    env.step(np.zeros((3, 4), np.float32))


@every_surgeon
def test_metrics_are_finite_floats(name: str) -> None:
    for metric, number in practised(name)[0].stats().items():
        assert metric.startswith("surgeon/")
        assert type(number) is float
        assert np.isfinite(number)


@every_surgeon
def test_the_seed_decides_everything(name: str) -> None:
    first = [make(name, seed=seed).operate(1) for seed in (3, 3, 4)]
    assert essence(first[0]) == essence(first[1])
    for left in first[0]:
        for right in first[2]:
            assert left.baseline_terms != right.baseline_terms  # neighbours share no prompts


def from_checkpoint(value: Any) -> Any:
    """Return a state as it comes back from a file: lists and tensors."""
    if isinstance(value, Mapping):
        return {key: from_checkpoint(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [from_checkpoint(item) for item in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


@every_surgeon
def test_a_saved_surgeon_continues_exactly_whatever_others_draw(name: str, tmp_path: Path) -> None:
    env = new_env()
    surgeon = make(name, env, seed=5)
    surgeon.operate(1)
    save_surgeon(surgeon, tmp_path, name, 5, options_of(name))
    state = from_checkpoint(surgeon.get_state())
    loaded = load_surgeon(tmp_path, new_env())
    observations = env.reset(seed=9)[0]
    if name not in NOT_DETERMINISTIC:
        expected = first_actions(surgeon, observations)
        assert np.array_equal(first_actions(loaded, observations), expected)
    surgeon.set_state(state)  # the reset has drawn prompts
    torch.rand(3)
    expected_records = essence(surgeon.operate(2))
    loaded.set_state(state)
    assert essence(loaded.operate(2)) == expected_records
    assert dict(loaded.stats()) == dict(surgeon.stats())
    actions = [first_actions(each, observations) for each in (surgeon, loaded)]
    assert np.array_equal(*actions) or name in NOT_DETERMINISTIC


# Names and options.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("randm", {}, r"surgeon .*'randm', did you mean 'random'"),
        (NONE, {}, "surgeon .*'none'"),
        ("zero", {"sigma": 1}, "zero option .*'sigma'"),
        ("replay", {}, "'replay' .*'source'"),
        ("replay", {"source": "x", "n_operations": 0}, "n_operations .*at least 1.*0"),
        ("replay", {"source": "x", "n_operations": 1.5}, "n_operations must be int.*1.5"),
        ("cma_es", {"sigm": 1}, "'sigm', did you mean 'sigma'"),
        *[
            (name, {"sigma": value}, f"sigma .*{value}")
            for name in ("cma_es", "es")
            for value in (0, -1.0, float("nan"), float("inf"), None, "abc", True)
        ],
        ("es", {"learning_rate": -1}, "learning_rate .*-1"),
        ("sac", {"learning_rat": 1}, "did you mean 'learning_rate'"),
        ("sac", {"env": 1}, "sac option .*'env'"),
        ("sac", {"seed": 1}, "sac option .*'seed'"),
        ("sac", {"learning_rate": "abc"}, "learning_rate must be float or .*'abc'"),
        ("sac", {"learning_rate": float("nan")}, "learning_rate must be finite.*nan"),
        ("sac", {"learning_rate": -1}, "learning_rate must be at least 0.*-1"),
        ("sac", {"gradient_steps": 1.5}, "gradient_steps must be int.*1.5"),
        ("sac", {"gradient_steps": True}, "gradient_steps must be int.*True"),
        ("sac", {"use_sde": 1}, "use_sde must be bool.*1"),
        ("sac", {"batch_size": 0}, "batch_size must be at least 2.*0"),
        ("sac", {"policy_kwargs": {"quux": 1}}, "'sac' .*options.*quux"),
        ("td3", {"action_noise": -1}, "action_noise must be at least 0.*-1"),
        ("td3", {"action_noise": True}, "action_noise must be .*True"),
        ("ppo", {"clip_range_vf": "x"}, "clip_range_vf must be .*'x'"),
        ("ars", {"n_delta": 0}, "n_delta must be at least 1.*0"),
    ],
)
def test_a_name_or_an_option_that_does_not_fit_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_surgeon(name, new_env(), 0, options)
    assert "\n" not in str(caught.value)


def test_no_surgeon_is_a_choice_without_options() -> None:
    check_surgeon(NONE, {})
    check_surgeon("zero", {"x": 1})  # refused where it is made
    with pytest.raises(ValueError, match=r"surgeon_options must be empty .*'none'.*'x'"):
        check_surgeon(NONE, {"x": 1})


@pytest.mark.parametrize(("name", "library"), [("tqc", "sb3_contrib"), ("cma_es", "cmaes")])
def test_a_surgeon_whose_library_is_absent_says_how_to_get_it(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}: pip install 'avatarl-env\["):
        make_surgeon(name, new_env(), 0)


# A surgeon of one's own.


class Steady(Surgeon):
    """The least that a surgeon can be, with an option."""

    def __init__(self, env: AttentionSurgeryVectorEnv, seed: int, *, effort: float = 0.1) -> None:
        super().__init__(env, seed)
        self.effort = effort

    def act(self, observations: np.ndarray, begins: np.ndarray) -> np.ndarray:
        return np.full((len(observations), self.n_coefficients), self.effort, np.float32)


class TakesNothing(Steady):
    def operate(self) -> Any:  # type: ignore[override]
        return []


class KeepsAnObject(Steady):
    def get_state(self) -> Any:
        return {"me": self}


class KeepsNothing(Steady):
    def get_state(self) -> Any:
        return None


class CannotAct(Surgeon):
    pass


def test_a_surgeon_of_ones_own_needs_one_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SURGEONS, "mine", Steady)
    surgeon = make_surgeon("mine", new_env(), 0, {"effort": 0.2})
    assert [r.coefficients.tolist() for r in surgeon.operate(1)] == [[pytest.approx(0.2)] * 4] * 2
    save_surgeon(surgeon, tmp_path, "mine", 0, {"effort": 0.2})
    loaded = load_surgeon(tmp_path, new_env())
    loaded.set_state(surgeon.get_state())
    assert essence(loaded.operate(1)) == essence(surgeon.operate(1))
    assert surgeon.stats() == {}
    with pytest.raises(ValueError, match=r"mine option effort must be float.*'x'"):
        make_surgeon("mine", new_env(), 0, {"effort": "x"})


@pytest.mark.parametrize(
    ("surgeon", "message"),
    [
        (CannotAct, "'mine' .*act"),
        (TakesNothing, r"'mine' .*operate\(n_operations\)"),
        (KeepsAnObject, "'mine' .*get_state.*'me'"),
        (KeepsNothing, "'mine' .*get_state.*None"),
        (lambda env, seed: None, "'mine' .*base.Surgeon.*None"),
    ],
)
def test_a_surgeon_of_ones_own_that_lacks_something_is_refused_when_it_is_made(
    surgeon: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SURGEONS, "mine", surgeon)
    with pytest.raises(ValueError, match=message):
        make_surgeon("mine", new_env(), 0)


@pytest.mark.parametrize("records", [None, (), [1.0]])
def test_what_is_not_a_list_of_records_is_refused(records: object) -> None:
    with pytest.raises(TypeError, match=r"operate .*EpisodeRecord"):
        check_records(records)


# Stored nonsense.


@pytest.mark.parametrize(
    "about",
    [
        None,
        "[]",
        '{"surgeon": ',
        '{"seed": 0, "options": {}}',
        '{"surgeon": [], "seed": 0, "options": {}}',
        '{"surgeon": "zero", "seed": "0", "options": {}}',
        '{"surgeon": "zero", "seed": 0, "options": {"sigma": 1}}',
        '{"surgeon": "es", "seed": 0, "options": {}}',
        '{"surgeon": "replay", "seed": 0, "options": {"source": "FOLDER"}}',
    ],
)
def test_a_folder_without_a_whole_surgeon_is_refused_in_a_line(
    about: str | None, tmp_path: Path
) -> None:
    if about is not None:
        content = about.replace("FOLDER", str(tmp_path))
        (tmp_path / "surgeon.json").write_text(content, encoding="utf-8")
        (tmp_path / "surgeon_search.json").write_text('{"about": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^(folder|surgeon|zero option) ") as caught:
        load_surgeon(tmp_path, new_env())
    assert "\n" not in str(caught.value)
