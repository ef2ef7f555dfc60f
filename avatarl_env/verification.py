"""Verification: replay an episode, and compute its return a second, slower way."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from avatarl_env.episode import Episode
from avatarl_env.errors import as_numbers, check_integer, check_number, shown
from avatarl_env.lm.generation import Generation, generate
from avatarl_env.lm.head_reader import HeadReader, eval_mode
from avatarl_env.observation import Vitals
from avatarl_env.patient import Evaluation, Patient, Prompts
from avatarl_env.scoring import measure_many
from avatarl_env.scoring.generations import as_generations
from avatarl_env.surgery import SurgicalTheater
from avatarl_env.task import SurgeryTask

TOLERANCE = 1e-3
"""Largest difference of returns, in the score's unit: above float32's rounding errors, below any
improvement of interest."""
_CELLS_AT_ONCE = 2**25
"""Most logits computed together without a cache (128 MiB); at least those of one row."""
_NO_VITALS = Vitals(*np.zeros((3, 0), dtype=np.float32))


class Verification(NamedTuple):
    """Result of replaying an episode; truthy if the returns match."""

    total: float
    """Return of the replayed episode."""
    recomputed: float
    """The return computed without hooks, overlay or cache: the weights are edited in place, and the
    whole window is read again for every token. (Half precision uses a cache, without which the
    texts would differ.)"""
    agrees: bool
    """Whether both agree with each other and with the claim, if there is one."""
    reason: str
    """How they differ, or ""."""

    def __bool__(self) -> bool:
        """Return whether the returns match."""
        return self.agrees


def verify(
    task: SurgeryTask,
    actions: ArrayLike,
    seed: int,
    total: float | None = None,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Replay the episode of a seed and its actions, and check its return.

    On another processor or in a larger batch, numbers differ by rounding, and a draw close to the
    boundary between two tokens can then change a text. So a claim that misses the tolerance by
    little may still be honest.

    Args:
        task: its model must be the one of the claim; it is not changed.
        actions: (n, A), all actions of one operation.
        seed: the one given to `reset`.
        total: the claimed return; None if there is no claim.
        tolerance: largest difference of returns, >= 0.

    Raises:
        ValueError: if the actions are not those of one whole operation, or the seed, the claim or
            the tolerance is invalid.
    """
    tolerance = check_number("tolerance", tolerance, 0)
    if total is not None and math.isnan(total):
        raise ValueError(f"total must be a number, got {total}")
    moves = _as_moves(actions, task)
    with task.patient.uncounted():
        episode = _replay(task, moves, check_integer("seed", seed, most=math.inf))
        recomputed = _recompute(task, episode)
    reason = _disagreement(episode.total_reward, recomputed, total, tolerance)
    return Verification(episode.total_reward, recomputed, not reason, reason)


def _as_moves(given: ArrayLike, task: SurgeryTask) -> NDArray[np.float64]:
    """Return the actions as (n, A) numbers, checked."""
    most, width = task.config.episode_length, len(task.operator.labels)
    rule = f"actions must be 1 to {most} of one operation, of {width} numbers each"
    try:
        moves = given
        if isinstance(given, list | tuple):  # each as `step` takes it, such as a tensor
            moves = [as_numbers("actions", move) for move in given]
        moves = as_numbers("actions", moves)
    except ValueError as error:
        raise ValueError(f"{rule}, got {shown(given)}") from error
    if moves.ndim != 2 or moves.shape[1] != width or not 1 <= len(moves) <= most:
        raise ValueError(f"{rule}, got shape {moves.shape}")
    return moves


def _replay(task: SurgeryTask, moves: NDArray[np.float64], seed: int) -> Episode:
    """Repeat an environment's `reset(seed=seed)` and one `step` per action."""
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
            f"earlier, got {len(moves)}"
        )
    return episode


def _recompute(task: SurgeryTask, done: Episode) -> float:
    """Return the reward of the whole operation in one step, evaluated the slow way."""
    prompts = done.prompts
    baseline = _evaluate_slowly(task, done.injury, prompts)
    healthy = baseline
    if task.config.injures:
        healthy = _evaluate_slowly(task, np.zeros_like(done.injury), prompts)
    again = Episode.begin(task.config, prompts, done.injury, baseline, healthy.terms, task.score)
    final = _evaluate_slowly(task, done.injury + done.coefficients, prompts)
    return again.conclude(done.coefficients, final, task.score).reward


@torch.no_grad()
def _evaluate_slowly(
    task: SurgeryTask, coefficients: NDArray[np.float64], prompts: Prompts
) -> Evaluation:
    """Evaluate an operation with as little machinery as possible."""
    patient, operator = task.patient, task.operator
    device = next(patient.model.parameters()).device
    tokens = torch.from_numpy(prompts.tokens).to(device)
    uniforms = torch.from_numpy(prompts.uniforms).to(device)
    with eval_mode(patient.model), SurgicalTheater(patient.model, [operator]) as theater:
        operator.apply(theater, coefficients)
        written = _write(patient, tokens, uniforms)
        # One text at a time: with a large vocabulary the logits of all might not fit.
        losses = torch.stack([_losses(patient.model(row[None])[0], row) for row in tokens])
    generations = as_generations(patient.tokenizer, written, losses)
    ((_, terms),) = measure_many(generations, patient.reference, terms=task.terms)
    return Evaluation(generations, _NO_VITALS, terms)


def _write(patient: Patient, tokens: Tensor, uniforms: Tensor) -> Generation:
    """Continue prompts (M, P) without a cache, as many rows at a time as fit into memory.

    In half precision texts depend on the cache and on the rows of the batch: there all rows are
    written together, with a cache.
    """
    model, whole, half = patient.model, patient.keeps_distributions, _is_half(patient.model)
    n_texts, n_tokens = len(tokens), tokens.size(1) + uniforms.size(1)
    at_once = n_texts if half else max(1, _CELLS_AT_ONCE // (n_tokens * model.vocab_size))
    parts = []
    for start in range(0, n_texts, at_once):
        rows = slice(start, start + at_once)
        with HeadReader(model, tokens[rows, 1:]) if half else nullcontext():
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


def _is_half(model: nn.Module) -> bool:
    """Return whether any of the weights are in half precision."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of every token (P,) but the first, (P - 1,), nats."""
    return cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")


def _disagreement(total: float, recomputed: float, claim: float | None, tolerance: float) -> str:
    """Return how the returns differ, or ""."""
    if not math.isclose(total, recomputed, rel_tol=0, abs_tol=tolerance):
        return (
            f"the operation returns {total:.6f}, but {recomputed:.6f} when it is computed a second "
            f"way, more than {tolerance:g} apart"
        )
    if claim is not None and not math.isclose(total, claim, rel_tol=0, abs_tol=tolerance):
        return (
            f"the operation returns {total:.6f}, more than {tolerance:g} from the claimed "
            f"{claim:.6f}"
        )
    return ""
