from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents.evaluation import surgeon_effect as effect_module
from agents.evaluation.paired import PairedEvaluation
from agents.evaluation.surgeon_effect import (
    Effect,
    final_operations,
    measure_effect,
    random_coefficients,
    verdict,
)
from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from avatarl_env.patient import Patient
from avatarl_env.scoring import Interval
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import (
    ScriptedSurgeon,
    small_env,
    small_eval_env,
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
    env = small_eval_env(n_rows=4, episode_length=3, step_size=0.5)
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
    env, twin = small_eval_env(n_rows=3), small_env(n_rows=3, autoreset_mode=AutoresetMode.DISABLED)
    endings = final_operations(ScriptedSurgeon(env, 0.3), env, seed=8)
    twin.reset(seed=8)
    for _ in range(2):
        *_, infos = twin.step(np.full((3, 4), 0.3, np.float32))
    assert [ending.total for ending in endings] == infos["improvement"].tolist()
    assert [ending.lost_score for ending in endings] == [0.0] * 3


def test_what_an_injury_had_cost_is_told() -> None:
    env = small_eval_env(taught_patient(), n_rows=3, injury=1.0)
    endings = final_operations(ScriptedSurgeon(env), env, seed=0)
    assert all(ending.lost_score != 0 for ending in endings)
    assert len({ending.lost_score for ending in endings}) == 3


def test_the_seed_decides_the_prompts_that_the_surgeon_is_shown() -> None:
    env = small_eval_env()
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
    env = small_eval_env(episode_length=4)
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


def test_random_operations_go_where_random_steps_lead() -> None:
    env = small_eval_env(episode_length=4, step_size=0.5)
    drawn = np.stack([random_coefficients(env, rng(seed)) for seed in range(400)])
    assert drawn.shape == (400, 4)
    assert np.abs(drawn).max() == 1.0  # some are stopped by the bound
    # Four steps of 0.5 U(-1, 1): standard deviation sqrt(4) * 0.289 = 0.577, a little less clipped.
    np.testing.assert_allclose(drawn.std(0), 0.55, atol=0.06)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.12)
    assert random_coefficients(env, rng(7)).tolist() == drawn[7].tolist()


@pytest.mark.usefixtures("immortal")
def test_a_random_operation_is_what_the_random_surgeon_would_do() -> None:
    env = small_eval_env(n_rows=24, episode_length=3)
    endings = final_operations(RandomSurgeon(env, 0), env, seed=0)
    ends = [np.abs(ending.coefficients).mean() for ending in endings]
    drawn = [np.abs(random_coefficients(env, rng(seed))).mean() for seed in range(200)]
    assert np.mean(ends) == pytest.approx(np.mean(drawn), abs=0.1)


@pytest.mark.usefixtures("few")
def test_doing_nothing_is_worth_exactly_nothing() -> None:
    env = small_eval_env(n_rows=3)
    effect = measure_effect(ZeroSurgeon(env, 0), env, "surgery", rng())
    nothing = Interval(0.0, 0.0, 0.0, 0.0, 3)
    for policy in ("zero", "surgeon"):
        assert effect.kl_ref_gain[policy] == nothing
        assert effect.heldout_loss_fall[policy] == nothing
    assert effect.kl_ref_gain["random"].mean != 0.0
    over, loss_over = effect.kl_ref_over_random, effect.heldout_loss_over_random
    assert over.mean == pytest.approx(-effect.kl_ref_gain["random"].mean)
    assert loss_over is not None
    assert loss_over.mean == pytest.approx(-effect.heldout_loss_fall["random"].mean)
    assert (effect.after, effect.n_operations, effect.n_prompts) == ("surgery", 3, 12)


