"""What a learner learns from that somebody else sampled, and from texts (horizon above 1)."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.grpo import learner as learner_module
from agents.grpo.config import RegularizerConfig
from agents.grpo.estimators import ESTIMATORS
from agents.grpo.learner import GRPOLearner
from agents.grpo.optimizer import Optimizer
from agents.grpo.rollouts import Rollouts
from avatarl_env.lm.gpt import GPT
from avatarl_env.patient import Patient
from avatarl_env.text.ngram import NGramReference
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import cycle, everything, fresh_model, make_learner, same, small_env

NOISE = np.random.default_rng(7).integers(0, 16, 400)
GRPO: dict[str, Any] = {"estimator": "grpo", "group_size": 8}
TEXTS: dict[str, Any] = {**GRPO, "horizon": 4}
OF_TEXTS = ["grpo", "dr_grpo", "rloo", "gspo", "cispo"]


class Seen(NamedTuple):
    """What a surrogate was given."""

    log_probs: Tensor
    behavior: Tensor
    advantages: Tensor
    bounds: tuple[float, ...]

    @property
    def ratios(self) -> Tensor:
        return (self.log_probs - self.behavior).exp()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Collect what the surrogate of `grpo` is given."""
    row, given = ESTIMATORS["grpo"].sampled, []
    assert row is not None

    def spy(log_probs: Tensor, behavior: Tensor, advantages: Tensor, *bounds: float) -> Tensor:
        given.append(Seen(log_probs.detach().clone(), behavior.clone(), advantages, bounds))
        return row.surrogate(log_probs, behavior, advantages, *bounds)

    changed = ESTIMATORS["grpo"]._replace(sampled=row._replace(surrogate=spy))
    monkeypatch.setitem(ESTIMATORS, "grpo", changed)
    return given


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GPT, Rollouts]]:
    """Collect who wrote what."""
    roll_out, texts = learner_module.roll_out, []

    def spy(model: GPT, *arguments: Any, **keywords: Any) -> Rollouts:
        texts.append((model, roll_out(model, *arguments, **keywords)))
        return texts[-1][1]

    monkeypatch.setattr(learner_module, "roll_out", spy)
    return texts


class Clinic:
    """A learner whose model can be operated on."""

    def __init__(self, n_updates: int = 100, **recipe: Any) -> None:
        self.env = small_env()
        self.patient: Patient = self.env.patient
        self.learner = make_learner(
            self.patient.model, self.patient.splits["train"], n_updates=n_updates, **recipe
        )

    def operated(self, coefficient: float = 0.7) -> AbstractContextManager[object]:
        return self.patient.operated(self.env.operator, np.full(4, coefficient))


# An older policy.


@pytest.mark.parametrize("recipe", [GRPO, TEXTS], ids=["characters", "texts"])
def test_where_the_policy_samples_itself_all_ratios_are_exactly_one(
    recipe: dict[str, Any], seen: list[Seen]
) -> None:
    learner = make_learner(fresh_model(), NOISE, **recipe)
    for _ in range(3):
        learner.update()
    assert all(torch.equal(one.ratios, torch.ones_like(one.ratios)) for one in seen)


@pytest.mark.parametrize("recipe", [GRPO, TEXTS], ids=["characters", "texts"])
def test_an_older_policy_samples_until_the_next_synchronisation(
    recipe: dict[str, Any], seen: list[Seen]
) -> None:
    learner = make_learner(fresh_model(), NOISE, sync_every=3, warmup_updates=0, **recipe)
    for _ in range(7):
        learner.update()
    far = [float((one.ratios - 1).abs().max()) for one in seen]
    fresh, old = [far[0], far[3], far[6]], [far[1], far[2], far[4], far[5]]
    assert max(fresh) < 1e-5  # texts were written with a cache, which rounds its own way
    assert min(old) > 1e-2


def test_at_a_synchronisation_the_ratio_of_a_character_is_exactly_one(seen: list[Seen]) -> None:
    learner = make_learner(fresh_model(), NOISE, sync_every=2, **GRPO)
    learner.update()
    assert torch.equal(seen[0].ratios, torch.ones_like(seen[0].ratios))


@pytest.mark.parametrize("recipe", [GRPO, TEXTS], ids=["characters", "texts"])
def test_ratios_are_bounded_as_the_recipe_says(recipe: dict[str, Any], seen: list[Seen]) -> None:
    make_learner(fresh_model(), NOISE, clip=0.11, clip_high=0.47, **recipe).update()
    assert seen[0].bounds == (0.11, 0.47)


