from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents.evaluation.statistics import Interval
from agents.evaluation.surgeon_effect import (
    Effect,
    final_operations,
    measure_effect,
    random_coefficients,
    verdict,
)
from agents.surgeons.baselines import RandomSurgeon, ZeroSurgeon
from avatarl_env.patient import Patient
from tests.fakes import fingerprint
from tests.training_runs import ScriptedSurgeon, small_env, small_eval_env, taught_patient


def measure(surgeon: Any, env: Any, after: str = "joint", seed: int = 0, n: int = 12) -> Effect:
    return measure_effect(surgeon, env, after, np.random.default_rng(seed), n_prompts=n)


# Final operations.


def test_a_surgeon_ends_where_its_actions_lead_on_the_prompts_of_the_seed() -> None:
    env = small_eval_env(n_rows=4, episode_length=3)
    twin = small_env(n_rows=4, episode_length=3, autoreset_mode=AutoresetMode.DISABLED)
    actions = np.repeat([[0.0], [0.25], [-0.5], [1.0]], 4, axis=1).astype(np.float32)
    records = final_operations(ScriptedSurgeon(env, actions), env, seed=8)
    twin.reset(seed=8)
    for _ in range(3):
        *_, infos = twin.step(actions)
    assert [r.coefficients.tolist() for r in records] == [[c] * 4 for c in (0, 0.375, -0.75, 1)]
    assert [r.total for r in records] == infos["improvement"].tolist()
    assert records[0].total == 0.0
    assert [(r.row, r.flatline, r.lost_score) for r in records] == [
        (row, None, 0.0) for row in range(4)
    ]


def test_an_operation_that_ends_early_is_not_followed_by_another() -> None:
    env = small_eval_env(  # where moving is fatal
        episode_length=4, operator="output_temperature", operator_options={"scale": 20.0}
    )
    actions = np.array([[0.5], [0.0]])
    killed, alive = final_operations(ScriptedSurgeon(env, actions), env, seed=0)
    assert killed.coefficients.tolist() == [0.25]
    assert killed.length == 1
    assert killed.total <= -1.0
    assert str(killed.flatline).startswith("entropy")
    assert (alive.coefficients.tolist(), alive.flatline, alive.length) == ([0.0], None, 4)
    assert alive.total == pytest.approx(0.0, abs=1e-5)  # another batch than its baseline's


def test_random_coefficients_are_those_of_the_random_surgeon() -> None:
    env = small_eval_env(n_rows=24, episode_length=3)
    drawn = np.stack([random_coefficients(env, np.random.default_rng(i)) for i in range(400)])
    assert np.abs(drawn).max() == 1.0  # some are clipped
    # Three steps of 0.5 U(-1, 1): standard deviation sqrt(3) * 0.289 = 0.5.
    np.testing.assert_allclose(drawn.std(0), 0.5, atol=0.05)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.1)
    records = final_operations(RandomSurgeon(env, 0), env, seed=0)
    ends = np.mean([np.abs(r.coefficients) for r in records])
    assert ends == pytest.approx(np.abs(drawn).mean(), abs=0.08)


# Measurements.


def test_doing_nothing_is_worth_exactly_nothing() -> None:
    env = small_eval_env(n_rows=3)
    effect = measure(ZeroSurgeon(env, 0), env, "surgery", n=14)
    nothing = Interval(0.0, 0.0, 0.0, 0.0, 3)
    for policy in ("zero", "surgeon"):
        assert effect.kl_ref_gain[policy] == effect.heldout_loss_fall[policy] == nothing
    random = effect.kl_ref_gain["random"].mean, effect.heldout_loss_fall["random"].mean
    over = effect.kl_ref_over_random.mean, effect.heldout_loss_over_random.mean
    assert over == pytest.approx((-random[0], -random[1]))
    assert random[0] != 0.0
    # 14 prompts cannot be shared out evenly; the unit of an interval is the operation.
    assert (effect.after, effect.n_operations, effect.n_prompts) == ("surgery", 3, 12)
    assert effect.kl_ref_over_random.n == 3


def test_all_policies_are_compared_on_the_same_fresh_validation_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = small_eval_env()
    asked: list[str] = []
    windows = Patient.windows

    def spy(self: Patient, split: str, *arguments: Any) -> Any:
        asked.append(split)
        return windows(self, split, *arguments)

    monkeypatch.setattr(Patient, "windows", spy)
    monkeypatch.setattr(
        "agents.evaluation.surgeon_effect.random_coefficients", lambda *_: np.full(4, 0.5)
    )
    effect = measure(ScriptedSurgeon(env, 0.5), env)
    # The surgeon sees its own split, one draw for each row; then prompts and windows, drawn once.
    assert asked == ["surgeon"] * 2 + ["validation"] * 3
    # Here both end at 0.5.
    assert effect.kl_ref_gain["surgeon"] == effect.kl_ref_gain["random"]
    assert effect.heldout_loss_over_random == Interval(0.0, 0.0, 0.0, 0.0, 2)


