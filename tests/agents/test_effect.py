from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents import effect as effect_module
from agents.effect import (
    Effect,
    final_operations,
    measure_effect,
    random_coefficients,
    verdict,
)
from agents.judgement import Exam
from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from avatarl_env.patient import Patient
from avatarl_env.scoring import Interval
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import (
    ScriptedSurgeon,
    small_env,
    small_exam,
    taught_patient,
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on twelve prompts, four for each of three operations."""
    monkeypatch.setattr(effect_module, "N_PROMPTS", 12)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.usefixtures("immortal")
def test_a_surgeon_ends_where_its_actions_lead() -> None:
    env = small_exam(n_rows=4, n_incisions=3, step_size=0.5)
    actions = np.repeat([[0.0], [0.25], [-0.5], [1.0]], 4, axis=1)
    endings = final_operations(ScriptedSurgeon(env, actions), env, seed=0)
    assert [ending.coefficients.tolist() for ending in endings] == [
        [expected] * 4 for expected in (0.0, 0.375, -0.75, 1.0)
    ]
    assert [ending.flatline for ending in endings] == [None] * 4
    assert endings[0].total == 0.0
    assert all(type(ending.total) is float for ending in endings)


@pytest.mark.usefixtures("immortal")
def test_the_return_is_the_improvement_on_the_prompts_of_the_seed() -> None:
    env, twin = small_exam(n_rows=3), small_env(n_rows=3, autoreset_mode=AutoresetMode.DISABLED)
    endings = final_operations(ScriptedSurgeon(env, 0.3), env, seed=8)
    twin.reset(seed=8)
    for _ in range(2):
        *_, infos = twin.step(np.full((3, 4), 0.3, np.float32))
    assert [ending.total for ending in endings] == infos["improvement"].tolist()
    assert [ending.lost_score for ending in endings] == [0.0] * 3


def test_what_an_injury_had_cost_is_told() -> None:
    env = small_exam(taught_patient(), n_rows=3, injury=1.0)
    endings = final_operations(ScriptedSurgeon(env), env, seed=0)
    assert all(ending.lost_score != 0 for ending in endings)
    assert len({ending.lost_score for ending in endings}) == 3


def test_the_seed_decides_the_prompts_that_the_surgeon_is_shown() -> None:
    env = small_exam()
    seen: list[list[list[float]]] = []

    class Watching(ScriptedSurgeon):
        def act(self, observations: np.ndarray, begins: np.ndarray) -> np.ndarray:
            seen.append(observations.tolist())
            return super().act(observations, begins)

    for seed in (5, 5, 6):
        final_operations(Watching(env, 0.1), env, seed)
    assert seen[:2] == seen[2:4]
    assert seen[0] != seen[4]
    assert seen[0][1] == pytest.approx(seen[4][0], abs=1e-5)  # row 1 of seed 5, row 0 of seed 6


def test_an_operation_that_kills_the_patient_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_exam(n_incisions=4)
    actions = np.array([[0.5] * 4, [0.0] * 4])
    monkeypatch.setattr("avatarl_env.episode.ENTROPY_RANGE", (2.0, 3.0))  # who moves dies
    killed, alive = final_operations(ScriptedSurgeon(env, actions), env, seed=0)
    assert killed.coefficients.tolist() == [0.25] * 4
    assert killed.total == -1.0
    assert str(killed.flatline).startswith("entropy")
    # What began on that row meanwhile is nobody's, and the other row went on to its end.
    # It was evaluated in other company than its baseline, hence the rounding.
    assert (alive.coefficients.tolist(), alive.flatline) == ([0.0] * 4, None)
    assert alive.total == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_other_ways_of_beginning_anew_are_refused(mode: AutoresetMode) -> None:
    env = small_env(autoreset_mode=mode)
    with pytest.raises(ValueError, match="autoreset_mode must be NEXT_STEP, got"):
        final_operations(ZeroSurgeon(env, 0), env, seed=0)


def test_random_operations_go_where_random_incisions_lead() -> None:
    env = small_exam(n_incisions=4, step_size=0.5)
    drawn = np.stack([random_coefficients(env, rng(seed)) for seed in range(400)])
    assert drawn.shape == (400, 4)
    assert np.abs(drawn).max() == 1.0  # some are stopped by the bound
    # Four steps of 0.5 U(-1, 1): standard deviation sqrt(4) * 0.289 = 0.577, a little less clipped.
    np.testing.assert_allclose(drawn.std(0), 0.55, atol=0.06)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.12)
    assert random_coefficients(env, rng(7)).tolist() == drawn[7].tolist()


@pytest.mark.usefixtures("immortal")
def test_a_random_operation_is_what_the_random_surgeon_would_do() -> None:
    env = small_exam(n_rows=24, n_incisions=3)
    endings = final_operations(RandomSurgeon(env, 0), env, seed=0)
    ends = [np.abs(ending.coefficients).mean() for ending in endings]
    drawn = [np.abs(random_coefficients(env, rng(seed))).mean() for seed in range(200)]
    assert np.mean(ends) == pytest.approx(np.mean(drawn), abs=0.1)


@pytest.mark.usefixtures("few")
def test_doing_nothing_is_worth_exactly_nothing() -> None:
    env = small_exam(n_rows=3)
    effect = measure_effect(ZeroSurgeon(env, 0), env, "surgery", rng())
    nothing = Interval(0.0, 0.0, 0.0, 0.0, 3)
    for policy in ("zero", "surgeon"):
        assert effect.kl_ref_gain[policy] == nothing
        assert effect.heldout_loss_fall[policy] == nothing
    assert effect.kl_ref_gain["random"].mean != 0.0
    over = effect.kl_ref_over_random
    assert over.mean == pytest.approx(-effect.kl_ref_gain["random"].mean)
    assert (effect.after, effect.n_operations, effect.n_prompts) == ("surgery", 3, 12)


class Examined(Exam):
    """An exam that tells how it was drawn and who sat it."""

    drawn: list[dict[str, Any]] = []  # noqa: RUF012 - emptied by every test
    sat: list[np.ndarray] = []  # noqa: RUF012

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.drawn.append(keywords)

    def gains(self, operator: Any, coefficients: np.ndarray) -> Any:
        self.sat.append(coefficients.copy())
        return super().gains(operator, coefficients)


@pytest.mark.usefixtures("few", "immortal")
def test_all_policies_sit_one_exam_on_fresh_validation_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = small_exam(n_rows=3)
    monkeypatch.setattr(effect_module, "Exam", Examined)
    monkeypatch.setattr(Examined, "drawn", [])
    monkeypatch.setattr(Examined, "sat", [])
    effect = measure_effect(ScriptedSurgeon(env, 0.5), env, "surgery", rng())
    (drawn,) = Examined.drawn
    assert (drawn["split"], drawn["n_operations"], drawn["n_each"]) == ("validation", 3, 4)
    surgeon, random, zero = Examined.sat
    assert surgeon.tolist() == [[0.5] * 4] * 3
    assert (np.abs(random).max(axis=1) > 0).all()
    assert np.abs(random).max() <= 1
    assert len({tuple(row) for row in random.tolist()}) == 3
    assert zero.tolist() == [[0.0] * 4] * 3
    # Operations are the unit: three of them, whatever the prompts.
    assert effect.kl_ref_gain["surgeon"].n == effect.kl_ref_over_random.n == 3


@pytest.mark.usefixtures("few", "immortal")
def test_two_policies_that_do_the_same_are_worth_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    env = small_exam(n_rows=3)
    monkeypatch.setattr(effect_module, "random_coefficients", lambda *_: np.full(4, 0.5))
    effect = measure_effect(ScriptedSurgeon(env, 0.5), env, "surgery", rng())
    assert effect.kl_ref_gain["surgeon"] == effect.kl_ref_gain["random"]
    assert effect.heldout_loss_fall["surgeon"] == effect.heldout_loss_fall["random"]
    assert effect.kl_ref_over_random == Interval(0.0, 0.0, 0.0, 0.0, 3)


@pytest.mark.usefixtures("few", "immortal")
def test_only_validation_text_is_read_once_the_operations_are_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = small_exam()
    asked: list[str] = []
    windows = Patient.windows

    def spy(self: Patient, split: str, *arguments: Any) -> Any:
        asked.append(split)
        return windows(self, split, *arguments)

    monkeypatch.setattr(Patient, "windows", spy)
    measure_effect(ScriptedSurgeon(env, 0.5), env, "surgery", rng())
    # The surgeon is shown its own split, one draw for each row; then prompts and windows.
    assert asked == ["surgeon"] * 2 + ["validation"] * 3


@pytest.mark.usefixtures("few")
def test_two_operations_are_enough() -> None:
    env = small_exam(n_rows=2)
    effect = measure_effect(ScriptedSurgeon(env, 0.2), env, "surgery", rng())
    assert (effect.n_operations, effect.n_prompts) == (2, 12)
    for gain in (*effect.kl_ref_gain.values(), *effect.heldout_loss_fall.values()):
        assert np.isfinite(gain).all()
        assert gain.n == 2


@pytest.mark.usefixtures("few")
def test_prompts_that_cannot_be_shared_out_evenly_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(effect_module, "N_PROMPTS", 11)
    env = small_exam(n_rows=3)
    effect = measure_effect(ScriptedSurgeon(env, 0.2), env, "surgery", rng())
    assert effect.n_prompts == 9


@pytest.mark.usefixtures("few")
def test_harm_is_found_to_be_harm() -> None:
    env = small_exam(taught_patient(), n_rows=3, n_new=8)
    effect = measure_effect(ScriptedSurgeon(env, 1.0), env, "joint", rng())
    assert effect.kl_ref_gain["surgeon"].high < 0
    assert effect.heldout_loss_fall["surgeon"].high < 0
    assert "lowered its score (kl_ref)" in verdict([effect], "scripted")
    assert "raised the held-out loss" in verdict([effect], "scripted")


@pytest.mark.usefixtures("few", "immortal")
def test_an_operator_without_row_edits_gives_the_same_numbers(in_place_gain: str) -> None:
    def measured(operator: str) -> Effect:
        env = small_exam(operator=operator)
        return measure_effect(ScriptedSurgeon(env, 0.3), env, "joint", rng())

    found, expected = measured(in_place_gain), measured("head_gain")
    for policy in ("surgeon", "random", "zero"):
        for one, other in (
            (found.kl_ref_gain, expected.kl_ref_gain),
            (found.heldout_loss_fall, expected.heldout_loss_fall),
        ):
            assert one[policy] == pytest.approx(other[policy], abs=1e-4)


@pytest.mark.usefixtures("few")
def test_measuring_changes_nothing_and_is_repeatable() -> None:
    env = small_exam()
    before, randomness = fingerprint(env.patient.model), global_random_states()
    surgeon = ScriptedSurgeon(env, 0.3)
    env.patient.forward_tokens = 1234
    first = measure_effect(surgeon, env, "joint", rng(3))
    assert env.patient.forward_tokens == 1234  # what is for the reader is no compute of the run
    assert measure_effect(surgeon, env, "joint", rng(3)) == first
    assert measure_effect(surgeon, env, "joint", rng(4)) != first
    assert fingerprint(env.patient.model) == before
    assert global_random_states() == randomness
    assert env.patient.n_changes == 0


@pytest.mark.usefixtures("few")
def test_measuring_leaves_operations_under_way_elsewhere_alone() -> None:
    env = small_env()
    exam = small_exam(env.patient)
    env.reset(seed=1)
    before = env.get_state()
    measure_effect(ScriptedSurgeon(exam, 0.3), exam, "joint", rng())
    found, *_ = env.step(np.full((2, 4), 0.2, np.float32))
    env.set_state(before)
    assert np.array_equal(env.step(np.full((2, 4), 0.2, np.float32))[0], found)


def test_a_run_measures_on_256_prompts() -> None:
    assert effect_module.N_PROMPTS == 256
    assert effect_module.N_PROMPTS % effect_module.N_OPERATIONS == 0
    assert effect_module.N_OPERATIONS >= 2


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
        "The surgeon made no difference of 0.002 nats/char or more that could be measured. "
        "After joint, sac's operations had no effect on its score (kl_ref) that could be told from "
        "zero (none larger than 0.0050 nats/char) and had no effect on the held-out loss that "
        f"could be told from zero (none larger than 0.0070 nats/char) {HOW}; in score they were "
        "not to be told from random operations (difference +0.0010 nats/char [-0.0010, +0.0030])."
    )


GOOD, BAD, UNSURE = around(0.02, 0.005), around(-0.02, 0.005), around(0.001, 0.005)


@pytest.mark.parametrize(
    ("score", "fall", "headline"),
    [
        (GOOD, GOOD, "The surgeon helped."),
        (GOOD, UNSURE, "The surgeon raised its score, without a better prediction of real"),
        (UNSURE, GOOD, "The surgeon improved the prediction of real text, without a rise"),
        (GOOD, BAD, "The surgeon raised its score at the cost of predicting real text worse."),
        (BAD, GOOD, "The surgeon did harm."),
        (UNSURE, BAD, "The surgeon did harm."),
        (UNSURE, UNSURE, "The surgeon made no difference of 0.002 nats/char or more that"),
        (around(0.0, 0.0), around(0.0, 0.0), "The surgeon made no difference of 0.002"),
        (around(0.001, 0.0005), around(-0.001, 0.0005), "The surgeon made no difference of 0.002"),
        (around(0.001, 0.0005), BAD, "The surgeon did harm."),
        (around(float("nan"), 0.0), GOOD, "The surgeon broke the model"),
    ],
)
def test_the_headline_weighs_both_quantities_and_names_no_trifle(
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
    assert "not to be told from random operations" in sentence


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
    assert "not to be told from random operations (difference" in verdict([effect], "sac")


def test_a_tiny_effect_is_not_written_as_zero() -> None:
    tiny = around(0.00002, 0.00001)
    assert "by 2e-05 nats/char [1e-05, 3e-05]" in verdict([made_up(tiny, tiny, tiny)], "sac")
