from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from tests.training_runs import (
    ToyOperations,
    first_actions,
    small_env,
)


def test_the_zero_surgeon_is_paid_exactly_nothing() -> None:
    env = small_env(n_rows=3)
    records = ZeroSurgeon(env, 0).operate(2)
    assert [record.total for record in records] == [0.0] * 6
    assert [record.mean_abs_action for record in records] == [0.0] * 6
    assert all(not record.coefficients.any() for record in records)
    assert all(record.terms == record.baseline_terms for record in records)


def test_each_operation_has_prompts_of_its_own_and_the_seed_decides_them() -> None:
    def losses(seed: int) -> list[float]:
        records = ZeroSurgeon(small_env(), seed).operate(2)
        return [record.baseline_terms["heldout_loss"] for record in records]

    assert len(set(losses(0))) == 4
    assert losses(0) == losses(0)
    assert set(losses(0)).isdisjoint(losses(7))


def test_surgeons_of_neighbouring_seeds_share_no_prompts() -> None:
    def losses(seed: int) -> set[float]:
        records = ZeroSurgeon(small_env(), seed).operate(1)
        return {record.baseline_terms["heldout_loss"] for record in records}

    assert losses(5).isdisjoint(losses(4) | losses(6))


def test_a_round_begins_afresh_and_goes_on_with_the_dice() -> None:
    # Every round draws prompts anew, also where the last one had begun an operation already.
    def losses(*rounds: int) -> list[float]:
        surgeon = ZeroSurgeon(small_env(n_rows=1), 5)
        records = [record for n in rounds for record in surgeon.operate(n)]
        return [record.baseline_terms["heldout_loss"] for record in records]

    whole = losses(4)
    assert losses(1, 2) == [whole[0], whole[2], whole[3]]


def test_random_actions_fill_the_whole_range_evenly() -> None:
    surgeon = RandomSurgeon(toys(1.0), 0)
    drawn = first_actions(surgeon, np.zeros((2000, 3), np.float32))
    assert drawn.shape == (2000, 2)
    assert drawn.dtype == np.float32
    assert np.abs(drawn).max() <= 1.0
    # Uniform on [-1, 1]: mean 0, standard deviation 0.577, of the mean of 2000 0.013.
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.06)
    np.testing.assert_allclose(drawn.std(0), 3**-0.5, atol=0.03)
    assert (drawn < -0.95).any()
    assert (drawn > 0.95).any()


def test_every_row_and_step_has_random_actions_of_its_own() -> None:
    surgeon = RandomSurgeon(toys(1.0), 0)
    drawn = [first_actions(surgeon, np.zeros((3, 3), np.float32)) for _ in range(2)]
    assert len(set(np.concatenate(drawn).ravel().tolist())) == 12


@pytest.mark.usefixtures("immortal")
def test_a_seed_decides_the_random_actions() -> None:
    def coefficients(seed: int) -> list[list[float]]:
        records = RandomSurgeon(small_env(), seed).operate(2)
        return [record.coefficients.tolist() for record in records]

    assert coefficients(0) == coefficients(0)
    assert coefficients(0) != coefficients(1)


def test_random_actions_are_independent_of_the_prompts() -> None:
    env = toys(1.0, n_rows=4)
    surgeon = RandomSurgeon(env, 11)
    surgeon.operate(1)  # seeds the rows
    numbers = [row.np_random.uniform(-1.0, 1.0, 200).astype(np.float32) for row in env.envs]
    actions = [first_actions(surgeon, np.zeros((1, 3), np.float32)) for _ in range(50)]
    assert set(np.concatenate(numbers).tolist()).isdisjoint(
        np.concatenate(actions).ravel().tolist()
    )


@pytest.mark.parametrize("kind", [ZeroSurgeon, RandomSurgeon])
def test_who_does_not_learn_has_nothing_to_say_or_to_store(
    kind: type[ZeroSurgeon], tmp_path: Path
) -> None:
    surgeon = kind(toys(1.0, 2.0), 0)
    assert [record.total for record in surgeon.operate(2)] == [3.0, 3.0]
    assert surgeon.operate(0) == []
    assert surgeon.stats() == {}
    surgeon.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def toys(*rewards: float, n_rows: int = 1) -> Any:
    return ToyOperations(*rewards, n_rows=n_rows)