def test_harm_is_found_to_be_harm() -> None:
    env = small_eval_env(taught_patient(), n_rows=3, n_new=8)
    effect = measure(ScriptedSurgeon(env, 1.0), env)
    assert effect.kl_ref_gain["surgeon"].high < 0
    assert effect.heldout_loss_fall["surgeon"].high < 0
    text = verdict([effect], "scripted")
    assert text.startswith("The surgeon did harm.")
    assert "lowered its score (kl_ref)" in text
    assert "raised the held-out loss" in text


def test_measuring_changes_nothing_and_is_repeatable() -> None:
    env = small_env()
    eval_env = small_eval_env(env.patient)
    env.reset(seed=1)
    before, operations = fingerprint(env.patient.model), env.get_state()
    env.patient.forward_tokens = 1234
    surgeon = ScriptedSurgeon(eval_env, 0.3)
    first = measure(surgeon, eval_env, seed=3)
    assert measure(surgeon, eval_env, seed=3) == first
    assert measure(surgeon, eval_env, seed=4) != first
    assert env.patient.forward_tokens == 1234
    assert env.patient.n_changes == 0
    assert fingerprint(env.patient.model) == before
    found, *_ = env.step(np.full((2, 4), 0.2, np.float32))
    env.set_state(operations)
    assert np.array_equal(env.step(np.full((2, 4), 0.2, np.float32))[0], found)


@pytest.mark.parametrize(
    ("score", "name", "is_kl_ref"),
    [
        ({"kl_ref": 0.5}, "0.5 kl_ref", True),
        ({"kl_ref": -1.0}, "-1 kl_ref", False),
        ({"entropy": 2.0, "distinct": 1.0}, "2 entropy + distinct", False),
    ],
)
def test_the_surgeons_own_score_is_measured_too(
    score: dict[str, float], name: str, is_kl_ref: bool
) -> None:
    env = small_eval_env(n_rows=3, score=score)
    effect = measure(ScriptedSurgeon(env, 0.5), env)
    assert effect.score == name
    assert Effect.from_summary(json.loads(json.dumps(effect.as_summary()))) == effect
    assert (effect.score_gain is None) is is_kl_ref
    if effect.score_gain is not None:
        gain = effect.score_gain["surgeon"].mean
        assert gain != 0
        assert effect.score_gain["zero"].is_zero
        if name == "-1 kl_ref":
            assert gain == pytest.approx(-effect.kl_ref_gain["surgeon"].mean, abs=1e-6)


# Words.


def around(mean: float, half: float) -> Interval:
    return Interval(mean, mean - half, mean + half, mean - 0.8 * half, 8)


def made_up(score: Interval, fall: Interval, after: str = "joint") -> Effect:
    """Return an effect with the same differences to random operations as to none."""
    other = {"random": around(-0.01, 0.02), "zero": NOTHING}
    gains, falls = {"surgeon": score, **other}, {"surgeon": fall, **other}
    return Effect(after, gains, falls, score, fall, n_operations=8, n_prompts=256)


GOOD, BAD, UNSURE = around(0.02, 0.005), around(-0.02, 0.005), around(0.001, 0.005)
NOTHING, NO_NUMBER = around(0.0, 0.0), around(float("nan"), 0.0)
TRIFLE = around(0.001, 0.0005)  # surely above zero, and surely too small to name
AT_THE_EDGE = around(0.0019, 0.0017)  # from 0.0002 to 0.0036
TOUCHING = Interval(0.01, 0.0, 0.02, 0.0, 8)
ONE = Interval(0.02, float("nan"), float("nan"), float("nan"), 1)
KINDS = [GOOD, BAD, UNSURE, NOTHING, NO_NUMBER, TRIFLE, AT_THE_EDGE, TOUCHING, ONE]


@pytest.mark.parametrize(
    ("score", "fall", "headline"),
    [
        (GOOD, GOOD, "The surgeon helped."),
        (GOOD, AT_THE_EDGE, "The surgeon helped."),
        (GOOD, UNSURE, "The surgeon raised its score, with no difference larger than 0.0060"),
        (GOOD, NOTHING, "The surgeon raised its score, with no change in the prediction"),
        (UNSURE, GOOD, "The surgeon improved the prediction of real text, with no difference "),
        (GOOD, BAD, "The surgeon raised its score at the cost of predicting real text worse."),
        (BAD, GOOD, "The surgeon lowered its score, but improved the prediction of real text."),
        (BAD, BAD, "The surgeon did harm."),
        (BAD, UNSURE, "The surgeon did harm."),
        (TRIFLE, BAD, "The surgeon did harm."),
        (UNSURE, UNSURE, "The surgeon made no difference larger than 0.0060 nats/char."),
        (UNSURE, TOUCHING, "The surgeon made no difference larger than 0.0200 nats/char."),
        (UNSURE, around(-0.004, 0.00443), "The surgeon made no difference larger than 0.0085 "),
        (TRIFLE, TRIFLE, "The surgeon made no difference larger than 0.0015 nats/char."),
        (NOTHING, around(0.0, 0.00012), "The surgeon made no difference larger than 0.00012 nats"),
        (NOTHING, NOTHING, "The surgeon changed nothing."),
        (NO_NUMBER, GOOD, "The surgeon broke the model"),
        (GOOD, NO_NUMBER, "The surgeon broke the model"),
        (GOOD, ONE, "There were too few operations"),
    ],
)
def test_a_headline_claims_no_more_than_the_intervals_show(
    score: Interval, fall: Interval, headline: str
) -> None:
    assert verdict([made_up(score, fall)], "sac").startswith(headline)


