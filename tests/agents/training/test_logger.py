from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from agents.evaluation.language_model import evaluate_text
from agents.evaluation.paired import PairedResult
from agents.evaluation.statistics import Interval
from agents.grpo.learner import GRPOStats
from agents.surgeons.registry import EpisodeRecord
from agents.tracking.writer import Clock
from agents.training import logger as logger_module
from agents.training.curriculum import Commit, Phase
from agents.training.logger import SAMPLE_EVERY, WRITE_EVERY, RunLogger
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import fingerprint
from tests.patients import global_random_states
from tests.training_runs import (
    ScriptedSurgeon,
    episode_record,
    make_learner,
    small_env,
    taught_patient,
)

STATS = GRPOStats(
    loss=0.5, reward=0.25, accuracy=0.375, entropy=2.0, grad_norm=1.5, learning_rate=1e-3
)
GOOD = Interval(mean=0.1, low=0.01, high=0.2, lower_bound=0.02, n=9)
BOOTSTRAP = Phase("bootstrap", 12, 1, 0, commits=False)
JOINT = Phase("joint", 2, 3, 2, commits=True)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger_module, "SAMPLE_CHARACTERS", 70)  # longer than the context


class Writer:
    """Keeps the rows in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Clock, dict[str, Any]]] = []

    def write(self, kind: str, clock: Clock, metrics: Mapping[str, object]) -> None:
        self.rows.append((kind, clock, dict(metrics)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row_kind, _, row in self.rows if row_kind == kind]


class Desk:
    """A logger with everything that it needs."""

    def __init__(self, env: AttentionSurgeryVectorEnv | None = None, **keywords: Any) -> None:
        self.env = env or small_env()
        self.writer = Writer()
        patient = self.env.patient
        self.learner = make_learner(patient.model, patient.splits["train"])
        options = {"evaluate_every": 100, "quiet": True, **keywords}
        rng = np.random.default_rng(0)
        self.logger = RunLogger(
            self.writer,  # type: ignore[arg-type]
            self.learner,
            self.env,
            rng=rng,
            **options,
        )

    def update(self, n: int, stats: GRPOStats = STATS) -> None:
        for _ in range(n):
            self.learner.n_done += 1
            self.logger.updated(stats)


def record(total: float = 0.125, flatline: str | None = None) -> EpisodeRecord:
    return EpisodeRecord(
        total,
        2,
        0.5,
        np.array([0.1, -0.2, 0.3, 1.0]),
        flatline,
        {"kl_ref": -2.0},
        {"kl_ref": -3.0},
        0.75,
    )


def test_the_first_update_and_every_fifth_are_written() -> None:
    desk = Desk()
    desk.logger.begin(BOOTSTRAP)
    desk.update(12)
    assert WRITE_EVERY == 5
    updates = [clock.update for kind, clock, _ in desk.writer.rows if kind == "grpo"]
    assert updates == [1, 5, 10]
    assert {clock.phase for _, clock, _ in desk.writer.rows} == {"bootstrap"}
    for row in desk.writer.of("grpo"):
        speed = row.pop("time/tokens_per_second")
        assert speed > 0
        assert row == {
            "grpo/loss": 0.5,
            "grpo/reward": 0.25,
            "grpo/accuracy": 0.375,
            "grpo/entropy": 2.0,
            "grpo/grad_norm": 1.5,
            "grpo/learning_rate": 1e-3,
            "grpo/kl": 0.0,
            "grpo/kl_coefficient": 0.0,
            "grpo/behavior_kl": 0.0,
            "grpo/policy_loss": 0.0,
            "grpo/entropy_loss": 0.0,
            "grpo/advantage_mean": 0.0,
            "grpo/advantage_std": 0.0,
            "grpo/reward_min": 0.0,
            "grpo/reward_max": 0.0,
            "grpo/skipped": 0.0,
        }


def test_what_is_read_of_texts_has_names_of_its_own() -> None:
    desk = Desk()
    patient = desk.env.patient
    learner = make_learner(
        patient.model, patient.splits["train"], estimator="rloo", horizon=4, group_size=2
    )
    desk.logger._learner = learner
    desk.logger.begin(BOOTSTRAP)
    stats = learner.update()
    desk.logger.updated(stats)
    (row,) = desk.writer.of("grpo")
    assert row["grpo/text_reward"] == stats.reward
    assert row["grpo/matched"] == stats.accuracy
    assert not {"grpo/reward", "grpo/accuracy"} & row.keys()


def test_the_model_is_evaluated_every_so_many_updates_on_a_fixed_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logger_module, "PROGRESS_CHARACTERS", 99)
    desk = Desk(evaluate_every=4)
    desk.logger.begin(BOOTSTRAP)
    desk.update(9)
    clocks = [clock.update for kind, clock, _ in desk.writer.rows if kind == "evaluation"]
    assert clocks == [0, 4, 8]
    patient = desk.env.patient
    expected = evaluate_text(patient.model, patient.splits["validation"][:100])
    assert desk.writer.of("evaluation")[0] == {
        "validation/loss": expected.loss,
        "validation/bits_per_char": expected.bits_per_char,
        "validation/accuracy": expected.accuracy,
        "validation/entropy": expected.entropy,
        "validation/calibration_error": expected.calibration_error,
    }


def test_every_operation_is_a_row() -> None:
    desk = Desk()
    desk.logger.begin(JOINT)
    desk.logger.operated([record(), record(-1.0, "entropy")], ScriptedSurgeon(desk.env))
    first, second = desk.writer.of("operation")
    assert first.pop("surgeon/coefficients").tolist() == [0.1, -0.2, 0.3, 1.0]
    assert first == {
        "surgeon/return": 0.125,
        "surgeon/length": 2,
        "surgeon/mean_abs_action": 0.5,
        "surgeon/flatline": None,
        "surgeon/lost_score": 0.75,
        "score/kl_ref": -2.0,
        "baseline/kl_ref": -3.0,
    }
    assert (second["surgeon/return"], second["surgeon/flatline"]) == (-1.0, "entropy")
    clocks = [clock for kind, clock, _ in desk.writer.rows if kind == "operation"]
    assert [clock.operation for clock in clocks] == [1, 2]
    assert desk.logger.n_operations == 2
    assert desk.writer.of("surgeon") == []  # this surgeon has nothing to say


def test_what_the_surgeon_says_of_its_learning_is_a_row_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk()
    surgeon = ScriptedSurgeon(desk.env)
    monkeypatch.setattr(surgeon, "stats", lambda: {"surgeon/actor_loss": -0.5})
    desk.logger.begin(JOINT)
    desk.logger.operated([record()], surgeon)
    desk.logger.operated([record()], surgeon)
    assert desk.writer.of("surgeon") == [{"surgeon/actor_loss": -0.5}] * 2


def commit(kept: bool) -> Commit:
    return Commit(np.array([0.5, -0.25]), PairedResult(GOOD, GOOD), kept)


def test_commits_are_rows_and_are_summed_up() -> None:
    desk = Desk()
    desk.logger.begin(JOINT)
    for kept in (False, True, False):
        desk.update(2)
        desk.logger.judged(commit(kept))
    assert [row["commit/kept"] for row in desk.writer.of("commit")] == [False, True, False]
    assert desk.writer.of("commit")[1] == {
        "commit/kept": True,
        "commit/kl_ref_gain": GOOD._asdict(),
        "commit/heldout_loss_fall": GOOD._asdict(),
        "commit/coefficients": [0.5, -0.25],
    }
    summary = json.loads(json.dumps(desk.logger.commit_summary("if_better")))
    operations = summary.pop("operations")
    assert summary == {
        "policy": "if_better",
        "tried": 3,
        "kept": 1,
        "expected_false_at_most": pytest.approx(0.15),  # one in twenty of three
    }
    assert [(o["phase"], o["update"], o["kept"]) for o in operations] == [
        ("joint", 2, False),
        ("joint", 4, True),
        ("joint", 6, False),
    ]
    assert operations[1]["kl_ref_gain"]["lower_bound"] == 0.02


def test_who_samples_from_now_on_is_a_row() -> None:
    desk = Desk()
    desk.logger.begin(JOINT)
    coefficients = np.array([0.5, -0.25])
    desk.logger.behaved(episode_record(coefficients, 0.75))
    desk.logger.behaved(None)
    assert desk.writer.of("behavior") == [
        {
            "behavior/operated": True,
            "behavior/gain": 0.75,
            "behavior/coefficients": coefficients,
        },
        {
            "behavior/operated": False,
            "behavior/gain": None,
            "behavior/coefficients": None,
        },
    ]
    assert desk.logger.commit_summary("rollout")["tried"] == 0


def test_without_an_attempt_there_is_nothing_to_sum_up() -> None:
    assert Desk().logger.commit_summary("probe") == {
        "policy": "probe",
        "tried": 0,
        "kept": 0,
        "expected_false_at_most": 0.0,
        "operations": [],
    }


def test_a_phase_is_summed_up_by_its_first_and_last_numbers() -> None:
    desk = Desk()
    desk.logger.begin(BOOTSTRAP)
    for loss in (4.0, 3.0, 2.5, 2.2, 2.0):
        desk.update(1, STATS._replace(loss=loss))
    summary = desk.logger.end()
    assert (summary["name"], summary["steps"]) == ("bootstrap", 12)
    assert summary["seconds"] > 0
    assert (summary["first"]["grpo/loss"], summary["last"]["grpo/loss"]) == (4.0, 2.0)
    assert summary["last"]["validation/loss"] > 0  # a phase that trains ends with an evaluation

    desk.logger.begin(Phase("surgery", 1, 0, 2, commits=False))
    desk.logger.operated([record(0.25), record(0.75)], ScriptedSurgeon(desk.env))
    summary = desk.logger.end()
    assert (summary["first"]["surgeon/return"], summary["last"]["surgeon/return"]) == (0.25, 0.75)
    assert "grpo/loss" not in summary["first"]  # nothing of the phase before
    assert "validation/loss" not in summary["last"]  # the model is as it was


def test_samples_show_the_model_and_where_it_was_operated_the_last_operation() -> None:
    desk = Desk(small_env(taught_patient()))
    desk.logger.begin(BOOTSTRAP)
    desk.logger.end()
    desk.logger.begin(JOINT)
    desk.logger.operated([record(), record()], ScriptedSurgeon(desk.env))
    desk.logger.end()
    plain, operated = desk.writer.of("sample")[:2], desk.writer.of("sample")[-2:]
    assert [row["operated_text"] for row in plain] == [None, None]
    tokenizer = desk.env.patient.tokenizer
    text = tokenizer.decode(desk.env.patient.splits["surgeon"])
    for before, after in zip(plain, operated, strict=True):
        assert len(before["prompt"]) == 8
        assert before["prompt"] in text
        assert len(before["text"]) == 70
        # The same dice: an untouched model writes the same again, an operated one something else.
        assert (after["prompt"], after["text"]) == (before["prompt"], before["text"])
        assert len(after["operated_text"]) == 70
        assert after["operated_text"] != after["text"]


def test_a_phase_without_any_operation_yet_shows_none() -> None:
    desk = Desk()
    desk.logger.begin(JOINT)
    desk.logger.end()
    # at the very beginning and at the end, two prompts each
    assert [row["operated_text"] for row in desk.writer.of("sample")] == [None] * 4


def test_there_are_samples_every_fifth_evaluation() -> None:
    desk = Desk(evaluate_every=2)
    desk.logger.begin(BOOTSTRAP)
    desk.update(21)
    assert SAMPLE_EVERY == 5
    clocks = [clock.update for kind, clock, _ in desk.writer.rows if kind == "sample"]
    assert clocks == [0, 0, 10, 10, 20, 20]


def test_compute_is_what_learning_and_operating_took() -> None:
    desk = Desk(evaluate_every=2)
    desk.logger.begin(JOINT)
    for _ in range(3):
        desk.logger.updated(desk.learner.update())
    # A batch is 4 windows of 64, forward and backward: three times a forward.
    assert desk.logger.forward_tokens == 3 * 3 * 4 * 64
    desk.env.patient.forward_tokens += 1000
    assert desk.logger.forward_tokens == 3 * 3 * 4 * 64 + 1000
    desk.logger.operated([record()], ScriptedSurgeon(desk.env))
    desk.logger.end()  # evaluates and samples, for the reader
    assert desk.logger.forward_tokens == 3 * 3 * 4 * 64 + 1000
    assert desk.writer.rows[-1][1].forward_tokens == 3 * 3 * 4 * 64 + 1000


def test_writing_leaves_the_model_and_everybodys_dice_alone() -> None:
    desk = Desk(evaluate_every=2)
    desk.env.patient.model.train()
    before, randomness = fingerprint(desk.env.patient.model), global_random_states()
    desk.logger.begin(JOINT)
    desk.update(4)
    desk.logger.operated([record()], ScriptedSurgeon(desk.env))
    desk.logger.judged(commit(kept=False))
    desk.logger.end()
    assert fingerprint(desk.env.patient.model) == before
    assert global_random_states() == randomness
    assert desk.env.patient.model.training


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time stands at `clock[0]` seconds."""
    now = [100.0]
    monkeypatch.setattr(logger_module.time, "perf_counter", lambda: now[0])
    return now


