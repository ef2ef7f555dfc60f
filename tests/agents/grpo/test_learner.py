from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.distributed import ALONE, Ranks
from agents.grpo import learner as learner_module
from agents.grpo import objectives
from agents.grpo.advantages import centred
from agents.grpo.config import RegularizerConfig
from agents.grpo.estimators import ESTIMATORS, Estimator, Lesson, Question, Sampling
from agents.grpo.learner import GRPOLearner, GRPOStats
from agents.grpo.rewards import exact_match
from agents.grpo.stats import Reading, packed, spread, unpacked
from avatarl_env.lm.gpt import GPT
from avatarl_env.text.ngram import NGramReference
from tests.patients import global_random_states
from tests.training_runs import CE, cycle, everything, fresh_model, make_learner, same

NOISE = np.random.default_rng(7).integers(0, 16, 400)
RECIPES = [
    pytest.param({}, id="proper_maxrl"),
    pytest.param({"exploration": "all_actions"}, id="proper_maxrl-all-actions"),
    pytest.param({"estimator": "brier"}, id="brier"),
    pytest.param({"estimator": "grpo", "group_size": 8}, id="grpo"),
    pytest.param({"estimator": "rloo", "sync_every": 3}, id="rloo-off-policy"),
    pytest.param({"estimator": "cispo", "horizon": 3, "sync_every": 2}, id="cispo-texts"),
    pytest.param({"optimizer": "adamw"}, id="adamw"),
    pytest.param(CE, id="ce"),
]


def regularized(**changes: float) -> dict[str, Any]:
    return {"regularizer": RegularizerConfig(**changes)}


def groups_of(learner: GRPOLearner) -> list[dict[str, Any]]:
    return [group for part, _ in learner.optimizer.parts for group in part.param_groups]


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
    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 0.5}
    learner = make_learner(fresh_model(), NOISE, warmup_updates=4, **rates)
    for _ in range(6):
        rate = learner.learning_rate()
        assert learner.update().learning_rate == rate
        share = rate / 1e-3
        adamw, adamws_vectors, muon = [group["lr"] for group in groups_of(learner)]
        assert adamw == adamws_vectors == rate
        assert muon == pytest.approx(0.5 * share)


def test_the_recipe_decides_who_steps_what() -> None:
    adamw, vectors, muon = groups_of(make_learner(fresh_model(), NOISE, weight_decay=0.3))
    assert (adamw["weight_decay"], vectors["weight_decay"], muon["weight_decay"]) == (0.3, 0.0, 0.3)
    matrices, vectors = groups_of(make_learner(fresh_model(), NOISE, optimizer="adamw"))
    assert (len(matrices["params"]), len(vectors["params"])) == (9, 5)