def check_phrase(text: str, gain: Interval, what: str, sign: int) -> None:
    """Check that a text says of a quantity what its interval shows."""
    found = re.search(
        rf"(\w+) (?:an effect on |no effect on )?(?:its|the) {what}(.*?)(?: and |$)", text
    )
    assert found is not None
    verb, figures = found.groups()
    if not gain.is_finite:
        assert "could not be measured" in figures
    elif gain.is_zero:
        assert (verb, "exactly as it was" in figures) == ("left", True)
    else:
        ends = sorted((sign * gain.low, sign * gain.high))
        if gain.sign:
            assert verb == ("raised" if sign * gain.sign > 0 else "lowered")
            ends = sorted(map(abs, ends))
        else:
            assert "distinguishable from zero" in figures
        shown = [float(x) for x in re.findall(r"-?\d[\d.e-]*", figures)[-2:]]
        assert shown == pytest.approx(ends, abs=5.1e-5)


@pytest.mark.parametrize("score", KINDS)
@pytest.mark.parametrize("fall", KINDS)
def test_whatever_was_measured_the_words_agree_with_the_figures(
    score: Interval, fall: Interval
) -> None:
    text = verdict([made_up(score, fall)], "sac")
    headline, _, rest = text.partition(". After ")
    assert "nan" not in text
    # To help takes both quantities.
    is_known = score.is_finite and fall.is_finite
    are_good = score.low > 0 < fall.low and TRIFLE not in (score, fall)
    assert ("helped" in headline) == (is_known and are_good)
    own, against = rest.rstrip(".").split("; compared with random operations they ")
    own, _, how = own.partition(" (8 operations")
    assert how == " on 256 unseen prompts, 95 % intervals)"
    for part in (own, against):
        check_phrase(part, score, "score", 1)
        check_phrase(part, fall, "held-out loss", -1)
    bound = re.search(r"no difference larger than (\S+) nats", headline)
    if bound is not None:
        hidden = [gain for gain in (score, fall) if gain.sign == 0 or gain == TRIFLE]
        assert float(bound[1]) >= max(gain.largest for gain in hidden)


def test_another_score_is_told_beside_kl_ref() -> None:
    effect = made_up(GOOD, BAD)._replace(
        score="kl_ref + 20 heldout_loss",
        score_gain={"surgeon": BAD, "random": BAD, "zero": NOTHING},
    )
    text = verdict([effect], "sac")
    assert text.startswith("The surgeon raised kl_ref at the cost of predicting real text worse.")
    assert "lowered its own score (kl_ref + 20 heldout_loss) by 0.0200 [0.0150, 0.0250], " in text
    assert "its score (kl_ref)" not in text


def test_the_headline_is_of_the_last_phase_and_each_phase_has_a_sentence() -> None:
    effects = [made_up(BAD, BAD, "surgery"), made_up(GOOD, GOOD)]
    text = verdict(effects, "sac")
    assert text.startswith(
        "The surgeon helped. After surgery, sac's operations lowered its score (kl_ref) by 0.0200"
    )
    assert " After joint, sac's operations raised its score (kl_ref) by 0.0200" in text
    assert verdict(effects[::-1], "sac").startswith("The surgeon did harm. After joint, ")
    assert verdict([], "none") == "No surgeon operated in this run."


def test_practice_is_told_and_random_is_not_compared_with_itself() -> None:
    effect = made_up(BAD, around(0.00002, 0.00001))._replace(n_practised=60)
    text = verdict([effect], "random")
    assert "After joint and 60 operations, random's operations" in text
    assert "compared with" not in text
    assert "by 2e-05 nats/char [1e-05, 3e-05]" in text  # not 0.0000


def test_null_in_a_summary_is_nan() -> None:
    record = json.loads(json.dumps(made_up(GOOD, GOOD).as_summary()))
    assert record["kl_ref_gain"]["surgeon"] == GOOD._asdict()
    record["kl_ref_gain"]["surgeon"]["mean"] = None
    again = Effect.from_summary(record)
    assert np.isnan(again.kl_ref_gain["surgeon"].mean)
    assert verdict([again], "sac").startswith("The surgeon broke the model")
