"""Tests of avatarl_env/validation.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import avatarl_env.patient
from avatarl_env import verification as validation
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm import head_reader as reading
from avatarl_env.patient import Patient
from avatarl_env.scoring import Generations
from avatarl_env.surgery import OPERATORS
from avatarl_env.verification import TOLERANCE, verify
from tests.fakes import fingerprint, tiny_gpt
from tests.patients import (
    SIZES,
    InPlaceGain,
    actions,
    global_random_states,
    store_tiny_patient,
    tiny_corpus,
    tiny_env,
    tiny_vector_env,
)


def record(env: AttentionSurgeryEnv, moves: np.ndarray, seed: int = 5) -> float:
    """Perform an operation in the usual way; return its return."""
    env.reset(seed=seed)
    total = 0.0
    for move in moves:
        _, reward, terminated, _, _ = env.step(move)
        total += reward
    assert terminated
    return total


@pytest.mark.parametrize("operator", [*OPERATORS, "in_place"])
@pytest.mark.parametrize("injury", [0.0, 0.4])
def test_a_true_record_is_confirmed(
    operator: str, injury: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "in_place", InPlaceGain)
    rules: dict[str, Any] = {"operator": operator, "injury": injury, "n_prompts": 4}
    env, other = tiny_env(**rules), tiny_env(**rules)
    moves = 0.3 * actions(4, *env.action_space.shape)
    total = record(env, moves)
    found = other.verify(moves, 5, total)
    assert found.total == total != 0
    assert found.recomputed == pytest.approx(total, abs=1e-4)
    assert (found.agrees, found.reason) == (True, "")
    assert found
    assert other.verify(moves.tolist(), np.int64(5)) == found  # the claim is not needed
    json.dumps(found._asdict())


def test_the_return_of_a_given_injury_is_confirmed() -> None:
    env = tiny_env(injury=[0.5, -0.5, 0.25, 0.0], episode_length=1, step_size=1.0)
    healing = np.array([[-0.5, 0.5, -0.25, 0.0]])
    found = env.verify(healing, 0, record(env, healing, seed=0))
    assert found.agrees
    assert found.total > 0.01


@pytest.mark.parametrize(
    "form",
    [
        lambda moves: torch.from_numpy(moves).requires_grad_(),
        lambda moves: torch.from_numpy(moves).bfloat16(),
        lambda moves: [torch.from_numpy(move).bfloat16().requires_grad_() for move in moves],
        lambda moves: tuple(move.tolist() for move in moves),
        lambda moves: [*moves],
    ],
    ids=["requires grad", "bfloat16", "list of tensors", "tuple of lists", "list of arrays"],
)
def test_actions_are_taken_in_every_form_that_step_takes(form: Callable[[Any], Any]) -> None:
    env = tiny_env()
    given = form(np.array(actions(4) > 0, dtype=np.float64) / 4)  # exact in half precision
    found = env.verify(given, 5, record(env, given))
    assert found.agrees, found.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_record_in_half_precision_is_confirmed(dtype: str, tmp_path: Path) -> None:
    env = AttentionSurgeryEnv(store_tiny_patient(tmp_path), dtype=dtype, **SIZES)
    moves = 0.3 * actions(4)
    assert env.verify(moves, 5, record(env, moves)).agrees


class Ordinals:
    """A tokenizer with more tokens than whole distributions are kept of."""

    vocab_size = 300

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(character) for character in text])

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(number) for number in ids)


def test_a_record_over_a_large_vocabulary_is_confirmed() -> None:
    model = tiny_gpt(vocab_size=300, context=64, n_heads=2).eval()
    keywords = {"score": {"kl_ref": 1.0, "heldout_loss": 0.5, "entropy": 0.1}, **SIZES}
    env = AttentionSurgeryEnv.from_model(model, Ordinals(), tiny_corpus(), **keywords)
    moves = 0.1 * actions(4)
    found = env.verify(moves, 5, record(env, moves))
    assert found.agrees, found.reason
    assert found.recomputed == pytest.approx(found.total, abs=1e-4)


def test_the_logits_of_a_large_vocabulary_are_made_a_few_texts_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve tokens of 300 logits each: three texts are 10,800."""
    model = tiny_gpt(vocab_size=300, context=64, n_heads=2).eval()
    env = AttentionSurgeryEnv.from_model(model, Ordinals(), tiny_corpus(), **SIZES)
    moves = 0.1 * actions(4)
    expected = env.verify(moves, 5)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, made: sizes.append(made.numel()))
    monkeypatch.setattr(validation, "_CELLS_AT_ONCE", 10_800)
    monkeypatch.setattr(reading, "_CELLS_AT_ONCE", 10_800)  # of the first way
    found = env.verify(moves, 5)
    assert max(sizes) <= 10_800
    assert found.recomputed == pytest.approx(expected.recomputed, abs=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_one_weight_in_half_precision_is_enough_to_read_with_a_cache(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with all rows together, of whose prompts the head makes the last logits alone."""
    model = tiny_gpt(vocab_size=300, context=64, n_heads=2).eval()
    if half:
        layer = model.blocks[0].mlp.c_fc.bfloat16()
        layer.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
        layer.register_forward_hook(lambda module, args, made: made.float())
    patient = Patient(model, Ordinals(), tiny_corpus())
    env = AttentionSurgeryEnv(patient, **{**SIZES, "episode_length": 2})
    seen: list[tuple[bool, int]] = []
    generate = validation.generate

    def noted(model: Any, tokens: Any, *arguments: Any, use_cache: bool, **keywords: Any) -> Any:
        seen.append((use_cache, len(tokens)))
        return generate(model, tokens, *arguments, use_cache=use_cache, **keywords)

    monkeypatch.setattr(validation, "generate", noted)
    monkeypatch.setattr(validation, "_CELLS_AT_ONCE", 16 * 12 * 300)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, made: sizes.append(made.size(1)))
    monkeypatch.setattr(reading, "_CELLS_AT_ONCE", 1)
    assert env.verify(0.3 * actions(2), 5)
    assert seen == ([(True, 32)] * 2 if half else [(False, 16)] * 4)
    assert (max(sizes) < 9) is half  # one text's prompt is read whole, to compute its loss


def test_a_flatline_is_confirmed() -> None:
    """Also where it ends the operation early."""
    env = tiny_env(operator_options={"scale": 300.0}, flatline_penalty=0.5)
    moves = np.array([[0, 0, 0, 0], [0, 0, 1, 1]], dtype=np.float32)
    total = record(env, moves)
    assert total == -0.5
    assert env.verify(moves, 5, total) == (-0.5, -0.5, True, "")
    with pytest.raises(ValueError, match=r"must end with the operation, after 2 \(flatline: no"):
        env.verify([*moves, [0, 0, 0, 0]], 5)


@pytest.mark.parametrize("off", [2 * TOLERANCE, -0.5, float("inf")])
def test_a_false_claim_is_told_in_words(off: float) -> None:
    env = tiny_env()
    moves = 0.3 * actions(4)
    total = record(env, moves)
    found = env.verify(moves, 5, total + off)
    assert found.total == total
    assert not found
    assert not found.agrees
    expected = f"the operation returns {total:.6f}, more than 0.001 from the {total + off:.6f} that"
    assert found.reason.startswith(expected)
    other_seed = env.verify(moves, 6, total)
    assert not other_seed.agrees


def test_what_is_off_by_less_than_the_tolerance_agrees() -> None:
    env = tiny_env()
    moves = 0.3 * actions(4)
    total = record(env, moves)
    assert env.verify(moves, 5, total + 0.5 * TOLERANCE).agrees
    assert env.verify(moves, 5, total + 0.4, tolerance=0.5).agrees
    assert not env.verify(moves, 5, total + 0.5 * TOLERANCE, tolerance=1e-4).agrees


def test_an_evaluation_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second way shares no cache and no hook with the first."""
    env = tiny_env()
    measure = avatarl_env.patient.measure_many

    def flattering(*arguments: Any) -> list[tuple[Generations, dict[str, float]]]:
        return [
            (generations, terms | {"kl_ref": 0.9 * terms["kl_ref"]})
            for generations, terms in measure(*arguments)
        ]

    monkeypatch.setattr(avatarl_env.patient, "measure_many", flattering)
    found = env.verify(0.5 * actions(4), 5)
    assert found.total == pytest.approx(0.9 * found.recomputed, abs=1e-4)
    assert not found.agrees
    assert "when that is computed in another way" in found.reason


def test_nothing_of_the_environment_is_touched() -> None:
    env, twin = tiny_env(injury=0.5), tiny_env(injury=0.5)
    for each in (env, twin):
        each.reset(seed=0)
        each.step(0.3 * actions(1)[0])
    states, before = global_random_states(), fingerprint(env.patient.model)
    spent = env.patient.forward_tokens
    env.patient.model.train()
    env.verify(0.3 * actions(4), 5)
    assert global_random_states() == states
    assert fingerprint(env.patient.model) == before
    assert env.patient.forward_tokens == spent
    assert env.patient.model.training
    for move in 0.3 * actions(3, seed=1):
        assert env.step(move)[1] == twin.step(move)[1]
    assert env.reset()[0].tolist() == twin.reset()[0].tolist()


def test_an_environment_that_was_never_reset_can_judge() -> None:
    env = tiny_env()
    assert env.verify(0.3 * actions(4), 5) == tiny_env().verify(0.3 * actions(4), 5)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(actions(1)[0])


def test_a_row_among_others_is_confirmed_too() -> None:
    env = tiny_vector_env(3, episode_length=2)
    env.reset(seed=10)
    moves = 0.3 * actions(6).reshape(2, 3, 4)
    totals = sum(env.step(move)[1] for move in moves)
    for row in range(3):
        found = verify(env.task, moves[:, row], 10 + row, totals[row])
        assert found.agrees, found.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 4)), 5), "actions must be all 4 of the operation, .*, got 3"),
        ((np.zeros((5, 4)), 5), r"actions must be the at most 4 of one operation, .* \(5, 4\)"),
        ((np.zeros((0, 4)), 5), r"of 4 numbers each, got shape \(0, 4\)"),
        ((np.zeros((4, 3)), 5), r"of 4 numbers each, got shape \(4, 3\)"),
        ((np.zeros(4), 5), r"got shape \(4,\)"),
        ((np.full((4, 4), np.nan), 5), r"action must be \(4,\) finite numbers"),
        (([[0.0], [0.0, 1.0]], 5), r"actions must be .* of 4 numbers each, got \[\[0.0\], "),
        (("abc", 5), "actions must be .* of 4 numbers each, got 'abc'"),
        ((["a", "b"], 5), r"actions must be .* of 4 numbers each, got \['a', 'b'\]"),
        ((np.zeros((4, 4)), None), r"seed must be the integer .* reset\(\) was given, got None"),
        ((np.zeros((4, 4)), -1), r"seed must be the integer from 0 on .* given, got -1"),
        ((np.zeros((4, 4)), 5, float("nan")), "total must be a number, got nan"),
        ((np.zeros((4, 4)), 5, 0.0, -1.0), "tolerance must not be negative, got -1.0"),
    ],
)
def test_what_is_no_operation_is_refused_in_one_line(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny_env().verify(*arguments)
    assert "\n" not in str(caught.value)
