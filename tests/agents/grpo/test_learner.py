from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.grpo import learner as learner_module
from agents.grpo.learner import GRPOConfig, GRPOLearner, GRPOStats
from agents.grpo.objectives import ESTIMATORS, Estimator, cross_entropy
from avatarl_env.lm.gpt import GPT
from tests.patients import global_random_states
from tests.training_runs import CE, cycle, everything, fresh_model, make_learner, same

NOISE = np.random.default_rng(7).integers(0, 16, 400)
RECIPES = [
    pytest.param({}, id="brier"),
    pytest.param({"exploration": "all_actions"}, id="brier-all-actions"),
    pytest.param({"estimator": "grpo", "group_size": 8}, id="grpo"),
    pytest.param(CE, id="ce"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_changes_every_parameter_and_reports_finite_numbers(
    recipe: dict[str, Any],
) -> None:
    learner = make_learner(fresh_model(), NOISE, **recipe)
    before = [p.detach().clone() for p in learner.model.parameters()]
    stats = learner.update()
    assert all(math.isfinite(value) for value in stats)
    assert learner.n_done == 1
    for old, new in zip(before, learner.model.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()


def run(seed: int, n_updates: int = 4, **recipe: Any) -> tuple[list[Tensor], list[GRPOStats]]:
    learner = make_learner(fresh_model(), NOISE, seed=seed, **recipe)
    stats = [learner.update() for _ in range(n_updates)]
    return everything(learner), stats


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_seed_decides_every_bit(recipe: dict[str, Any]) -> None:
    state, stats = run(seed=1, **recipe)
    again, stats_again = run(seed=1, **recipe)
    assert same(state, again)
    assert stats == stats_again
    other, stats_other = run(seed=2, **recipe)
    assert not same(state, other)
    assert stats != stats_other


def test_the_global_generators_are_left_alone() -> None:
    before = global_random_states()
    learner = make_learner(fresh_model(), NOISE)
    learner.update()
    assert global_random_states() == before


def test_nobody_elses_dice_change_the_result() -> None:
    expected, _ = run(seed=3)
    learner = make_learner(fresh_model(), NOISE, seed=3)
    for _ in range(4):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        learner.update()
    assert same(everything(learner), expected)


def test_the_learning_rate_by_hand() -> None:
    learner = make_learner(fresh_model(), NOISE, n_updates=10, learning_rate=2.0, warmup_updates=4)
    # 2 * min(1, (n + 1) / 4) * (0.55 + 0.45 cos(pi n / 10)); cos 36 degrees = 0.809017
    expected = {0: 0.5, 2: 1.5 * (0.55 + 0.45 * 0.809017), 5: 1.1, 10: 0.2, 12: 0.2}
    for n_done, rate in expected.items():
        learner.n_done = n_done
        assert learner.learning_rate() == pytest.approx(rate, rel=1e-6)


def test_without_warm_up_the_rate_begins_at_its_peak() -> None:
    learner = make_learner(fresh_model(), NOISE, learning_rate=0.25, warmup_updates=0, n_updates=0)
    assert learner.learning_rate() == 0.25


def test_the_rate_of_the_schedule_is_what_the_optimizer_uses_and_the_stats_report() -> None:
    learner = make_learner(fresh_model(), NOISE, learning_rate=1e-3, warmup_updates=4)
    for _ in range(6):
        rate = learner.learning_rate()
        assert learner.update().learning_rate == rate
        assert [group["lr"] for group in learner.optimizer.param_groups] == [rate, rate]


def test_weights_decay_in_matrices_only_and_the_tied_one_is_listed_once() -> None:
    learner = make_learner(fresh_model(), NOISE, weight_decay=0.3)
    matrices, vectors = learner.optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() == 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    listed = [id(p) for p in (*matrices["params"], *vectors["params"])]
    assert sorted(listed) == sorted(id(p) for p in learner.model.parameters())
    assert id(learner.model.lm_head.weight) == id(learner.model.embed.weight)


def test_without_a_gradient_only_the_matrices_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Estimator(None, lambda log_probs, targets: 0.0 * log_probs.sum(), is_control=True)
    monkeypatch.setitem(ESTIMATORS, "ce", nothing)
    learner = make_learner(
        fresh_model(), NOISE, weight_decay=0.5, learning_rate=0.1, warmup_updates=0, **CE
    )
    before = [p.detach().clone() for p in learner.model.parameters()]
    learner.update()
    for old, new in zip(before, learner.model.parameters(), strict=True):
        expected = old * (1 - 0.1 * 0.5) if old.dim() == 2 else old
        torch.testing.assert_close(new.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was(clip: float) -> None:
    learner = make_learner(fresh_model(), NOISE, grad_clip=clip)
    reported = learner.update().grad_norm
    stepped = math.sqrt(sum(float(p.grad.square().sum()) for p in learner.model.parameters()))
    assert 1e-2 < reported < 10
    assert stepped == pytest.approx(min(clip, reported), rel=1e-3)


def test_an_update_starts_from_no_gradient() -> None:
    left, right = (make_learner(fresh_model(), NOISE) for _ in range(2))
    left.update()
    right.update()
    for p in right.model.parameters():
        p.grad = torch.ones_like(p)
    left.update()
    right.update()
    assert same(everything(left), everything(right))


class Spy:
    """Stands in for an objective and remembers what it is given."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.actions: list[Tensor] = []

    def all_actions(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        self.log_probs.append(log_probs.detach().clone())
        self.targets.append(targets)
        return cross_entropy(log_probs, targets)

    def sampled(self, log_probs: Tensor, targets: Tensor, actions: Tensor) -> Tensor:
        self.actions.append(actions)
        return self.all_actions(log_probs, targets)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setitem(ESTIMATORS, "ce", Estimator(spy.sampled, spy.all_actions, is_control=True))
    return spy


def test_each_position_predicts_the_next_token_and_every_window_can_be_drawn(spy: Spy) -> None:
    # 16 + 3 tokens that are all different: windows can begin at 0, 1 and 2, and nowhere else.
    learner = make_learner(fresh_model(vocab_size=19), np.arange(19), batch_size=8, **CE)
    inputs: list[Tensor] = []
    learner.model.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    for _ in range(5):
        learner.update()
    assert all(batch.shape == (8, 16) for batch in inputs)
    for batch, targets in zip(inputs, spy.targets, strict=True):
        assert torch.equal(targets, (batch + 1).flatten())
    starts = torch.cat([batch[:, 0] for batch in inputs])
    assert set(starts.tolist()) == {0, 1, 2}
    assert learner.tokens_per_update == 8 * 16


def test_a_text_one_longer_than_the_context_is_one_window() -> None:
    learner = make_learner(fresh_model(), NOISE[:17])
    assert math.isfinite(learner.update().loss)


@pytest.mark.parametrize("length", [2, 15, 16])
def test_a_text_no_longer_than_the_context_is_refused(length: int) -> None:
    message = rf"^context must be less than {length} \(train\), got 16$"
    with pytest.raises(ValueError, match=message):
        make_learner(fresh_model(), NOISE[:length])


def test_the_statistics_are_of_the_batch_before_the_step(spy: Spy) -> None:
    learner = make_learner(fresh_model(seed=4), NOISE, **CE)
    stats = learner.update()
    log_probs, targets = spy.log_probs[0].double(), spy.targets[0]
    rows = [(row.tolist(), int(target)) for row, target in zip(log_probs, targets, strict=True)]
    n = len(rows)
    assert n == 64
    assert stats.loss == pytest.approx(-sum(row[y] for row, y in rows) / n, rel=1e-5)
    assert stats.reward == pytest.approx(sum(math.exp(row[y]) for row, y in rows) / n, rel=1e-5)
    hits = sum(max(range(16), key=row.__getitem__) == y for row, y in rows)
    assert stats.accuracy == pytest.approx(hits / n)
    entropy = -sum(math.exp(x) * x for row, _ in rows for x in row) / n
    assert stats.entropy == pytest.approx(entropy, rel=1e-5)


def test_actions_are_drawn_from_the_policy(spy: Spy) -> None:
    learner = make_learner(
        fresh_model(vocab_size=4), NOISE % 4, **{**CE, "exploration": "sampled"}, group_size=500
    )
    with torch.no_grad():
        learner.model.embed.weight.mul_(60)  # far from uniform
    learner.update()
    (actions,), (log_probs,) = spy.actions, spy.log_probs
    assert actions.shape == (64, 500)
    shares = torch.stack([(actions == token).double().mean() for token in range(4)])
    probs = log_probs.exp().double()
    assert probs.max() > 0.9
    errors = (probs * (1 - probs)).sum(0).div(500).sqrt() / 64
    assert ((shares - probs.mean(0)).abs() < 4.5 * errors).all()


def test_half_precision_is_used_where_asked_for_and_the_weights_stay_whole() -> None:
    whole, _ = run(seed=0)
    half, stats = run(seed=0, precision="bfloat16")
    assert not same(whole, half)
    assert all(p.dtype == torch.float32 for p in half)
    assert all(math.isfinite(value) for row in stats for value in row)
    difference = max(float((a - b).abs().max()) for a, b in zip(whole, half, strict=True))
    assert difference < 0.1


def test_the_forward_runs_in_the_chosen_precision() -> None:
    for precision, dtype in learner_module.PRECISIONS.items():
        learner = make_learner(fresh_model(), NOISE, precision=precision)
        seen: list[torch.dtype] = []
        learner.model.register_forward_hook(lambda _, __, output, s=seen: s.append(output.dtype))
        learner.update()
        assert seen == [dtype]


def test_training_mode_is_left_as_it_was() -> None:
    for training in (True, False):
        learner = make_learner(fresh_model().train(training), NOISE)
        learner.update()
        assert learner.model.training is training


def teach(model: GPT, n_updates: int, **recipe: Any) -> list[GRPOStats]:
    tokens = cycle(400, model.config.vocab_size)
    learner = make_learner(model, tokens, n_updates=n_updates, learning_rate=1e-2, **recipe)
    return [learner.update() for _ in range(n_updates)]


def test_cross_entropy_learns_a_cycle_by_heart() -> None:
    stats = teach(fresh_model(vocab_size=8), 60, **CE)
    assert stats[0].loss == pytest.approx(math.log(8), abs=0.2)
    assert stats[-1].loss < 0.1
    assert stats[-1].accuracy == 1.0


def test_sampled_brier_finds_the_known_best_continuation() -> None:
    stats = teach(fresh_model(vocab_size=8), 80)
    assert stats[0].reward == pytest.approx(1 / 8, abs=0.02)
    assert stats[-1].accuracy == 1.0
    assert stats[-1].reward > 0.95  # it does not only know: it says so
    assert stats[-1].entropy < 0.2


def test_brier_keeps_the_doubt_that_the_text_has_and_grpo_loses_it() -> None:
    # A token is followed by its successor (70 %) or stays (30 %): 0.61 nats of true doubt.
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.random(3000) < 0.7) % 8
    entropy = {}
    for estimator in ("brier", "grpo"):
        learner = make_learner(
            fresh_model(vocab_size=8, context=8),
            tokens,
            n_updates=100,
            learning_rate=1e-2,
            batch_size=16,
            estimator=estimator,
        )
        entropy[estimator] = np.mean([learner.update().entropy for _ in range(100)][-10:])
    # Brier is a little flatter for a long time: where p is small so is its gradient, p (q - p).
    assert 0.55 < entropy["brier"] < 1.0
    assert entropy["grpo"] < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "breir"}, r"estimator must be one of .*got 'breir', did you mean 'brier'\?"),
        ({"exploration": "all"}, "exploration must be sampled or all_actions for brier, got 'all'"),
        ({"estimator": "ce"}, "exploration must be all_actions for ce, got 'sampled'"),
        ({"group_size": 2}, "group_size must be at least 3 for brier, got 2"),
        ({"precision": "float16"}, r"precision must be one of .*, got 'float16'.*'bfloat16'\?"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive, got inf"),
        ({"grad_clip": 0.0}, "grad_clip must be positive, got 0.0"),
        ({"warmup_updates": -1}, "warmup_updates must not be negative, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
    ],
)
def test_a_bad_recipe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GRPOConfig(**changes)


def test_a_recipe_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        GRPOConfig().batch_size = 3  # type: ignore[misc]


def test_the_learner_trains_the_model_that_it_was_given() -> None:
    model = fresh_model()
    learner = make_learner(model, NOISE)
    assert isinstance(learner, GRPOLearner)
    assert learner.model is model