def test_speed_is_that_of_the_updates_alone(clock: list[float]) -> None:
    desk = Desk()
    desk.logger.begin(JOINT)
    for _ in range(5):
        clock[0] += 2.0
        desk.update(1)
        clock[0] += 50.0  # somebody operates
        desk.logger.operated([record()], ScriptedSurgeon(desk.env))
        clock[0] += 10.0  # and chooses
        desk.logger.behaved(None)
    # 4 windows of 64 tokens in two seconds
    assert [row["time/tokens_per_second"] for row in desk.writer.of("grpo")] == [128.0, 128.0]
    assert desk.logger.seconds == 310.0
    assert desk.writer.rows[-1][1].seconds == 310.0
    assert desk.logger.end()["seconds"] == 310.0


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(quiet=True)
    desk.logger.say("hello")
    desk.logger.begin(BOOTSTRAP)
    desk.update(5)
    desk.logger.end()
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_phase_loss_reward_accuracy_and_commits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk(quiet=False, evaluate_every=2)
    desk.logger.say("hello")
    desk.logger.begin(JOINT)
    desk.update(6)
    desk.logger.operated([record()] * 4, ScriptedSurgeon(desk.env))
    # A patient died early, and another operation fitted in.
    records = [record(0.5), record(0.25), record(), record(), record(-1.0, "entropy")]
    desk.logger.operated(records, ScriptedSurgeon(desk.env))
    desk.logger.judged(commit(kept=True))
    desk.logger.end()
    out, err = capsys.readouterr()
    assert out == "hello\n"
    last = err.rsplit("\r", 1)[-1]
    assert "joint: 100%" in last
    assert "14/14" in last  # two steps of three updates, and two operations on each of two rows
    assert "loss=0.5000, reward=0.250" in last
    assert "operation=+0.0000" in last  # the last round's mean
    assert "commits=1/1" in last
    assert "accuracy=0." in last


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many characters are evaluated each time."""
    lengths: list[int] = []
    evaluate = logger_module.evaluate_text

    def spy(model: Any, tokens: Any) -> Any:
        lengths.append(len(tokens))
        return evaluate(model, tokens)

    monkeypatch.setattr(logger_module, "evaluate_text", spy)
    return lengths


def test_a_short_validation_text_is_evaluated_whole(rates: list[int]) -> None:
    desk = Desk(evaluate_every=1)
    desk.logger.begin(BOOTSTRAP)
    desk.update(1)
    assert rates == [len(desk.env.patient.splits["validation"])] * 2