def test_without_a_gradient_only_the_matrices_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Estimator(None, lambda question: 0.0 * question.log_probs.sum(), is_control=True)
    monkeypatch.setitem(ESTIMATORS, "ce", nothing)
    rates = {"learning_rate": 0.1, "matrix_learning_rate": 0.3}
    learner = make_learner(fresh_model(), NOISE, weight_decay=0.5, warmup_updates=0, **rates, **CE)
    before = [p.detach().clone() for p in learner.model.parameters()]
    learner.update()
    for old, (name, new) in zip(before, learner.model.named_parameters(), strict=True):
        rate = 0.3 if name.startswith("blocks.") else 0.1
        expected = old * (1 - rate * 0.5) if old.dim() == 2 else old
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
    """Stands in for an estimator and remembers what it is given."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.actions: list[Tensor] = []
        self.rewards: list[Tensor] = []

    def all_actions(self, question: Question) -> Tensor:
        self.log_probs.append(question.log_probs.detach().clone())
        self.targets.append(question.targets)
        return -objectives.log_likelihood(question.log_probs, question.targets)

    def reward(self, actions: Tensor, targets: Tensor) -> Tensor:
        self.actions.append(actions)
        self.targets.append(targets)
        return exact_match(actions, targets)

    def advantage(self, rewards: Tensor) -> Tensor:
        self.rewards.append(rewards)
        return centred(rewards)

    def bonus(self, log_probs: Tensor, order: int) -> Tensor:
        self.log_probs.append(log_probs.detach().clone())
        return 0 * log_probs.sum()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    sampling = Sampling(spy.reward, spy.advantage, objectives.reinforce, bonus=spy.bonus)
    row = Estimator(sampling, spy.all_actions, takes_credit=True, is_control=True)
    monkeypatch.setitem(ESTIMATORS, "ce", row)
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


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("estimator", ["brier", "proper_maxrl"])
def test_a_sampled_proper_rule_finds_the_known_best_continuation(
    estimator: str, optimizer: str
) -> None:
    stats = teach(fresh_model(vocab_size=8), 80, estimator=estimator, optimizer=optimizer)
    assert stats[0].reward == pytest.approx(1 / 8, abs=0.02)
    assert stats[-1].accuracy == 1.0
    assert stats[-1].reward > 0.95  # it does not only know: it says so
    assert stats[-1].entropy < 0.2


def test_proper_rules_keep_the_doubt_that_the_text_has_and_grpo_loses_it() -> None:
    # A token is followed by its successor (70 %) or stays (30 %): 0.61 nats of true doubt.
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.random(3000) < 0.7) % 8
    entropy = {}
    for estimator in ("brier", "proper_maxrl", "grpo"):
        learner = make_learner(
            fresh_model(vocab_size=8, context=8),
            tokens,
            n_updates=100,
            learning_rate=1e-2,
            batch_size=16,
            optimizer="adamw",
            estimator=estimator,
        )
        entropy[estimator] = np.mean([learner.update().entropy for _ in range(100)][-10:])
    # Brier is a little flatter for a long time: where p is small so is its gradient, p (q - p).
    assert 0.55 < entropy["brier"] < 1.0
    assert 0.55 < entropy["proper_maxrl"] < 0.85
    assert entropy["grpo"] < 0.1


# What is added to the loss.


def bigrams_of(learner: GRPOLearner, inputs: Tensor) -> Tensor:
    """Return log q(. | last character), counted on the learner's text: (N, V)."""
    last = inputs.flatten()[:, None].numpy()
    pairs = np.concatenate([last, np.zeros_like(last)], axis=1)
    reference = NGramReference.fit(NOISE, 16, 2)
    return torch.from_numpy(reference.next_log_probs(pairs, first=1)[:, 0])


def inputs_of(learner: GRPOLearner) -> list[Tensor]:
    inputs: list[Tensor] = []
    learner.model.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    return inputs


def losses(**changes: float) -> tuple[float, float, GRPOStats, GRPOLearner, list[Tensor]]:
    """Return the first loss without and with an addition, and of whom."""
    plain = make_learner(fresh_model(seed=4), NOISE, **CE).update()
    learner = make_learner(fresh_model(seed=4), NOISE, **CE, **regularized(**changes))
    inputs = inputs_of(learner)
    stats = learner.update()
    return plain.loss, stats.loss, stats, learner, inputs


def test_an_entropy_bonus_is_subtracted() -> None:
    plain, found, stats, *_ = losses(entropy_bonus=0.25)
    assert stats.entropy > 2
    assert found == pytest.approx(plain - 0.25 * stats.entropy, rel=1e-5)


def test_missing_entropy_is_charged_one_for_one() -> None:
    plain, found, stats, *_ = losses(entropy_floor=3.0)
    assert found == pytest.approx(plain + 3.0 - stats.entropy, rel=1e-5)
    plain, found, *_ = losses(entropy_floor=1.0)  # there is enough of it
    assert found == plain


def test_a_divergence_from_the_texts_bigrams_is_charged(spy: Spy) -> None:
    learner = make_learner(fresh_model(seed=4), NOISE, **CE, **regularized(kl_coefficient=0.5))
    inputs = inputs_of(learner)
    loss = learner.update().loss
    (log_probs,), (targets,) = spy.log_probs, spy.targets
    reference = bigrams_of(learner, inputs[0])
    divergence = (log_probs.exp() * (log_probs - reference)).sum(1).mean()
    assert divergence > 0.01
    plain = -log_probs.gather(1, targets[:, None]).mean()
    assert loss == pytest.approx(float(plain + 0.5 * divergence), rel=1e-5)
    assert learner.regularizer.kl_coefficient == 0.5  # without a target it stays


