"""Tests of avatarl_env/episode.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avatarl_env.episode import Episode, EpisodeConfig, Outcome
from avatarl_env.observation import Vitals
from avatarl_env.patient import Evaluation, Prompts
from avatarl_env.scoring import BOUND, Generations, Score

SCORE = Score()
NO_INJURY = np.zeros(2)


def reading(
    kl_ref: float = -1.0, entropy: float = 2.0, collision_l2: float = 3.0, finite: bool = True
) -> Evaluation:
    """Return an evaluation with these terms."""
    generations = Generations(
        tokens=np.zeros((2, 6), dtype=np.int64),
        n_prompt=2,
        distributions=np.full((2, 4, 1), 0.0 if finite else math.nan),
        prompt_loss=np.zeros(2),
    )
    terms = {"kl_ref": kl_ref, "entropy": entropy, "collision_l2": collision_l2}
    return Evaluation(generations, Vitals(*np.zeros((3, 1), dtype=np.float32)), terms)


def begin(
    baseline: Evaluation | None = None,
    healthy: Evaluation | None = None,
    injury: np.ndarray = NO_INJURY,
    **rules: Any,
) -> Episode:
    baseline = baseline or reading()
    prompts = Prompts(np.zeros((2, 2), dtype=np.int64), np.zeros((2, 4), dtype=np.float32))
    terms = (healthy or baseline).terms
    return Episode.begin(EpisodeConfig(**rules), prompts, injury, baseline, terms, SCORE)


def take_step(episode: Episode, action: object, evaluation: Evaluation) -> Outcome:
    return episode.conclude(episode.next_coefficients(np.asarray(action)), evaluation, SCORE)


# --- coefficients ---------------------------------------------------------------------------------


def test_coefficients_by_hand() -> None:
    """Each step adds half the action; action and coefficients are clipped to [-1, 1]."""
    episode = begin()
    path = []
    for action in ([7.0, -0.5], [1.0, -1.0], [0.5, -1.0], [-0.25, 1.0]):
        take_step(episode, action, reading())
        path.append(episode.coefficients.tolist())
    assert path == [[0.5, -0.25], [1.0, -0.75], [1.0, -1.0], [0.875, -0.5]]
    assert episode.coefficients.dtype == np.float64


@given(
    episode_length=st.integers(1, 6),
    surplus=st.floats(1.0, 3.0),
    target=st.lists(st.floats(-1, 1), min_size=2, max_size=2),
)
def test_every_coefficient_can_be_reached(
    episode_length: int, surplus: float, target: list[float]
) -> None:
    step_size = surplus / episode_length
    if episode_length * step_size < 1:  # by rounding
        step_size = math.nextafter(step_size, math.inf)
    episode = begin(episode_length=episode_length, step_size=step_size)
    for _ in range(episode_length):
        take_step(episode, (np.array(target) - episode.coefficients) / step_size, reading())
    assert episode.is_over
    assert episode.coefficients == pytest.approx(np.array(target), abs=1e-12)


# --- rewards --------------------------------------------------------------------------------------


def test_rewards_are_increases_of_the_score_and_add_up_to_the_improvement() -> None:
    episode = begin(reading(kl_ref=-1.0))
    before = episode.scores
    times = [episode.time_left]
    outcomes = []
    for k in (-0.75, -1.5, -0.25, -0.5):
        outcomes.append(take_step(episode, [0.5, 0.5], reading(kl_ref=k)))
        times.append(episode.time_left)
    assert [outcome.reward for outcome in outcomes] == [0.25, -0.75, 1.25, -0.25]
    assert [outcome.terminated for outcome in outcomes] == [False, False, False, True]
    assert [outcome.info["improvement"] for outcome in outcomes] == [0.25, -0.5, 0.75, 0.5]
    assert times == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert episode.total_reward == episode.improvement == 0.5
    assert episode.scores == (-1.0, -0.75, -1.5, -0.25, -0.5)
    assert before == (-1.0,)


# --- flatlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluation", "cause"),
    [
        # the baseline has kl_ref -1, entropy 2, collisions 3; a good score is no excuse
        (reading(kl_ref=0.0, entropy=0.99), "entropy 0.990 outside [1.000, 3.000] nats"),
        (reading(entropy=3.01), "entropy 3.010 outside [1.000, 3.000] nats"),
        (reading(collision_l2=8.01), "collision_l2 8.01 above 8.00"),
        (reading(finite=False), "non-finite logits"),
        (reading(entropy=-BOUND, collision_l2=BOUND, finite=False), "non-finite logits"),
        # the fall of the score may be worse than the penalty
        (reading(kl_ref=-4.5, entropy=0.99), "entropy 0.990 outside [1.000, 3.000] nats"),
        (reading(kl_ref=-BOUND, finite=False), "non-finite logits"),
    ],
)
def test_a_flatline_returns_the_penalty_or_a_worse_fall_of_the_score(
    evaluation: Evaluation, cause: str
) -> None:
    rng = np.random.default_rng(0)
    for n_before, penalty in itertools.product(range(4), (1.0, 0.0, 2.5)):
        episode = begin(flatline_penalty=penalty)
        rewards = [
            take_step(episode, [0.1, 0.1], reading(kl_ref=-rng.random())).reward
            for _ in range(n_before)
        ]
        outcome = take_step(episode, [0.1, 0.1], evaluation)
        assert outcome.terminated is True
        assert outcome.info["flatline"] == episode.flatline == cause
        assert outcome.info["is_success"] is False
        is_scored = cause != "non-finite logits"  # its text, else the penalty alone counts
        expected = min(-penalty, evaluation.terms["kl_ref"] - -1.0) if is_scored else -penalty
        assert sum([*rewards, outcome.reward]) == expected == episode.total_reward
        assert math.isfinite(outcome.reward)
        assert episode.is_over


@pytest.mark.parametrize(
    "evaluation",
    [reading(entropy=1.0), reading(entropy=3.0), reading(collision_l2=8.0), reading(kl_ref=-900)],
)
def test_the_bounds_themselves_are_survived(evaluation: Evaluation) -> None:
    outcome = take_step(begin(), [0.1, 0.1], evaluation)
    assert outcome.info["flatline"] == ""
    assert not outcome.terminated


@pytest.mark.parametrize(
    "evaluation", [reading(entropy=9.0), reading(collision_l2=99.0), reading(finite=False)]
)
def test_zero_coefficients_never_flatline(evaluation: Evaluation) -> None:
    episode = begin()
    assert take_step(episode, [0, 0], evaluation).info["flatline"] == ""
    take_step(episode, [1, -1], reading())
    outcome = take_step(episode, [-1, 1], evaluation)  # back at zero
    assert not outcome.terminated
    assert take_step(episode, [1, 0], evaluation).info["flatline"]


@pytest.mark.parametrize(
    ("evaluation", "survives"),
    [
        # injured: entropy 1, collisions 10; healthy: entropy 4, collisions 2
        (reading(entropy=0.5, collision_l2=10), True),
        (reading(entropy=0.49, collision_l2=10), False),
        (reading(entropy=6.0, collision_l2=10), True),  # 1.5 times the healthy one's
        (reading(entropy=6.01, collision_l2=10), False),
        (reading(entropy=4.0, collision_l2=15), True),  # 5 above the injured one's
        (reading(entropy=4.0, collision_l2=15.1), False),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_healing_an_injury_is_no_flatline(
    evaluation: Evaluation, survives: bool, swap: bool
) -> None:
    injured, healthy = reading(entropy=1.0, collision_l2=10.0), reading(entropy=4, collision_l2=2)
    if swap:  # an injury may as well raise what a healthy model has less of
        injured, healthy = healthy, injured
    episode = begin(injured, healthy, np.array([0.1, 0.2]))
    assert (take_step(episode, [0.1, 0.1], evaluation).info["flatline"] == "") == survives


# --- info -----------------------------------------------------------------------------------------


def test_info_by_hand_is_a_copy() -> None:
    episode = begin(reading(kl_ref=-1.0), reading(kl_ref=-0.25), episode_length=2)
    expected: dict[str, Any] = {
        "score": -1.0,
        "improvement": 0.0,
        "score_terms": {"kl_ref": -1.0, "entropy": 2.0, "collision_l2": 3.0},
        "baseline_terms": {"kl_ref": -1.0, "entropy": 2.0, "collision_l2": 3.0},
        "coefficients": pytest.approx(np.zeros(2)),
        "flatline": "",
        "is_success": False,
        "lost_score": 0.75,
    }
    info = episode.info(SCORE)
    assert info == expected
    info["coefficients"] += 1
    info["score_terms"]["kl_ref"] = info["baseline_terms"]["kl_ref"] = 9.0
    assert episode.info(SCORE) == expected
    assert take_step(episode, [1, 0], reading(kl_ref=-0.75)).info["is_success"] is False  # not yet
    assert take_step(episode, [0, 0], reading(kl_ref=-0.5)).info == {
        **expected,
        "score": -0.5,
        "improvement": 0.5,
        "score_terms": {"kl_ref": -0.5, "entropy": 2.0, "collision_l2": 3.0},
        "coefficients": pytest.approx(np.array([0.5, 0.0])),
        "is_success": True,
    }


# --- rules; what they refuse is in test_arguments.py ----------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        {"step_size": 0.2},
        {"episode_length": 1},
        {"step_size": 0.0},
        {"step_size": 0.02, "max_coefficient": 0.1},
    ],
    ids=str,
)
def test_coefficients_out_of_reach_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^episode_length \* step_size must be at least .* got"):
        EpisodeConfig(**rules)


@pytest.mark.parametrize(
    ("injury", "kept", "injures"),
    [
        (0, 0.0, False),
        (1, 1.0, True),
        (np.array(0.5), 0.5, True),
        (torch.tensor([0.5, -0.25]), (0.5, -0.25), True),
        ([0, -1, 0.5], (0.0, -1.0, 0.5), True),
        ([0.0, 0.0], (0.0, 0.0), False),
    ],
)
def test_an_injury_is_a_half_width_or_is_given(injury: Any, kept: Any, injures: bool) -> None:
    config = EpisodeConfig(injury=injury)
    assert config.injury == kept
    assert type(config.injury) is type(kept)
    assert config.injures is injures
    assert hash(config) == hash(EpisodeConfig(injury=kept))


def test_texts_may_fill_the_context_but_not_exceed_it() -> None:
    config = EpisodeConfig(
        episode_length=1, step_size=1, n_prompts=2, prompt_length=2, n_new=4, flatline_penalty=0
    )
    config.check_context(6)
    with pytest.raises(ValueError, match=r"prompt_length \+ n_new .* context of 5, got 2 \+ 4"):
        config.check_context(5)
