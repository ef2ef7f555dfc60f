from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from agents import effect as effect_module
from agents.effect import (
    Effect,
    final_operation,
    measure_effect,
    random_coefficients,
    verdict,
)
from agents.surgeons import RandomSurgeon, ZeroSurgeon
from avatarl_env.patient import Patient
from avatarl_env.scoring import Interval
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import (
    ScriptedSurgeon,
    immortal,  # noqa: F401 - a fixture
    small_env,
    taught_patient,
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on three operations with four prompts each."""
    monkeypatch.setattr(effect_module, "N_OPERATIONS", 3)
    monkeypatch.setattr(effect_module, "N_PROMPTS", 12)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.usefixtures("immortal")
def test_a_surgeon_ends_where_its_actions_lead() -> None:
    env = small_env(n_incisions=3, step_size=0.5)
    for action, expected in ((0.0, 0.0), (0.25, 0.375), (-0.5, -0.75), (1.0, 1.0)):
        coefficients = final_operation(ScriptedSurgeon(env, action), env, seed=0).coefficients
        assert coefficients.tolist() == [expected] * 4


def test_the_seed_decides_the_prompts_that_the_surgeon_is_shown() -> None:
    env = small_env()
    seen: list[list[float]] = []

    class Watching(ScriptedSurgeon):
        def act(self, observation: np.ndarray) -> np.ndarray:
            seen.append(observation.tolist())
            return super().act(observation)

    for seed in (5, 5, 6):
        final_operation(Watching(env, 0.1), env, seed)
    assert seen[:2] == seen[2:4]
    assert seen[0] != seen[4]


def test_an_operation_that_kills_the_patient_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_env()
    monkeypatch.setattr("avatarl_env.episode.ENTROPY_RANGE", (2.0, 3.0))  # nobody survives
    coefficients = final_operation(ScriptedSurgeon(env, 0.5), env, seed=0).coefficients
    assert coefficients.tolist() == [0.25] * 4


def test_random_operations_go_where_random_incisions_lead() -> None:
    env = small_env(n_incisions=4, step_size=0.5)
    drawn = np.stack([random_coefficients(env, rng(seed)) for seed in range(400)])
    assert drawn.shape == (400, 4)
    assert np.abs(drawn).max() == 1.0  # some are stopped by the bound
    # Four steps of 0.5 U(-1, 1): standard deviation sqrt(4) * 0.289 = 0.577, a little less clipped.
    np.testing.assert_allclose(drawn.std(0), 0.55, atol=0.06)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.12)
    assert random_coefficients(env, rng(7)).tolist() == drawn[7].tolist()


@pytest.mark.usefixtures("immortal")
def test_a_random_operation_is_what_the_random_surgeon_would_do() -> None:
    env = small_env(n_incisions=3)
    surgeon = RandomSurgeon(env, 0)
    ends = [np.abs(final_operation(surgeon, env, seed).coefficients).mean() for seed in range(12)]
    drawn = [np.abs(random_coefficients(env, rng(seed))).mean() for seed in range(200)]
    assert np.mean(ends) == pytest.approx(np.mean(drawn), abs=0.15)


@pytest.mark.usefixtures("few")
def test_doing_nothing_is_worth_exactly_nothing() -> None:
    env = small_env()
    effect = measure_effect(ZeroSurgeon(env, 0), env, "surgery", rng())
    nothing = Interval(0.0, 0.0, 0.0, 0.0, 3)
    for policy in ("zero", "surgeon"):
        assert effect.kl_ref_gain[policy] == nothing
        assert effect.heldout_loss_fall[policy] == nothing
    assert effect.kl_ref_gain["random"].mean != 0.0
    over = effect.kl_ref_over_random
    assert over.mean == pytest.approx(-effect.kl_ref_gain["random"].mean)
    assert (effect.after, effect.n_operations, effect.n_prompts) == ("surgery", 3, 12)


@pytest.mark.usefixtures("few", "immortal")
def test_policies_are_compared_on_fresh_validation_text(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_env()
    calls: list[dict[str, Any]] = []
    measure = effect_module.measure_gains

    def spy(patient: Patient, operator: Any, operations: Any, config: Any, **keywords: Any) -> Any:
        calls.append({"operations": operations, **keywords})
        return measure(patient, operator, operations, config, **keywords)

    monkeypatch.setattr(effect_module, "measure_gains", spy)
    measure_effect(ScriptedSurgeon(env, 0.5), env, "surgery", rng())
    assert [(call["split"], call["n_each"]) for call in calls] == [("validation", 4)] * 3
    for call in calls:
        surgeon, random, zero = call["operations"]
        assert surgeon.tolist() == [0.5] * 4
        assert 0 < np.abs(random).max() <= 1
        assert zero.tolist() == [0.0] * 4
    assert calls[0]["operations"][1].tolist() != calls[1]["operations"][1].tolist()


@pytest.mark.usefixtures("few")
def test_harm_is_found_to_be_harm() -> None:
    env = small_env(taught_patient())
    effect = measure_effect(ScriptedSurgeon(env, 1.0), env, "joint", rng())
    assert effect.kl_ref_gain["surgeon"].high < 0
    assert effect.heldout_loss_fall["surgeon"].high < 0
    assert "lowered its score (kl_ref)" in verdict([effect], "scripted")
    assert "raised the held-out loss" in verdict([effect], "scripted")


@pytest.mark.usefixtures("few")
def test_measuring_changes_nothing_and_is_repeatable() -> None:
    env = small_env()
    before, randomness = fingerprint(env.patient.model), global_random_states()
    surgeon = ScriptedSurgeon(env, 0.3)
    env.patient.forward_tokens = 1234
    first = measure_effect(surgeon, env, "joint", rng(3))
    assert env.patient.forward_tokens == 1234  # what is for the reader is no compute of the run
    assert measure_effect(surgeon, env, "joint", rng(3)) == first
    assert measure_effect(surgeon, env, "joint", rng(4)) != first
    assert fingerprint(env.patient.model) == before
    assert global_random_states() == randomness


@pytest.mark.usefixtures("few")
def test_the_environment_needs_a_reset_afterwards() -> None:
    env = small_env()
    measure_effect(ScriptedSurgeon(env, 0.3), env, "joint", rng())
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(np.zeros(4, np.float32))


def test_a_run_measures_on_256_prompts() -> None:
    assert effect_module.N_PROMPTS == 256
    assert effect_module.N_PROMPTS % effect_module.N_OPERATIONS == 0


def around(mean: float, half: float) -> Interval:
    return Interval(mean, mean - half, mean + half, mean - 0.8 * half, 8)


def made_up(score: Interval, fall: Interval, over: Interval, after: str = "joint") -> Effect:
    nothing = around(0.0, 0.0)
    return Effect(
        after,
        {"surgeon": score, "random": around(-0.01, 0.02), "zero": nothing},
        {"surgeon": fall, "random": around(-0.01, 0.02), "zero": nothing},
        over,
        8,
        256,
    )


HOW = "(8 operations on 256 unseen prompts, 95 % intervals)"


def test_a_gain_in_words() -> None:
    effect = made_up(around(0.02, 0.005), around(0.004, 0.001), around(0.03, 0.01))
    assert verdict([effect], "sac") == (
        "The surgeon helped. "
        "After joint, sac's operations raised its score (kl_ref) by 0.0200 nats/char "
        "[0.0150, 0.0250] and lowered the held-out loss by 0.0040 nats/char [0.0030, 0.0050] "
        f"{HOW}; in score they were better than random operations "
        "(difference +0.0300 nats/char [+0.0200, +0.0400])."
    )


def test_a_loss_in_words() -> None:
    effect = made_up(around(-0.02, 0.005), around(-0.004, 0.001), around(-0.03, 0.01))
    assert verdict([effect], "sac") == (
        "The surgeon did harm. "
        "After joint, sac's operations lowered its score (kl_ref) by 0.0200 nats/char "
        "[0.0150, 0.0250] and raised the held-out loss by 0.0040 nats/char [0.0030, 0.0050] "
        f"{HOW}; in score they were worse than random operations "
        "(difference -0.0300 nats/char [-0.0400, -0.0200])."
    )


def test_no_effect_in_words_says_how_large_one_could_have_been_missed() -> None:
    effect = made_up(around(0.001, 0.004), around(-0.002, 0.005), around(0.001, 0.002))
    assert verdict([effect], "sac") == (
        "The surgeon made no difference that could be measured. "
        "After joint, sac's operations had no effect on its score (kl_ref) that could be told from "
        "zero (none larger than 0.0050 nats/char) and had no effect on the held-out loss that "
        f"could be told from zero (none larger than 0.0070 nats/char) {HOW}; in score they were "
        "no different from random operations (difference +0.0010 nats/char [-0.0010, +0.0030])."
    )


GOOD, BAD, UNSURE = around(0.02, 0.005), around(-0.02, 0.005), around(0.001, 0.005)


@pytest.mark.parametrize(
    ("score", "fall", "headline"),
    [
        (GOOD, GOOD, "The surgeon helped."),
        (GOOD, UNSURE, "The surgeon raised its score, without a better prediction of real"),
        (UNSURE, GOOD, "The surgeon improved the prediction of real text, without a rise"),
        (GOOD, BAD, "The surgeon did harm."),  # sharpening
        (BAD, GOOD, "The surgeon did harm."),
        (UNSURE, BAD, "The surgeon did harm."),
        (UNSURE, UNSURE, "The surgeon made no difference that could be measured."),
        (around(0.0, 0.0), around(0.0, 0.0), "The surgeon made no difference that could be"),
        (around(float("nan"), 0.0), GOOD, "The surgeon broke the model"),
    ],
)
def test_the_headline_counts_harm_to_either_quantity_as_harm(
    score: Interval, fall: Interval, headline: str
) -> None:
    assert verdict([made_up(score, fall, UNSURE)], "sac").startswith(headline)


def test_the_headline_is_of_the_last_phase() -> None:
    effects = [made_up(BAD, BAD, UNSURE, after="surgery"), made_up(GOOD, GOOD, UNSURE)]
    assert verdict(effects, "sac").startswith("The surgeon helped. After surgery, ")
    assert verdict(effects[::-1], "sac").startswith("The surgeon did harm. After joint, ")


def test_exactly_nothing_in_words() -> None:
    effect = made_up(around(0.0, 0.0), around(0.0, 0.0), around(0.01, 0.02))
    sentence = verdict([effect], "zero")
    assert "left its score (kl_ref) exactly as it was" in sentence
    assert "and left the held-out loss exactly as it was" in sentence


def test_an_interval_that_touches_zero_is_no_effect() -> None:
    effect = made_up(
        Interval(0.01, 0.0, 0.02, 0.0, 8),
        Interval(-0.01, -0.02, 0.0, -0.02, 8),
        Interval(0.01, 0.0, 0.02, 0.0, 8),
    )
    sentence = verdict([effect], "sac")
    assert sentence.count("that could be told from zero (none larger than 0.0200 nats/char)") == 2
    assert "no different from random operations" in sentence


def test_each_phase_has_its_sentence_and_a_run_without_surgery_says_so() -> None:
    both = [made_up(around(0.1, 0.01), around(0.1, 0.01), around(0.1, 0.01), after="surgery")]
    both += [made_up(around(0.2, 0.01), around(0.1, 0.01), around(0.1, 0.01))]
    text = verdict(both, "sac")
    first = (
        "The surgeon helped. After surgery, sac's operations raised its score (kl_ref) by 0.1000"
    )
    assert text.startswith(first)
    assert " After joint, sac's operations raised its score (kl_ref) by 0.2000" in text
    assert verdict([], "none") == (
        "No surgeon operated in this run, so there is nothing to say of one."
    )


def test_an_effect_can_be_written_as_json() -> None:
    effect = made_up(around(0.02, 0.005), around(0.004, 0.001), around(0.03, 0.01))
    summary = json.loads(json.dumps(effect.as_summary()))
    assert summary.keys() == {
        "after",
        "kl_ref_gain",
        "heldout_loss_fall",
        "kl_ref_over_random",
        "n_operations",
        "n_prompts",
        "n_practised",
    }
    assert summary["kl_ref_gain"].keys() == {"surgeon", "random", "zero"}
    gain = summary["kl_ref_gain"]["surgeon"]
    assert gain.keys() == {"mean", "low", "high", "lower_bound", "n"}
    assert (gain["mean"], gain["low"], gain["n"]) == (0.02, 0.015, 8)


def test_practice_is_told_and_random_is_not_compared_with_itself() -> None:
    effect = made_up(BAD, BAD, UNSURE)._replace(n_practised=60)
    assert "After joint and 60 operations, random's operations" in verdict([effect], "random")
    assert "random operations (" not in verdict([effect], "random")
    assert "no different from random operations (difference" in verdict([effect], "sac")


def test_a_tiny_effect_is_not_written_as_zero() -> None:
    tiny = around(0.00002, 0.00001)
    assert "by 2e-05 nats/char [1e-05, 3e-05]" in verdict([made_up(tiny, tiny, tiny)], "sac")