class Examined(PairedEvaluation):
    """an evaluation environment that tells how it was drawn and who sat it."""

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
    env = small_eval_env(n_rows=3)
    monkeypatch.setattr(effect_module, "PairedEvaluation", Examined)
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
    env = small_eval_env(n_rows=3)
    monkeypatch.setattr(effect_module, "random_coefficients", lambda *_: np.full(4, 0.5))
    effect = measure_effect(ScriptedSurgeon(env, 0.5), env, "surgery", rng())
    assert effect.kl_ref_gain["surgeon"] == effect.kl_ref_gain["random"]
    assert effect.heldout_loss_fall["surgeon"] == effect.heldout_loss_fall["random"]
    assert effect.kl_ref_over_random == Interval(0.0, 0.0, 0.0, 0.0, 3)


@pytest.mark.usefixtures("few", "immortal")
def test_only_validation_text_is_read_once_the_operations_are_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = small_eval_env()
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
    env = small_eval_env(n_rows=2)
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
    env = small_eval_env(n_rows=3)
    effect = measure_effect(ScriptedSurgeon(env, 0.2), env, "surgery", rng())
    assert effect.n_prompts == 9


@pytest.mark.usefixtures("few")
def test_harm_is_found_to_be_harm() -> None:
    env = small_eval_env(taught_patient(), n_rows=3, n_new=8)
    effect = measure_effect(ScriptedSurgeon(env, 1.0), env, "joint", rng())
    assert effect.kl_ref_gain["surgeon"].high < 0
    assert effect.heldout_loss_fall["surgeon"].high < 0
    assert "lowered its score (kl_ref)" in verdict([effect], "scripted")
    assert "raised the held-out loss" in verdict([effect], "scripted")


@pytest.mark.usefixtures("few", "immortal")
def test_an_operator_without_row_edits_gives_the_same_numbers(in_place_gain: str) -> None:
    def measured(operator: str) -> Effect:
        env = small_eval_env(operator=operator)
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
    env = small_eval_env()
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
    eval_env = small_eval_env(env.patient)
    env.reset(seed=1)
    before = env.get_state()
    measure_effect(ScriptedSurgeon(eval_env, 0.3), eval_env, "joint", rng())
    found, *_ = env.step(np.full((2, 4), 0.2, np.float32))
    env.set_state(before)
    assert np.array_equal(env.step(np.full((2, 4), 0.2, np.float32))[0], found)


def test_a_run_measures_on_256_prompts() -> None:
    assert effect_module.N_PROMPTS == 256
    assert effect_module.N_PROMPTS % effect_module.N_OPERATIONS == 0
    assert effect_module.N_OPERATIONS >= 2


def around(mean: float, half: float) -> Interval:
    return Interval(mean, mean - half, mean + half, mean - 0.8 * half, 8)


def made_up(
    score: Interval,
    fall: Interval,
    over: Interval,
    loss_over: Interval | None = None,
    after: str = "joint",
) -> Effect:
    nothing = around(0.0, 0.0)
    return Effect(
        after,
        {"surgeon": score, "random": around(-0.01, 0.02), "zero": nothing},
        {"surgeon": fall, "random": around(-0.01, 0.02), "zero": nothing},
        over,
        8,
        256,
        heldout_loss_over_random=loss_over,
    )


GOOD, BAD, UNSURE = around(0.02, 0.005), around(-0.02, 0.005), around(0.001, 0.005)
NOTHING, NO_NUMBER = around(0.0, 0.0), around(float("nan"), 0.0)
TRIFLE = around(0.001, 0.0005)  # surely above zero, and surely below what is worth a name
AT_THE_EDGE = around(0.0019, 0.0017)  # reaches from 0.0002 to 0.0036
TOUCHING = Interval(0.01, 0.0, 0.02, 0.0, 8)
ALL_EQUAL = around(0.02, 0.0)
ONE = Interval(0.02, float("nan"), float("nan"), float("nan"), 1)
TOO_FEW = "There were too few operations"