@pytest.mark.parametrize("recipe", [GRPO, TEXTS], ids=["characters", "texts"])
def test_who_samples_does_so_at_the_policys_temperature(
    recipe: dict[str, Any], seen: list[Seen]
) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.embed.weight.mul_(30)  # far from uniform
    make_learner(model, NOISE, temperature=2.0, sync_every=2, **recipe).update()
    assert (seen[0].ratios - 1).abs().max() < 1e-4
    assert seen[0].log_probs.std() > 0.2  # another temperature would be seen


def test_who_synchronises_at_every_update_learns_as_who_needs_no_old_policy() -> None:
    # The first of two updates, whoever samples it: the same numbers, the same dice.
    plain = make_learner(fresh_model(), NOISE, **GRPO)
    with_old = make_learner(fresh_model(), NOISE, sync_every=2, **GRPO)
    assert plain.update() == with_old.update()
    assert same(everything(plain), everything(with_old))
    plain.update()
    with_old.update()
    assert not same(everything(plain), everything(with_old))


def test_the_old_policy_is_what_the_model_was(
    seen: list[Seen], written: list[tuple[GPT, Rollouts]]
) -> None:
    learner = make_learner(fresh_model(), NOISE, sync_every=2, **TEXTS)
    prints = []
    for _ in range(4):
        prints.append(fingerprint(learner.model))
        learner.update()
        (writer, _) = written[-1]
        assert writer is not learner.model
        assert fingerprint(writer) == prints[0 if len(prints) <= 2 else 2]


@pytest.mark.parametrize("recipe", [GRPO, TEXTS], ids=["characters", "texts"])
def test_somebody_who_writes_the_model_says_so_and_the_old_policy_follows(
    recipe: dict[str, Any], seen: list[Seen]
) -> None:
    clinic = Clinic(sync_every=10, **recipe)
    clinic.learner.update()
    clinic.patient.commit(clinic.env.operator, np.full(4, 0.5))
    clinic.learner.model_changed()
    clinic.learner.update()
    assert (seen[1].ratios - 1).abs().max() < 1e-5
    clinic.patient.commit(clinic.env.operator, np.full(4, 0.5))
    clinic.learner.update()
    assert (seen[2].ratios - 1).abs().max() > 1e-2


# The operated model.


def naive_log_probs(model: GPT, texts: Tensor, horizon: int) -> Tensor:
    with torch.no_grad():
        log_probs = model(texts[:, :-1]).log_softmax(-1)[:, -horizon:]
    return log_probs.gather(2, texts[:, -horizon:, None])[:, :, 0]


def test_behaviour_is_recorded_inside_the_theater_and_the_policy_outside(
    seen: list[Seen], written: list[tuple[GPT, Rollouts]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Optimizer, "step", lambda self: None)
    clinic = Clinic(**TEXTS)
    model = clinic.patient.model
    clinic.learner.update(clinic.operated())
    ((writer, rollouts),) = written
    assert writer is model
    shape = seen[0].behavior.shape
    with clinic.operated():
        inside = naive_log_probs(model, rollouts.tokens, 4).view(shape)
    outside = naive_log_probs(model, rollouts.tokens, 4).view(shape)
    torch.testing.assert_close(seen[0].behavior, inside, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0].log_probs, outside, rtol=0, atol=1e-5)
    assert (inside - outside).abs().max() > 1e-2


@pytest.mark.parametrize("sync_every", [1, 3])  # with an old policy, which does not sample now
def test_so_it_is_with_single_characters(
    sync_every: int, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Optimizer, "step", lambda self: None)
    clinic = Clinic(sync_every=sync_every, **GRPO)
    batches: list[tuple[Tensor, Tensor]] = []
    drawn: list[Tensor] = []
    batch, sample = GRPOLearner._batch, GRPOLearner._sample

    def read(self: GRPOLearner) -> tuple[Tensor, Tensor]:
        batches.append(batch(self))
        return batches[-1]

    def act(self: GRPOLearner, log_probs: Tensor) -> Tensor:
        drawn.append(sample(self, log_probs))
        return drawn[-1]

    monkeypatch.setattr(GRPOLearner, "_batch", read)
    monkeypatch.setattr(GRPOLearner, "_sample", act)
    clinic.learner.update(clinic.operated())
    (inputs, _), (actions,) = batches[0], drawn

    def of(actions: Tensor) -> Tensor:
        with torch.no_grad():
            log_probs = clinic.patient.model(inputs).log_softmax(-1).flatten(0, 1)
        return log_probs.gather(1, actions)[:, :, None]

    with clinic.operated():
        inside = of(actions)
    assert torch.equal(seen[0].behavior, inside)
    assert torch.equal(seen[0].log_probs, of(actions))
    assert (seen[0].ratios - 1).abs().max() > 1e-2