@pytest.mark.parametrize(("target", "factor"), [(1e-4, 2.0), (100.0, 0.5)])
def test_the_coefficient_of_the_divergence_adapts(target: float, factor: float) -> None:
    recipe = regularized(kl_coefficient=0.1, kl_target=target)
    learner = make_learner(fresh_model(), NOISE, **CE, **recipe)
    found = []
    for _ in range(3):
        learner.update()
        found.append(learner.regularizer.kl_coefficient)
    assert found == pytest.approx([0.1 * factor, 0.1 * factor**2, 0.1 * factor**3])


def test_an_update_that_was_skipped_adapts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Estimator(None, lambda question: math.nan * question.log_probs.sum())
    monkeypatch.setitem(ESTIMATORS, "ce", broken)
    recipe = regularized(kl_coefficient=0.1, kl_target=1e-4)
    learner = make_learner(fresh_model(), NOISE, **CE, **recipe)
    before = everything(learner)
    assert math.isnan(learner.update().loss)
    assert same(everything(learner), before)
    assert (learner.n_done, learner.n_skipped, learner.n_bad_in_a_row) == (1, 1, 1)
    assert learner.regularizer.kl_coefficient == 0.1


def test_partial_credit_is_the_bigrams_probability_and_never_negative(spy: Spy) -> None:
    recipe = {**CE, "exploration": "sampled", **regularized(partial_credit=0.5)}
    learner = make_learner(fresh_model(), NOISE, **recipe)
    inputs = inputs_of(learner)
    learner.update()
    (actions,), (rewards,), (targets,) = spy.actions, spy.rewards, spy.targets
    credit = 0.5 * bigrams_of(learner, inputs[0]).exp().gather(1, actions)
    torch.testing.assert_close(rewards, (actions == targets[:, None]).float() + credit)
    assert rewards.min() > 0
    assert 1 < rewards.max() <= 1.5
    wrong = rewards[actions != targets[:, None]]
    assert wrong.max() < 0.5
    assert wrong.std() > 1e-3  # it is not the same for all


def test_partial_credit_changes_what_is_learned_and_nothing_where_it_is_the_same() -> None:
    for recipe in ({"estimator": "grpo"}, {**CE, "estimator": "seed_exhaustive"}):
        plain, _ = run(seed=0, **recipe)
        credited, _ = run(seed=0, **recipe, **regularized(partial_credit=0.5))
        assert not same(plain, credited)


# What an update says of itself.


@pytest.mark.parametrize(
    "recipe",
    [
        CE,
        {"estimator": "grpo"},
        {"estimator": "grpo", "horizon": 3},
        {**CE, "estimator": "seed_exhaustive"},
    ],
)
def test_the_parts_of_the_loss_add_up(recipe: dict[str, Any]) -> None:
    extra = {"entropy_bonus": 0.25}
    if "horizon" not in recipe:
        extra |= {"entropy_floor": 3.0, "kl_coefficient": 0.5}
    plain = make_learner(fresh_model(seed=4), NOISE, **recipe).update()
    stats = make_learner(fresh_model(seed=4), NOISE, **recipe, **regularized(**extra)).update()
    assert plain.policy_loss == plain.loss == stats.policy_loss
    assert plain.entropy_loss == 0.0
    missing = 3.0 - stats.entropy if "entropy_floor" in extra else 0.0
    assert missing >= 0
    assert stats.entropy_loss == pytest.approx(missing - 0.25 * stats.entropy, rel=1e-5)
    parts = stats.policy_loss + stats.entropy_loss + stats.kl_coefficient * stats.kl
    assert stats.loss == pytest.approx(parts, rel=1e-5)
    assert (stats.kl > 0) == ("kl_coefficient" in extra)


