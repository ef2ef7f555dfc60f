from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.surgeons.algorithms import ALGORITHMS
from agents.surgeons.baselines import ZeroSurgeon
from agents.surgeons.contract import METHODS, check_records
from agents.surgeons.registry import (
    NONE,
    SURGEONS,
    EpisodeRecord,
    Surgeon,
    check_surgeon,
    load_surgeon,
    make_surgeon,
    save_surgeon,
)
from agents.training import checkpoint
from agents.training.config import TrainConfig
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import global_random_states
from tests.training_runs import (
    first_actions,
    small_env,
)

every_surgeon = pytest.mark.parametrize("name", sorted(SURGEONS))


SEARCHES = {"cma_es", "es"}
LEARN_NOTHING = {"random", "zero", "replay"}
OPTIONS: dict[str, dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch, quick_surgeons: None) -> None:
    """Let the slowest of the table be quick too."""
    recurrent = ALGORITHMS["recurrent_ppo"]
    quick = recurrent._replace(options={**recurrent.options, "n_epochs": 2})
    monkeypatch.setitem(ALGORITHMS, "recurrent_ppo", quick)


@pytest.fixture(autouse=True, scope="module")
def trained_surgeon(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Save a surgeon that `replay` can take its actions from."""
    folder = tmp_path_factory.mktemp("trained")
    save_surgeon(make_surgeon("random", small_env(), 0), folder, "random", 0)
    OPTIONS["replay"] = {"source": str(folder), "n_operations": 1}


def make(name: str, env: AttentionSurgeryVectorEnv | None = None, seed: int = 0) -> Surgeon:
    return make_surgeon(name, env or small_env(), seed, OPTIONS.get(name))


@functools.cache
def practised(name: str) -> tuple[Surgeon, AttentionSurgeryVectorEnv]:
    """Return a surgeon that has operated, for tests that only look; they share it."""
    env = small_env(n_rows=3)
    surgeon = make(name, env)
    surgeon.operate(2)
    return surgeon, env


def test_these_are_the_surgeons() -> None:
    libraries = {"sac", "td3", "ddpg", "ppo", "a2c"}
    contrib = {"tqc", "crossq", "trpo", "ars", "recurrent_ppo"}
    assert set(SURGEONS) == libraries | contrib | SEARCHES | LEARN_NOTHING


def check(record: EpisodeRecord) -> None:
    """Check that a record hangs together."""
    assert 1 <= record.length <= 2
    assert record.length == 2 or record.flatline is not None
    assert np.isfinite(record.total)
    assert 0 <= record.mean_abs_action <= 1
    assert record.coefficients.shape == (4,)
    assert np.abs(record.coefficients).max() <= 1
    assert record.terms.keys() == record.baseline_terms.keys()
    improvement = record.terms["kl_ref"] - record.baseline_terms["kl_ref"]
    expected = improvement if record.flatline is None else -1.0
    assert record.total == pytest.approx(expected, abs=1e-9)


@every_surgeon
@pytest.mark.usefixtures("immortal")
@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_round_is_as_many_whole_operations_on_every_row_as_were_asked_for(
    name: str, n_rows: int
) -> None:
    surgeon = make(name, small_env(n_rows=n_rows))
    for n_operations in (2, 1):
        records = surgeon.operate(n_operations)
        n_done = n_operations * n_rows
        if name == "ars":  # an update takes it two operations
            n_done = 2 * n_rows
        if name in SEARCHES:  # a generation takes them eight, or more to be even
            n_done = {1: 8, 3: 12}[n_rows]
        assert [record.length for record in records] == [2] * n_done
        for record in records:
            check(record)


@pytest.mark.parametrize("name", ["sac", "random"])
def test_where_patients_die_the_surgeon_goes_on_with_the_next(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatarl_env.episode.COLLISION_MARGIN", 0.0)
    surgeon = make(name, small_env(n_rows=3, operator_options={"scale": 50.0}))
    records = surgeon.operate(4)
    lengths = [record.length for record in records]
    assert 1 in lengths  # some did not even see the second step
    # What is missing of all 4 * 2 steps of the 3 rows was unfinished: at most one step each.
    assert 3 * 4 * 2 - 3 <= sum(lengths) <= 3 * 4 * 2
    for record in records + surgeon.operate(1):
        check(record)
        assert (record.total == -1.0) is (record.flatline is not None)


@every_surgeon
def test_actions_are_those_of_the_action_space_for_any_number_of_rows(name: str) -> None:
    surgeon, env = practised(name)
    for each in (surgeon, make(name, env)):
        for n_rows in (1, 2, 5):
            other = small_env(env.patient, n_rows)
            actions = first_actions(each, other.reset(seed=0)[0])
            assert actions.dtype == np.float32
            assert other.action_space.contains(actions)


@pytest.mark.parametrize("name", sorted(set(SURGEONS) - {"random", "replay"}))
def test_actions_are_deterministic_and_each_rows_own(name: str) -> None:
    surgeon, env = practised(name)
    observations, _ = env.reset(seed=0)
    actions = first_actions(surgeon, observations)
    assert actions.tolist() == first_actions(surgeon, observations).tolist()
    for row in range(3):
        alone = first_actions(surgeon, observations[row : row + 1])
        np.testing.assert_allclose(alone[0], actions[row], atol=1e-6)


@every_surgeon
def test_statistics_are_finite_numbers_by_metric_name(name: str) -> None:
    stats = practised(name)[0].stats()
    assert bool(stats) == (name not in LEARN_NOTHING)
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
    first_actions(surgeon, env.reset()[0])
    surgeon.stats()
    surgeon.save(tmp_path)
    assert global_random_states() == before


@every_surgeon
def test_the_same_seed_gives_the_same_operations_whatever_others_draw(name: str) -> None:
    def run(seed: int, foreign: int) -> list[tuple[float, list[float], list[float]]]:
        torch.manual_seed(foreign)
        env = small_env()
        surgeon = make(name, env, seed)
        records = []
        for _ in range(2):
            torch.rand(foreign)
            np.random.rand(foreign)  # noqa: NPY002
            records += surgeon.operate(1)
        return [(r.total, r.coefficients.tolist(), [*r.baseline_terms.values()]) for r in records]

    found = run(3, 1)
    assert found == run(3, 7)
    assert found != run(4, 1)


@every_surgeon
def test_a_round_begins_with_a_fresh_reset(name: str) -> None:
    env = small_env()
    surgeon = make(name, env)
    surgeon.operate(1)
    env.model_changed()  # whatever operations are open are void
    assert len(surgeon.operate(2)) >= 4


@every_surgeon
@pytest.mark.parametrize("has_operated", [False, True])
def test_acting_disturbs_no_operation_under_way(name: str, has_operated: bool) -> None:
    surgeon, env = practised(name)
    if not has_operated:
        surgeon = make(name, env)
    observations, _ = env.reset(seed=0)
    before = env.get_state()["rngs"][0].bit_generator.state
    seen = observations.copy()
    first_actions(surgeon, observations)
    assert observations.tolist() == seen.tolist()
    assert env.get_state()["rngs"][0].bit_generator.state == before


def linked_files(name: str, folder: Path) -> dict[Path, bytes]:
    """Save a fresh surgeon elsewhere, and put links to its files where one will be saved."""
    (elsewhere := folder / "elsewhere").mkdir()
    save_surgeon(make(name), elsewhere, name, 0, OPTIONS.get(name))
    for path in elsewhere.iterdir():
        (folder / path.name).symlink_to(path)
    return {path: path.read_bytes() for path in elsewhere.iterdir()}


@every_surgeon
def test_what_was_saved_can_be_loaded_and_acts_and_learns_on(name: str, tmp_path: Path) -> None:
    env = small_env()
    surgeon = make(name, env)
    for _ in range(2):
        surgeon.operate(2)
    others = linked_files(name, tmp_path)
    save_surgeon(surgeon, tmp_path, name, 0, OPTIONS.get(name))
    assert all(path.read_bytes() == content for path, content in others.items())
    loaded = load_surgeon(tmp_path, env)
    observations, _ = env.reset(seed=9)
    if name not in LEARN_NOTHING:
        fresh = first_actions(make(name), observations)
        assert first_actions(loaded, observations).tolist() != fresh.tolist()
        expected = first_actions(surgeon, observations)
        assert first_actions(loaded, observations).tolist() == expected.tolist()
    assert len(loaded.operate(2)) >= 2


def test_a_folder_without_a_surgeon_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^folder must hold a saved surgeon's surgeon.json, got "):
        load_surgeon(tmp_path, small_env())


@pytest.mark.parametrize(
    ("name", "option", "hint"),
    [
        ("sac", "learning_rat", "did you mean 'learning_rate'"),
        ("sac", "seed", "got 'seed'"),
        ("cma_es", "sigm", "did you mean 'sigma'"),
        ("sac", "name", "got 'name'"),
        ("sac", "self", "got 'self'"),
        ("sac", "env", r"\['action_noise', .*'use_sde_at_warmup'\], got 'env'"),
    ],
)
def test_an_unknown_option_is_refused_with_the_closest(name: str, option: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} option must be one of .*{hint}"):
        make_surgeon(name, small_env(), 0, {option: 1})


def test_a_surgeon_without_options_says_so() -> None:
    with pytest.raises(ValueError, match=r"^surgeon 'zero' has no options, got 'sigma'$"):
        make_surgeon("zero", small_env(), 0, {"sigma": 1})


def test_options_that_a_library_refuses_are_named_in_one_line() -> None:
    options = {"policy_kwargs": {"quux": 1}}
    with pytest.raises(ValueError, match=r"^surgeon 'sac' must be given options that fit, got .*:"):
        make_surgeon("sac", small_env(), 0, options)

    def picky(env: Any, seed: int, **options: Any) -> Surgeon:
        raise AssertionError("no,\n  not  that")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SURGEONS, "picky", picky)
        with pytest.raises(ValueError, match=r"^surgeon 'picky' .*got {'x': 1}: no, not that$"):
            make_surgeon("picky", small_env(), 0, {"x": 1})


def test_an_option_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"^surgeon 'replay' must be given the option 'source'"):
        make_surgeon("replay", small_env(), 0)


@pytest.mark.parametrize(("name", "library"), [("tqc", "sb3_contrib"), ("cma_es", "cmaes")])
def test_a_surgeon_whose_library_is_absent_says_how_to_get_it(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}: pip install 'avatarl-env\["):
        make(name)


def test_an_unknown_surgeon_is_refused_with_the_closest() -> None:
    with pytest.raises(
        ValueError,
        match=r"^surgeon must be one of \['a2c', .*, 'zero'\], got 'randm', "
        r"did you mean 'random'\?$",
    ):
        make("randm")
    with pytest.raises(ValueError, match=r"got 'quux'$"):
        check_surgeon("quux")


def test_no_surgeon_is_a_choice_but_nothing_to_make() -> None:
    check_surgeon(NONE)
    with pytest.raises(ValueError, match=r"^surgeon 'none' operates on nothing"):
        make(NONE)


def test_no_surgeon_has_no_options() -> None:
    check_surgeon(NONE, {})
    check_surgeon("zero", {"x": 1})  # found out where it is made
    message = r"^surgeon_options must be empty where surgeon is 'none', got {'x': 1}$"
    with pytest.raises(ValueError, match=message):
        check_surgeon(NONE, {"x": 1})
    with pytest.raises(ValueError, match=message):
        TrainConfig(surgeon=NONE, surgeon_options={"x": 1})


def test_a_library_that_lacks_one_of_its_own_is_not_said_to_be_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "sb3_contrib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sb3_contrib.ars", None)
    with pytest.raises(ModuleNotFoundError, match=r"sb3_contrib\.ars"):
        make("tqc")


def test_a_surgeon_of_ones_own_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SURGEONS, "mine", SURGEONS["zero"])
    check_surgeon("mine")
    assert make("mine").operate(1)[0].total == 0.0


def without(method: str) -> type[Surgeon]:
    """Return a surgeon that inherits the Protocol, whose methods do nothing, and lacks one."""
    own = {name: value for name, value in vars(ZeroSurgeon).items() if name != method}
    return type("Mine", (Surgeon,), own)


@pytest.mark.parametrize("method", METHODS)
def test_a_surgeon_of_ones_own_that_lacks_a_method_is_refused_when_it_is_made(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SURGEONS, "mine", without(method))
    message = rf"^surgeon 'mine' must have the methods \[.*\], got Mine without {method}$"
    with pytest.raises(ValueError, match=message):
        make("mine")
    monkeypatch.setitem(SURGEONS, "mine", without(""))
    make("mine")


class TakesNothing(ZeroSurgeon):
    def operate(self) -> Any:  # type: ignore[override]
        return []


class KeepsAnObject(ZeroSurgeon):
    def get_state(self) -> Any:
        return {"me": self}


class KeepsNothing(ZeroSurgeon):
    def get_state(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("surgeon", "message"),
    [
        (TakesNothing, r"^surgeon 'mine' must take the call operate\(n_operations\): too many "),
        (
            KeepsAnObject,
            r"^surgeon 'mine' must return a dict of plain data .*: Object of type Keep",
        ),
        (KeepsNothing, r"^surgeon 'mine' must return a dict of plain data .*: 'NoneType' object"),
        (
            lambda env, seed: None,
            r"^surgeon 'mine' must have .* got NoneType without operate, act,",
        ),
    ],
    ids=["takes nothing", "keeps an object", "keeps nothing", "is nothing"],
)
def test_a_surgeon_of_ones_own_that_cannot_be_asked_or_kept_is_refused_when_it_is_made(
    surgeon: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SURGEONS, "mine", surgeon)
    with pytest.raises(ValueError, match=message):
        make("mine")


@pytest.mark.parametrize("records", [None, (), [1.0]], ids=["none", "a tuple", "numbers"])
def test_what_is_no_record_of_operations_is_named(records: object) -> None:
    with pytest.raises(TypeError, match=r"^operate must return a list of EpisodeRecord, got "):
        check_records(records)


ABOUTS = {
    "no object": "[]",
    "cut": '{"surgeon": ',
    "nested": "[" * 100_000,
    "no name": '{"seed": 0, "options": {}}',
    "a list for a name": '{"surgeon": [], "seed": 0, "options": {}}',
    "text for a seed": '{"surgeon": "zero", "seed": "0", "options": {}}',
    "no options": '{"surgeon": "zero", "seed": 0, "options": null}',
    "another's option": '{"surgeon": "zero", "seed": 0, "options": {"sigma": 1}}',
    "too wide": '{"surgeon": "sac", "seed": 0, "options": {"policy_kwargs": '
    '{"net_arch": [10000000, 10000000]}}}',
    "itself": '{"surgeon": "replay", "seed": 0, "options": {"source": "FOLDER"}}',
}


@pytest.mark.parametrize("about", ABOUTS)
def test_a_folder_that_says_nonsense_of_its_surgeon_is_refused_in_a_line(
    about: str, tmp_path: Path
) -> None:
    content = ABOUTS[about].replace("FOLDER", str(tmp_path))
    (tmp_path / "surgeon.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^(folder|surgeon) ") as caught:
        load_surgeon(tmp_path, small_env())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(SEARCHES))
@pytest.mark.parametrize("content", ["[]", "{", '{"about": {}}', "[" * 100_000])
def test_a_search_that_is_stored_as_nonsense_is_refused_in_a_line(
    name: str, content: str, tmp_path: Path
) -> None:
    env = small_env()
    save_surgeon(make(name, env), tmp_path, name, 0)
    (tmp_path / "surgeon_search.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # json's own, or ours
        load_surgeon(tmp_path, env)
    assert "\n" not in str(caught.value)


@every_surgeon
def test_a_surgeon_goes_on_exactly_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    env = small_env(n_rows=3)
    surgeon = make(name, env, seed=5)
    for _ in range(2):
        surgeon.operate(1)

    def save(folder: Path) -> None:
        save_surgeon(surgeon, folder, name, 5, OPTIONS.get(name))

    written = checkpoint.write(tmp_path, 1, surgeon.get_state(), {}, save)
    torch.rand(3)
    expected = [surgeon.operate(1) for _ in range(2)]
    restored = load_surgeon(written, small_env(n_rows=3))
    restored.set_state(checkpoint.read(written))
    found = [restored.operate(1) for _ in range(2)]
    for left, right in zip(expected, found, strict=True):
        assert [r.total for r in left] == [r.total for r in right]
        assert [r.coefficients.tolist() for r in left] == [r.coefficients.tolist() for r in right]
        assert [r.baseline_terms for r in left] == [r.baseline_terms for r in right]
    observations = env.reset(seed=0)[0]
    if name not in LEARN_NOTHING:
        assert np.array_equal(
            first_actions(surgeon, observations), first_actions(restored, observations)
        )
    assert dict(surgeon.stats()) == dict(restored.stats())
