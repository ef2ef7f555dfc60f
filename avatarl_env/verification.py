"""Is a record true: an operation performed again, and its return computed in a second way."""

from __future__ import annotations

import math
import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from avatarl_env.episode import Episode
from avatarl_env.errors import as_numbers, shown
from avatarl_env.lm.generation import Generation, generate
from avatarl_env.lm.head_reader import HeadReader, eval_mode
from avatarl_env.material import as_generations
from avatarl_env.observation import Vitals
from avatarl_env.patient import Evaluation, Patient, Prompts
from avatarl_env.scoring import measure_terms
from avatarl_env.surgery import SurgicalTheater
from avatarl_env.task import SurgeryTask

TOLERANCE = 1e-3
"""Of returns, in the score's unit: above float32's rounding, and below what is worth a claim."""
_CELLS_AT_ONCE = 2**25
"""Logits made together (128 MiB) where whole windows are read: one row's of them at least."""
_NO_VITALS = Vitals(*np.zeros((3, 0), dtype=np.float32))


class Verification(NamedTuple):
    """What became of a record; true if it agrees."""

    total: float
    """Return of the operation performed again."""
    recomputed: float
    """The same without a hook or an overlay, the weights edited in place, and without a cache:
    every window read anew for every token. (In half precision with one: other texts come out
    without it.)"""
    agrees: bool
    """Whether the two agree, and with the claim, if there was one."""
    reason: str
    """Why not, or nothing."""

    def __bool__(self) -> bool:
        """Whether the record is true."""
        return self.agrees


