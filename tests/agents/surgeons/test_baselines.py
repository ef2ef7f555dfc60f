from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from tests.training_runs import ToyOperation, small_env


def test_the_zero_surgeon_is_paid_exactly_nothing() -> None:
    env = small_env()
    records = ZeroSurgeon(env, 0).operate(3)
    assert [record.total for record in records] == [0.0, 0.0, 0.0]
    assert [record.mean_abs_action for record in records] == [0.0, 0.0, 0.0]
    assert all(not record.coefficients.any() for record in records)
    assert all(record.terms == record.baseline_terms for record in records)


def test_each_operation_has_prompts_of_its_own_and_the_seed_decides_them() -> None:
    def losses(seed: int) -> list[float]:
        env = small_env()
        records = ZeroSurgeon(env, seed).operate(3)
        return [record.baseline_terms["heldout_loss"] for record in records]

    assert len(set(losses(0))) == 3
    assert losses(0) == losses(0)
    assert set(losses(0)).isdisjoint(losses(1))


def test_rounds_go_on_where_the_last_one_ended() -> None:
    together, apart = (ZeroSurgeon(small_env(), 5) for _ in range(2))
    whole = together.operate(3)
    parts = apart.operate(1) + apart.operate(2)
    assert [r.baseline_terms for r in whole] == [r.baseline_terms for r in parts]


def test_random_actions_fill_the_whole_range_evenly() -> None:
    surgeon = RandomSurgeon(ToyOperation(1.0), 0)
    drawn = np.stack([surgeon.act(np.zeros(3, np.float32)) for _ in range(2000)])
    assert drawn.dtype == np.float32
    assert np.abs(drawn).max() <= 1.0
    # Uniform on [-1, 1]: mean 0, standard deviation 0.577, of the mean of 2000 0.013.
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.06)
    np.testing.assert_allclose(drawn.std(0), 3**-0.5, atol=0.03)
    assert (drawn < -0.95).any()
    assert (drawn > 0.95).any()


def test_a_seed_decides_the_random_actions() -> None:
    def coefficients(seed: int) -> list[list[float]]:
        records = RandomSurgeon(small_env(), seed).operate(2)
        return [record.coefficients.tolist() for record in records]

    assert coefficients(0) == coefficients(0)
    assert coefficients(0) != coefficients(1)


def test_random_actions_are_independent_of_the_prompts() -> None:
    # The environment's own generator is made from the very same seed.
    env = ToyOperation(1.0)
    surgeon = RandomSurgeon(env, 11)
    env.reset(seed=11)
    numbers = env.np_random.uniform(-1.0, 1.0, 200).astype(np.float32)
    actions = [surgeon.act(np.zeros(3, np.float32)) for _ in range(50)]
    assert set(numbers.tolist()).isdisjoint(np.concatenate(actions).tolist())


@pytest.mark.parametrize("kind", [ZeroSurgeon, RandomSurgeon])
def test_who_does_not_learn_has_nothing_to_say_or_to_store(
    kind: type[ZeroSurgeon], tmp_path: Path
) -> None:
    surgeon = kind(ToyOperation(1.0, 2.0), 0)
    assert [record.total for record in surgeon.operate(2)] == [3.0, 3.0]
    assert surgeon.operate(0) == []
    assert surgeon.stats() == {}
    surgeon.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
