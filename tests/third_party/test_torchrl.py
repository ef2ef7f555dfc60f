"""TorchRL drives the environment through its own wrappers."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import pytest
import torch
from torch import nn

from tests.third_party.conftest import ENV_ID

pytest.importorskip("torchrl")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of its own, where it is imported
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import GymEnv, GymWrapper
    from torchrl.envs.utils import check_env_specs
    from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def side_by_side(keywords: dict[str, Any], n_rows: int = 3) -> GymWrapper:
    """Wrap the vector environment; in mode SAME_STEP TorchRL would want infos without depth."""
    envs = gymnasium.make_vec(ENV_ID, num_envs=n_rows, autoreset_mode="Disabled", **keywords)
    return GymWrapper(envs)


def networks(env: Any) -> tuple[ProbabilisticActor, ValueOperator]:
    """Build an actor and a critic of one layer for an environment's spaces."""
    (n_seen,) = env.observation_spec["observation"].shape[-1:]
    (n_moved,) = env.action_spec.shape[-1:]
    body = nn.Sequential(nn.Linear(n_seen, 2 * n_moved), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    return actor, ValueOperator(nn.Linear(n_seen, 1), in_keys=["observation"])


def test_its_own_check_passes(keywords: dict[str, Any]) -> None:
    env = GymEnv(ENV_ID, **keywords)
    check_env_specs(env, seed=0)
    rollout = env.rollout(6, break_when_any_done=False)
    assert rollout.batch_size == (6,)
    assert rollout["next", "terminated"].sum() >= 3
    assert not rollout["next", "truncated"].any()
    assert rollout["next", "reward"].any()
    env.close()


def test_the_vector_environment_rolls_out(keywords: dict[str, Any]) -> None:
    """TorchRL reads the attribute `autoreset_mode` and resets rows itself where it is Disabled."""
    env = side_by_side(keywords)
    assert env.batch_size == (3,)
    rollout = env.rollout(5, break_when_any_done=False)
    assert rollout.batch_size == (3, 5)
    ended = rollout["next", "done"][..., 0]
    assert ended.sum() >= 6
    # The step after an end is the first of the next episode, with all its time left.
    begun = rollout["observation"][:, 1:][ended[:, :-1]]
    assert (begun[:, -1] == 1).all()
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 3])
def test_ppo_trains(n_rows: int, keywords: dict[str, Any]) -> None:
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        env = GymEnv(ENV_ID, **keywords) if n_rows == 1 else side_by_side(keywords)
        actor, critic = networks(env)
        advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
        loss = ClipPPOLoss(actor, critic)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        before = [parameter.detach().clone() for parameter in loss.parameters()]
        collector = Collector(env, actor, frames_per_batch=12, total_frames=24)
        n_updates = 0
        for batch in collector:
            for _ in range(2):
                advantage(batch)
                losses = loss(batch.reshape(-1))
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                assert total.isfinite()
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                n_updates += 1
        collector.shutdown()
    finally:
        torch.set_rng_state(torch_state)
    assert n_updates == 4
    for parameter, old in zip(loss.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
        assert parameter.isfinite().all()