def verify(
    task: SurgeryTask,
    actions: ArrayLike,
    seed: int,
    total: float | None = None,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Perform the operation of a seed and some actions again; see what it returns.

    On another processor, or as a row beside others, numbers differ by rounding, and a die that
    falls on the boundary between two tokens can then change a text: a claim that is off by little
    more than the tolerance deserves a second look.

    Args:
        task: with the patient as it was when the claim was made; its model is left as it is.
        actions: (n, A) of one whole operation.
        seed: what `reset` was given.
        total: the return that is claimed; None to learn it.
        tolerance: most that returns may differ, >= 0.

    Raises:
        ValueError: if the actions are not those of one whole operation, the seed is none that
            `reset` takes, the claim is not a number, or the tolerance is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if total is not None and math.isnan(total):
        raise ValueError(f"total must be a number, got {total}")
    moves = _as_moves(actions, task)
    with task.patient.uncounted():
        episode = _perform(task, moves, _as_seed(seed))
        recomputed = _recompute(task, episode)
    reason = _disagreement(episode.total_reward, recomputed, total, tolerance)
    return Verification(episode.total_reward, recomputed, not reason, reason)


def _as_seed(seed: int) -> int:
    rule = f"seed must be the integer from 0 on that reset() was given, got {seed!r}"
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise ValueError(rule) from error
    if number < 0:
        raise ValueError(rule)
    return number


def _as_moves(given: ArrayLike, task: SurgeryTask) -> NDArray[np.float64]:
    most, width = task.config.episode_length, len(task.operator.labels)
    rule = f"actions must be the at most {most} of one operation, of {width} numbers each"
    try:
        moves = given
        if isinstance(given, list | tuple):  # each as `step` takes it, a tensor for example
            moves = [as_numbers("actions", move) for move in given]
        moves = as_numbers("actions", moves)
    except ValueError as error:
        raise ValueError(f"{rule}, got {shown(given)}") from error
    if moves.ndim != 2 or moves.shape[1] != width or not 1 <= len(moves) <= most:
        raise ValueError(f"{rule}, got shape {moves.shape}")
    return moves


def _perform(task: SurgeryTask, moves: NDArray[np.float64], seed: int) -> Episode:
    """Do what an environment does on `reset(seed=seed)` and one `step` after the other."""
    rng, _ = seeding.np_random(seed)
    (episode,) = task.begin([task.draw(rng)])
    for n_done, move in enumerate(moves):
        if episode.is_over:
            raise ValueError(
                f"actions must end with the operation, after {n_done} (flatline: "
                f"{episode.flatline}), got {len(moves)}"
            )
        task.step([episode], move[None])
    if not episode.is_over:
        raise ValueError(
            f"actions must be all {task.config.episode_length} of the operation, which did not end "
            f"before, got {len(moves)}"
        )
    return episode


def _recompute(task: SurgeryTask, done: Episode) -> float:
    """Go from the baseline to where the operation ended at once; return what that pays."""
    prompts = done.prompts
    baseline = _read_slowly(task, done.injury, prompts)
    healthy = baseline
    if task.config.injures:
        healthy = _read_slowly(task, np.zeros_like(done.injury), prompts)
    again = Episode.begin(task.config, prompts, done.injury, baseline, healthy.terms, task.score)
    final = _read_slowly(task, done.injury + done.coefficients, prompts)
    return again.conclude(done.coefficients, final, task.score).reward


@torch.no_grad()
def _read_slowly(
    task: SurgeryTask, coefficients: NDArray[np.float64], prompts: Prompts
) -> Evaluation:
    """Evaluate an operation with as little machinery as there can be."""
    patient, knife = task.patient, task.operator
    device = next(patient.model.parameters()).device
    tokens = torch.from_numpy(prompts.tokens).to(device)
    uniforms = torch.from_numpy(prompts.uniforms).to(device)
    with eval_mode(patient.model), SurgicalTheater(patient.model, [knife]) as theater:
        knife.apply(theater, coefficients)
        written = _write(patient, tokens, uniforms)
        # One text at a time: the logits of all would be large where the vocabulary is.
        losses = torch.cat([_losses(patient.model(row[None])[0], row)[None] for row in tokens])
    generations = as_generations(patient.tokenizer, written, losses, 1)
    return Evaluation(
        generations, _NO_VITALS, measure_terms(generations, patient.reference, task.terms)
    )


def _write(patient: Patient, tokens: Tensor, uniforms: Tensor) -> Generation:
    """Continue prompts (M, P) without a cache, as many rows at a time as fit into memory.

    In half precision other texts come out without a cache, and by rows: all together then, with
    one, and at first the head makes the logits of the last position alone.
    """
    model, whole, half = patient.model, patient.keeps_distributions, _has_half(patient.model)
    n_texts, n_tokens = len(tokens), tokens.size(1) + uniforms.size(1)
    at_once = n_texts if half else max(1, _CELLS_AT_ONCE // (n_tokens * model.vocab_size))
    parts = []
    for start in range(0, n_texts, at_once):
        rows = slice(start, start + at_once)
        reading: AbstractContextManager[object] = nullcontext()
        if half:
            reading = HeadReader(model, tokens[rows, 1:])
        with reading:
            written = generate(
                model,
                tokens[rows],
                uniforms[rows],
                return_distributions=whole,
                return_entropies=not whole,
                use_cache=half,
            )
        parts.append(written)
    joined: list[Any] = [
        None if rows[0] is None else torch.cat(rows) for rows in zip(*parts, strict=True)
    ]
    return Generation(*joined)


def _has_half(model: nn.Module) -> bool:
    """Whether any of its weights are in half precision."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of every token (P,) but the first, (P - 1,), nats."""
    return cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")


def _disagreement(total: float, recomputed: float, claim: float | None, tolerance: float) -> str:
    if not math.isclose(total, recomputed, rel_tol=0, abs_tol=tolerance):
        return (
            f"the operation returns {total:.6f}, but {recomputed:.6f} when that is computed in "
            f"another way, more than {tolerance:g} apart"
        )
    if claim is not None and not math.isclose(total, claim, rel_tol=0, abs_tol=tolerance):
        return (
            f"the operation returns {total:.6f}, more than {tolerance:g} from the {claim:.6f} that "
            "is claimed"
        )
    return ""
