from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agents.surgeons import NONE, SURGEONS, Surgeon, check_surgeon, make_surgeon
from avatarl_env.env import AttentionSurgeryEnv
from tests.patients import global_random_states
from tests.training_runs import ToyOperation, quick_sac, small_env  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick_sac")
every_surgeon = pytest.mark.parametrize("name", sorted(SURGEONS))


def make(name: str, env: AttentionSurgeryEnv | None = None, seed: int = 0) -> Surgeon:
    return make_surgeon(name, env or small_env(), seed)


def test_these_are_the_surgeons() -> None:
    assert set(SURGEONS) == {"sac", "random", "zero"}


@every_surgeon
def test_a_round_is_as_many_whole_operations_as_were_asked_for(name: str) -> None:
    surgeon = make(name)
    for n_operations in (3, 1):
        records = surgeon.operate(n_operations)
        assert len(records) == n_operations
        for record in records:
            assert 1 <= record.length <= 2
            assert record.length == 2 or record.flatline is not None
            assert np.isfinite(record.total)
            assert 0 <= record.mean_abs_action <= 1
            assert record.coefficients.shape == (4,)
            assert np.abs(record.coefficients).max() <= 1
            assert record.terms.keys() == record.baseline_terms.keys()


@every_surgeon
def test_returns_are_the_improvement_of_the_score(name: str) -> None:
    for record in make(name).operate(3):
        improvement = record.terms["kl_ref"] - record.baseline_terms["kl_ref"]
        expected = improvement if record.flatline is None else -1.0
        assert record.total == pytest.approx(expected, abs=1e-9)


@every_surgeon
def test_an_action_is_one_of_the_action_space(name: str) -> None:
    env = small_env()
    surgeon = make(name, env)
    observation, _ = env.reset(seed=0)
    for _ in range(2):
        action = surgeon.act(observation)
        assert action.dtype == np.float32
        assert env.action_space.contains(action)
        surgeon.operate(3)
        observation, _ = env.reset(seed=1)


@pytest.mark.parametrize("name", sorted(set(SURGEONS) - {"random"}))
def test_actions_are_deterministic(name: str) -> None:
    env = small_env()
    surgeon = make(name, env)
    surgeon.operate(3)
    observation, _ = env.reset(seed=0)
    assert surgeon.act(observation).tolist() == surgeon.act(observation).tolist()


@every_surgeon
def test_statistics_are_finite_numbers_by_metric_name(name: str) -> None:
    surgeon = make(name)
    surgeon.operate(4)
    stats = surgeon.stats()
    assert bool(stats) == (name == "sac")
    for metric, number in stats.items():
        assert metric.startswith("surgeon/")
        assert type(number) is float
        assert np.isfinite(number)


@every_surgeon
def test_nothing_a_surgeon_does_touches_the_global_generators(name: str, tmp_path: Path) -> None:
    env = small_env()
    before = global_random_states()
    surgeon = make(name, env)
    surgeon.operate(3)
    surgeon.act(env.reset()[0])
    surgeon.stats()
    surgeon.save(tmp_path)
    assert global_random_states() == before


@every_surgeon
def test_the_same_seed_gives_the_same_operations(name: str) -> None:
    def run(seed: int) -> list[tuple[float, list[float]]]:
        surgeon = make(name, seed=seed)
        records = surgeon.operate(2) + surgeon.operate(2)
        return [(r.terms["kl_ref"], r.coefficients.tolist()) for r in records]

    assert run(3) == run(3)
    assert run(3) != run(4)


@every_surgeon
def test_a_round_begins_with_a_fresh_reset(name: str) -> None:
    env = small_env()
    surgeon = make(name, env)
    surgeon.operate(1)
    env.model_changed()  # whatever operation is open is void
    assert len(surgeon.operate(2)) == 2


@every_surgeon
def test_saving_writes_into_an_existing_folder(name: str, tmp_path: Path) -> None:
    surgeon = make(name)
    surgeon.operate(1)
    surgeon.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({"surgeon.zip", "surgeon_normalisation.json"} if name == "sac" else set())


@every_surgeon
def test_a_surgeon_needs_nothing_but_the_interface_of_an_environment(name: str) -> None:
    surgeon = make_surgeon(name, ToyOperation(0.5, 0.25), 0)
    assert [record.total for record in surgeon.operate(3)] == [0.75] * 3


def test_an_unknown_surgeon_is_refused_with_the_closest() -> None:
    with pytest.raises(
        ValueError,
        match=r"^surgeon must be one of \['none', 'random', 'sac', 'zero'\], "
        r"got 'randm', did you mean 'random'\?$",
    ):
        make("randm")
    with pytest.raises(ValueError, match=r"got 'quux'$"):
        check_surgeon("quux")


def test_no_surgeon_is_a_choice_but_nothing_to_make() -> None:
    check_surgeon(NONE)
    with pytest.raises(ValueError, match=r"^surgeon 'none' operates on nothing"):
        make(NONE)


def test_a_surgeon_of_ones_own_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SURGEONS, "mine", SURGEONS["zero"])
    check_surgeon("mine")
    assert make("mine").operate(1)[0].total == 0.0