def test_the_spread_of_advantages_and_rewards_by_hand(spy: Spy) -> None:
    learner = make_learner(fresh_model(), NOISE, **{**CE, "exploration": "sampled"})
    stats = learner.update()
    (rewards,) = spy.rewards
    advantages = centred(rewards).double()
    assert stats.advantage_mean == pytest.approx(float(advantages.mean()), abs=1e-7)
    assert stats.advantage_std == pytest.approx(float(advantages.std(correction=0)), rel=1e-5)
    assert (stats.reward_min, stats.reward_max) == (0.0, 1.0)
    # Rewards 1, 0, 0, 0 and 2, 2, 0, 0 in groups of four; advantages against their means.
    lesson = Lesson(
        torch.tensor(0.0),
        torch.tensor([[1.0, 0, 0, 0], [2, 2, 0, 0]]),
        torch.tensor([[0.75, -0.25, -0.25, -0.25], [1, 1, -1, -1]]),
    )
    assert spread(lesson).tolist() == pytest.approx([0.0, (0.75 + 4.0) / 8, 0.0, 2.0])


def test_a_closed_form_has_no_advantages_to_speak_of() -> None:
    stats = make_learner(fresh_model(), NOISE, **CE).update()
    nothing = stats.advantage_mean, stats.advantage_std, stats.reward_min, stats.reward_max
    assert nothing == (0.0, 0.0, 0.0, 0.0)


def test_rewards_of_texts_are_clipped_and_told_as_paid() -> None:
    recipe = {"estimator": "dr_grpo", "horizon": 3}
    free = make_learner(fresh_model(), NOISE, **recipe).update()
    assert free.reward_min < -0.5
    clipped = make_learner(fresh_model(), NOISE, **recipe, **regularized(reward_clip=0.25)).update()
    assert (clipped.reward_min, clipped.reward_max) == (-0.25, min(free.reward_max, 0.25))
    assert clipped.reward == free.reward  # what the texts earned
    assert clipped.advantage_std < free.advantage_std


def test_shares_of_a_batch_are_told_as_one() -> None:
    rewards = torch.arange(24.0).view(6, 4).square() / 100
    whole = Lesson(torch.tensor(0.5), rewards, centred(rewards) * torch.arange(1, 7)[:, None])
    assert whole.advantages is not None

    def reading(lesson: Lesson) -> Reading:
        return Reading(*[torch.tensor(0.5)] * 8, spread(lesson))

    expected = unpacked(packed(reading(whole), ALONE), ALONE)
    rows = []
    for rank in range(3):
        mine = slice(2 * rank, 2 * rank + 2)
        share = Lesson(whole.loss, rewards[mine], whole.advantages[mine])
        rows.append(packed(reading(share), Ranks(rank, 3)))
    mean = torch.stack(rows).mean(0)
    for rank in range(3):
        assert unpacked(mean, Ranks(rank, 3)) == pytest.approx(expected, rel=1e-5)


# Temperature, and the cost of it all.


def test_the_policy_is_tempered_wherever_it_counts(spy: Spy) -> None:
    model = fresh_model(seed=4)
    with torch.no_grad():
        model.embed.weight.mul_(30)
    learner = make_learner(model, NOISE, temperature=2.0, **CE)
    logits: list[Tensor] = []
    model.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    stats = learner.update()
    tempered = (logits[0] / 2).log_softmax(-1).flatten(0, 1)
    torch.testing.assert_close(spy.log_probs[0], tempered)
    entropy = -(tempered.exp() * tempered).sum(1).mean()
    assert stats.entropy == pytest.approx(float(entropy), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "cost"),
    [
        ({}, 3 * 4 * 16),  # forward and backward of 4 windows of 16
        (CE, 3 * 4 * 16),
        ({"estimator": "grpo", "sync_every": 2}, 4 * 4 * 16),  # and an older policy's forward
        # 4 x 8 texts of 13 and 3, the last of which is not read: written once, and learned from
        ({"estimator": "grpo", "horizon": 3, "group_size": 8}, 4 * 4 * 8 * 15),
    ],
)
def test_compute_is_counted_by_hand(recipe: dict[str, Any], cost: int) -> None:
    learner = make_learner(fresh_model(), NOISE, **recipe)
    for n in (1, 2, 3):
        learner.update()
        assert learner.forward_tokens == n * cost


def test_the_learner_trains_the_model_that_it_was_given() -> None:
    model = fresh_model()
    learner = make_learner(model, NOISE)
    assert isinstance(learner, GRPOLearner)
    assert learner.model is model