@pytest.mark.parametrize(
    ("score", "fall", "headline"),
    [
        (GOOD, GOOD, "The surgeon helped."),
        (GOOD, ALL_EQUAL, "The surgeon helped."),
        (GOOD, AT_THE_EDGE, "The surgeon helped."),
        (GOOD, UNSURE, "The surgeon raised its score, with no difference larger than 0.0060"),
        (GOOD, NOTHING, "The surgeon raised its score, with no change in the prediction"),
        (UNSURE, GOOD, "The surgeon improved the prediction of real text, with no difference "),
        (GOOD, BAD, "The surgeon raised its score at the cost of predicting real text worse."),
        (BAD, GOOD, "The surgeon lowered its score, though it improved the prediction of real"),
        (BAD, BAD, "The surgeon did harm."),
        (BAD, UNSURE, "The surgeon did harm."),
        (UNSURE, BAD, "The surgeon did harm."),
        (TRIFLE, BAD, "The surgeon did harm."),
        (UNSURE, UNSURE, "The surgeon made no difference larger than 0.0060 nats/char."),
        (UNSURE, TOUCHING, "The surgeon made no difference larger than 0.0200 nats/char."),
        (UNSURE, around(-0.004, 0.00443), "The surgeon made no difference larger than 0.0085 "),
        (TRIFLE, TRIFLE, "The surgeon made no difference larger than 0.0015 nats/char."),
        (NOTHING, TRIFLE, "The surgeon made no difference larger than 0.0015 nats/char."),
        (NOTHING, around(0.0, 0.00012), "The surgeon made no difference larger than 0.00012 nats"),
        (NOTHING, NOTHING, "The surgeon changed nothing."),
        (NO_NUMBER, GOOD, "The surgeon broke the model"),
        (GOOD, NO_NUMBER, "The surgeon broke the model"),
        (ONE, ONE, TOO_FEW),
        (GOOD, ONE, TOO_FEW),
    ],
)
def test_a_headline_claims_no_more_than_the_intervals_show(
    score: Interval, fall: Interval, headline: str
) -> None:
    assert verdict([made_up(score, fall, UNSURE)], "sac").startswith(headline)


KINDS = [GOOD, BAD, UNSURE, NOTHING, NO_NUMBER, TRIFLE, AT_THE_EDGE, TOUCHING, ALL_EQUAL, ONE]


@pytest.mark.parametrize("score", KINDS)
@pytest.mark.parametrize("fall", KINDS)
def test_whatever_was_measured_the_words_agree_with_the_figures(
    score: Interval, fall: Interval
) -> None:
    text = verdict([made_up(score, fall, score, fall)], "sac")
    headline, _, rest = text.partition(". After ")
    assert "nan" not in text
    known = np.isfinite([*score, *fall]).all()
    # Better is never said of one quantity alone: to help takes both, and both are named below.
    assert ("helped" in headline) == (
        known and score.low > 0 < fall.low and TRIFLE not in (score, fall)
    )
    own, against = rest.split("; compared with random operations they ")
    own, _, how = own.partition(" (8 operations")
    assert how == " on 256 unseen prompts, 95 % intervals)"
    for part in (own, against):
        for gain, what, sign in ((score, "score", 1), (fall, "held-out loss", -1)):
            said = re.search(
                rf"(\w+) (?:an effect on |no effect on )?(?:its|the) {what}(.*?)(?: and |$)", part
            )
            assert said is not None
            verb, figures = said.groups()
            if not np.isfinite(gain).all():
                assert "could not be measured" in figures
                continue
            if gain.low == gain.high == 0:
                assert (verb, "exactly as it was" in figures) == ("left", True)
                continue
            shown = [float(x) for x in re.findall(r"-?\d[\d.e-]*", figures)[-2:]]
            if gain.low <= 0 <= gain.high:
                assert "could be told from zero" in figures
                ends = sorted((sign * gain.low, sign * gain.high))
            else:
                assert verb == ("raised" if sign * gain.low > 0 else "lowered")
                ends = sorted((abs(gain.low), abs(gain.high)))
            assert shown == pytest.approx(ends, abs=5.1e-5)
    bound = re.search(r"no difference larger than (\S+) nats", headline)
    if bound is not None:
        hidden = [g for g in (score, fall) if g.low <= 0 <= g.high or g == TRIFLE]
        assert float(bound[1]) >= max(max(abs(g.low), abs(g.high)) for g in hidden)


