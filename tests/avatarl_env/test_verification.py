"""Tests of avatarl_env/verification.py; correct records are tested in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import avatarl_env.patient
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.patient import Patient
from avatarl_env.verification import TOLERANCE
from tests.fakes import fingerprint, tiny_gpt
from tests.patients import SIZES, actions, plain, tiny_corpus, tiny_env


def record(env: AttentionSurgeryEnv, moves: np.ndarray, seed: int = 5) -> float:
    """Perform an operation; return the sum of its rewards."""
    env.reset(seed=seed)
    return sum(env.step(move)[1] for move in moves)


@pytest.mark.parametrize(
    "form",
    [
        lambda moves: torch.from_numpy(moves).requires_grad_(),
        lambda moves: torch.from_numpy(moves).bfloat16(),
        lambda moves: [torch.from_numpy(move).bfloat16().requires_grad_() for move in moves],
        lambda moves: tuple(move.tolist() for move in moves),
    ],
    ids=["requires grad", "bfloat16", "list of tensors", "tuple of lists"],
)
def test_actions_may_have_every_form_that_step_accepts(form: Callable[[Any], Any]) -> None:
    env = tiny_env()
    given = form(np.array(actions(4) > 0, dtype=np.float64) / 4)  # exact in half precision
    found = env.verify(given, 5, record(env, given))
    assert found.agrees, found.reason
    assert env.verify(given, np.int64(5)) == found  # the claim is not needed


class Ordinals:
    """A tokenizer whose vocabulary is too large to keep whole distributions."""

    vocab_size = 300

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(character) for character in text])

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(number) for number in ids)


@pytest.mark.parametrize("half", [False, True])
def test_a_record_over_a_large_vocabulary_is_confirmed(half: bool) -> None:
    """Also with one layer in half precision, where texts depend on the cache."""
    model = tiny_gpt(vocab_size=300, context=64, n_heads=2).eval()
    if half:
        layer = model.blocks[0].mlp.c_fc.bfloat16()
        layer.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
        layer.register_forward_hook(lambda module, args, made: made.float())
    score = {"kl_ref": 1.0, "heldout_loss": 0.5, "entropy": 0.1}
    patient = Patient(model, Ordinals(), tiny_corpus())
    env = AttentionSurgeryEnv(patient, score=score, **SIZES)
    moves = 0.1 * actions(4)
    lengths: list[int] = []
    total = record(env, moves)
    model.embed.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    found = env.verify(moves, 5, total)
    assert found.agrees, found.reason
    assert found.recomputed == pytest.approx(found.total, abs=1e-4)
    assert (11 in lengths) is not half  # whole windows are read again, but in half precision


def test_a_flatline_that_ends_an_operation_early_is_confirmed() -> None:
    env = tiny_env(operator="output_temperature", operator_options={"scale": 9.0})
    moves = np.array([[0.0], [1.0]], dtype=np.float32)
    total = record(env, moves)
    assert total <= -1
    found = env.verify(moves, 5, total)
    assert found.agrees, found.reason
    assert found.total == total
    with pytest.raises(ValueError, match=r"must end with the operation, after 2 \(flatline: "):
        env.verify([*moves, [0]], 5)


def test_a_false_total_is_reported_with_both_numbers() -> None:
    env = tiny_env()
    moves = 0.3 * actions(4)
    total = record(env, moves)
    for off in (2 * TOLERANCE, -0.5, float("inf")):
        found = env.verify(moves, 5, total + off)
        assert found.total == total
        assert not found
        assert not found.agrees
        assert f"{total:.6f}" in found.reason
        assert f"{total + off:.6f}" in found.reason
    assert not env.verify(moves, 6, total).agrees
    assert env.verify(moves, 5, total + 0.5 * TOLERANCE).agrees
    assert env.verify(moves, 5, total + 0.4, tolerance=0.5).agrees
    assert not env.verify(moves, 5, total + 0.5 * TOLERANCE, tolerance=1e-4).agrees


def test_a_wrong_evaluation_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second computation shares no cache and no hook with the first."""
    env = tiny_env()
    measure = avatarl_env.patient.measure_many

    def flattering(*arguments: Any) -> list[tuple[Any, dict[str, float]]]:
        measured = measure(*arguments)
        return [(part, terms | {"kl_ref": 0.9 * terms["kl_ref"]}) for part, terms in measured]

    monkeypatch.setattr(avatarl_env.patient, "measure_many", flattering)
    found = env.verify(0.5 * actions(4), 5)
    assert found.total == pytest.approx(0.9 * found.recomputed, abs=1e-4)
    assert not found.agrees
    assert "computed a second way" in found.reason


def test_verification_does_not_change_the_environment() -> None:
    env, twin = tiny_env(injury=0.5), tiny_env(injury=0.5)
    assert env.verify(0.3 * actions(4), 5) == twin.verify(0.3 * actions(4), 5)  # before a reset
    for each in (env, twin):
        each.reset(seed=0)
        each.step(0.3 * actions(1)[0])
    before = fingerprint(env.patient.model)
    spent = env.patient.forward_tokens
    env.patient.model.train()
    env.verify(0.3 * actions(4), 5)
    assert fingerprint(env.patient.model) == before
    assert env.patient.forward_tokens == spent
    assert env.patient.model.training
    for move in 0.3 * actions(3, seed=1):
        assert plain(env.step(move)) == plain(twin.step(move))
    assert plain(env.reset()) == plain(twin.reset())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 4)), 5), "actions must be all 4 of the operation, .*, got 3"),
        ((np.zeros((5, 4)), 5), r"actions must be 1 to 4 .* \(5, 4\)"),
        ((np.zeros((0, 4)), 5), r"actions must .* got shape \(0, 4\)"),
        ((np.zeros((4, 3)), 5), r"actions must .* of 4 numbers each, got shape \(4, 3\)"),
        ((np.zeros(4), 5), r"actions must .* got shape \(4,\)"),
        ((np.full((4, 4), np.nan), 5), r"action must be \(4,\) finite numbers"),
        (([[0.0], [0.0, 1.0]], 5), r"actions must be .* got \[\[0.0\], "),
        (("abc", 5), "actions must be .* got 'abc'"),
        ((["a", "b"], 5), r"actions must be .* got \['a', 'b'\]"),
        ((np.zeros((4, 4)), None), "seed must be an integer .* got None"),
        ((np.zeros((4, 4)), -1), "seed must be an integer .* got -1"),
        ((np.zeros((4, 4)), 5, float("nan")), "total must be a number, got nan"),
        ((np.zeros((4, 4)), 5, 0.0, -1.0), "tolerance must be .* got -1.0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        tiny_env().verify(*arguments)
    assert "\n" not in str(caught.value)