@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("recipe", [GRPO, TEXTS], ids=["characters", "texts"])
def test_only_the_optimizer_writes_the_model_that_was_operated_on(
    recipe: dict[str, Any], sync_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic = Clinic(sync_every=sync_every, **recipe)
    model, step = clinic.patient.model, Optimizer.step
    prints = [fingerprint(model)]

    def stepped(self: Optimizer) -> None:
        assert fingerprint(model) == prints[-1]  # restored to the last bit
        step(self)
        prints.append(fingerprint(model))

    monkeypatch.setattr(Optimizer, "step", stepped)
    identity = [(id(p), p.data_ptr()) for p in model.parameters()]
    for _ in range(3):
        clinic.learner.update(clinic.operated())
        assert fingerprint(model) == prints[-1]
    assert len(prints) == 4
    assert all(before != after for before, after in itertools.pairwise(prints))
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == identity


def test_where_the_body_fails_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Rollouts:
        raise RuntimeError("no dice")

    monkeypatch.setattr(learner_module, "roll_out", fail)
    clinic = Clinic(**TEXTS)
    before = everything(clinic.learner)
    with pytest.raises(RuntimeError, match="no dice"):
        clinic.learner.update(clinic.operated())
    assert same(everything(clinic.learner), before)


def test_an_operation_that_changes_nothing_changes_nothing() -> None:
    plain, operated = Clinic(**GRPO), Clinic(**GRPO)
    for _ in range(2):
        assert plain.learner.update() == operated.learner.update(operated.operated(0.0))
    assert same(everything(plain.learner), everything(operated.learner))
    assert plain.learner.update() != operated.learner.update(operated.operated(0.7))


def test_the_operated_model_samples_also_where_there_is_an_old_policy(
    seen: list[Seen], written: list[tuple[GPT, Rollouts]]
) -> None:
    clinic = Clinic(sync_every=5, **TEXTS)
    clinic.learner.update(clinic.operated())
    assert written[0][0] is clinic.patient.model
    clinic.learner.update()
    assert written[1][0] is not clinic.patient.model


def test_the_operated_models_forward_is_counted() -> None:
    clinic = Clinic(**GRPO)
    clinic.learner.update(clinic.operated())
    assert clinic.learner.forward_tokens == 4 * 4 * 64
    texts = Clinic(**TEXTS)
    texts.learner.update(texts.operated())
    assert texts.learner.forward_tokens == 4 * 4 * 8 * (32 + 4 - 1)


def test_the_global_generators_are_left_alone() -> None:
    before = global_random_states()
    clinic = Clinic(sync_every=2, **TEXTS)
    for _ in range(2):
        clinic.learner.update(clinic.operated())
        clinic.learner.update()
    assert global_random_states() == before


# Texts.


def test_a_horizon_that_the_context_has_no_room_for_is_refused() -> None:
    message = r"^horizon must be less than the context, 16, got 16$"
    with pytest.raises(ValueError, match=message):
        make_learner(fresh_model(), NOISE, **{**TEXTS, "horizon": 16})
    make_learner(fresh_model(), NOISE, **{**TEXTS, "horizon": 15}).update()


def test_prompts_are_real_text_and_every_place_of_it_can_be_one(
    written: list[tuple[GPT, Rollouts]],
) -> None:
    # Context 16, four characters written after twelve; 18 characters leave three places.
    learner = make_learner(fresh_model(vocab_size=18), np.arange(18), batch_size=8, **TEXTS)
    for _ in range(5):
        learner.update()
    prompts = torch.cat([rollouts.tokens[:, :12] for _, rollouts in written])
    assert torch.equal(prompts, prompts[:, :1] + torch.arange(12))
    assert set(prompts[:, 0].tolist()) == {0, 1, 2}
    assert learner.tokens_per_update == 8 * 8 * 4


def test_advantages_are_of_the_rewards_and_statistics_their_means(
    seen: list[Seen], written: list[tuple[GPT, Rollouts]]
) -> None:
    learner = make_learner(fresh_model(vocab_size=8), cycle(400, 8), **TEXTS)
    stats = learner.update()
    rewards = written[0][1].rewards
    assert rewards.shape == (4, 8)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = centred / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(seen[0].advantages, expected)
    assert stats.reward == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert stats.accuracy == pytest.approx(float(written[0][1].matched.mean()))
    assert 0 < stats.accuracy < 0.3  # one in eight by chance, and what follows it
    assert stats.entropy == pytest.approx(np.log(8), abs=0.1)  # of what was written alone


def test_the_reward_is_counted_on_the_training_text(
    written: list[tuple[GPT, Rollouts]],
) -> None:
    learner = make_learner(fresh_model(), NOISE, match_bonus=0.0, **TEXTS)
    learner.update()
    _, rollouts = written[0]
    reference = NGramReference.fit(NOISE, 16)
    expected = torch.from_numpy(reference.target_log_probs(rollouts.tokens.numpy(), first=12))
    gains = expected.view(4, 8, 4) - rollouts.behavior_log_probs
    torch.testing.assert_close(rollouts.rewards, gains.mean(2))


def test_the_bonus_for_what_is_right_counts_as_much_as_the_recipe_says(
    written: list[tuple[GPT, Rollouts]],
) -> None:
    for bonus in (0.0, 2.0):
        learner = make_learner(fresh_model(), cycle(400, 16), match_bonus=bonus, **TEXTS)
        learner.update()
    (_, without), (_, with_bonus) = written
    assert without.matched.max() > 0
    torch.testing.assert_close(with_bonus.rewards, without.rewards + 2 * without.matched)


def test_an_entropy_bonus_is_subtracted_from_the_loss_of_texts() -> None:
    plain = make_learner(fresh_model(), NOISE, **TEXTS).update()
    extra = RegularizerConfig(entropy_bonus=0.25)
    stats = make_learner(fresh_model(), NOISE, regularizer=extra, **TEXTS).update()
    assert stats.loss == pytest.approx(plain.loss - 0.25 * stats.entropy, rel=1e-5)


def test_texts_are_read_in_the_chosen_precision_by_who_wrote_them() -> None:
    stats = make_learner(fresh_model(), NOISE, **TEXTS, precision="bfloat16").update()
    assert all(np.isfinite(value) for value in stats)
    assert stats.behavior_kl == 0.0


@pytest.mark.parametrize("estimator", ["proper_maxrl", "brier", "maxrl"])
def test_nobody_else_samples_where_there_is_no_ratio(estimator: str) -> None:
    learner = make_learner(fresh_model(), NOISE, estimator=estimator)
    message = f"^operated must be None for {estimator}, whose policy samples itself, got a context$"
    with pytest.raises(ValueError, match=message):
        learner.update(nullcontext())
    assert learner.n_done == 0


def test_how_far_who_sampled_is_from_the_policy_is_reported() -> None:
    learner = make_learner(fresh_model(), NOISE, estimator="rloo", sync_every=2, **FAST)
    first, second = learner.update(), learner.update()
    assert first.behavior_kl == pytest.approx(0.0, abs=1e-6)  # just synchronised
    assert second.behavior_kl > 1e-4


FAST = {"learning_rate": 3e-2, "matrix_learning_rate": 0.05, "warmup_updates": 0}
STILL = {"learning_rate": 1e-6, "matrix_learning_rate": 1e-6}


def taught(sync_every: int = 1, **recipe: Any) -> tuple[float, float]:
    """Let a model write texts of two characters; return its mean rewards at first and at last."""
    recipe = {"horizon": 2, "group_size": 8, "sync_every": sync_every, **recipe}
    learner = make_learner(fresh_model(vocab_size=8), cycle(400, 8), n_updates=20, **recipe)
    rewards = [learner.update().reward for _ in range(20)]
    return float(np.mean(rewards[:2])), float(np.mean(rewards[-3:]))


@pytest.mark.parametrize("sync_every", [1, 2])
@pytest.mark.parametrize("estimator", OF_TEXTS)
def test_texts_get_better(estimator: str, sync_every: int) -> None:
    # At first seven of eight characters are all but impossible; 1 is for what is right, surely.
    first, last = taught(sync_every, estimator=estimator, **FAST)
    assert first < -7.5
    assert first + 3 < last < 1.2  # how far depends on how the processor rounds in bfloat16


def test_who_does_not_learn_does_not_get_better() -> None:
    first, last = taught(estimator="grpo", **STILL)
    assert last == pytest.approx(first, abs=0.8)


@pytest.mark.parametrize("estimator", OF_TEXTS)
def test_texts_get_better_where_the_operated_model_writes_them(estimator: str) -> None:
    def rewards(**rates: float) -> list[float]:
        recipe = {"estimator": estimator, "horizon": 2, "group_size": 8, **rates}
        clinic = Clinic(n_updates=10, **recipe)
        return [clinic.learner.update(clinic.operated()).reward for _ in range(10)]

    # The same dice: the same prompts for both.
    assert np.mean(rewards(**FAST)[-3:]) > np.mean(rewards(**STILL)[-3:]) + 1.0