def test_a_score_of_ones_own_is_told_beside_kl_ref() -> None:
    effect = made_up(GOOD, BAD, GOOD, BAD)._replace(
        score="kl_ref + 20 heldout_loss",
        score_gain={"surgeon": BAD, "random": BAD, "zero": NOTHING},
    )
    text = verdict([effect], "sac")
    assert text.startswith("The surgeon raised kl_ref at the cost of predicting real text worse.")
    assert "lowered its own score (kl_ref + 20 heldout_loss) by 0.0200 [0.0150, 0.0250], " in text
    assert "its score (kl_ref)" not in text


@pytest.mark.usefixtures("few", "immortal")
@pytest.mark.parametrize(
    ("score", "name", "quantity"),
    [
        ({"kl_ref": 1.0}, "kl_ref", None),
        ({"kl_ref": 0.5}, "0.5 kl_ref", None),
        ({"kl_ref": -1.0}, "-1 kl_ref", "kl_ref"),
        ({"entropy": 2.0, "distinct": 1.0}, "2 entropy + distinct", "entropy"),
    ],
)
def test_the_surgeons_own_score_is_measured_too(
    score: dict[str, float], name: str, quantity: str | None
) -> None:
    env = small_eval_env(n_rows=3, score=score)
    effect = measure_effect(ScriptedSurgeon(env, 0.5), env, "joint", rng())
    assert effect.score == name
    assert Effect.from_summary(json.loads(json.dumps(effect.as_summary()))) == effect
    if quantity is None:
        assert effect.score_gain is None
        return
    assert effect.score_gain is not None
    assert effect.score_gain["surgeon"].mean != 0
    assert effect.score_gain["zero"] == Interval(0.0, 0.0, 0.0, 0.0, 3)
    if quantity == "kl_ref":
        found = effect.score_gain["surgeon"]
        assert found.mean == pytest.approx(-effect.kl_ref_gain["surgeon"].mean, abs=1e-6)


def test_figures_that_were_no_numbers_come_back_as_such() -> None:
    record = made_up(NO_NUMBER, GOOD, NO_NUMBER).as_summary()
    record["kl_ref_gain"]["surgeon"]["mean"] = None  # as JSON has it
    again = Effect.from_summary(record)
    assert np.isnan(again.kl_ref_gain["surgeon"].mean)
    assert verdict([again], "sac").startswith("The surgeon broke the model")


def test_the_headline_is_of_the_last_phase() -> None:
    effects = [made_up(BAD, BAD, UNSURE, after="surgery"), made_up(GOOD, GOOD, UNSURE)]
    assert verdict(effects, "sac").startswith("The surgeon helped. After surgery, ")
    assert verdict(effects[::-1], "sac").startswith("The surgeon did harm. After joint, ")


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
        "heldout_loss_over_random",
        "score",
        "score_gain",
    }
    assert summary["kl_ref_gain"].keys() == {"surgeon", "random", "zero"}
    gain = summary["kl_ref_gain"]["surgeon"]
    assert gain.keys() == {"mean", "low", "high", "lower_bound", "n"}
    assert (gain["mean"], gain["low"], gain["n"]) == (0.02, 0.015, 8)


def test_practice_is_told_and_random_is_not_compared_with_itself() -> None:
    effect = made_up(BAD, BAD, UNSURE)._replace(n_practised=60)
    assert "After joint and 60 operations, random's operations" in verdict([effect], "random")
    assert "compared with" not in verdict([effect], "random")
    assert "; compared with random operations they had no effect" in verdict([effect], "sac")


def test_a_tiny_effect_is_not_written_as_zero() -> None:
    tiny = around(0.00002, 0.00001)
    assert "by 2e-05 nats/char [1e-05, 3e-05]" in verdict([made_up(tiny, tiny, tiny)], "sac")
