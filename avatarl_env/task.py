"""The surgeon's task on one patient, shared by the single and the vector environment.

Shapes: N operations side by side, A coefficients, O numbers in an observation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from avatarl_env.episode import Episode, EpisodeConfig, Outcome
from avatarl_env.errors import (
    as_numbers,
    check_choice,
    check_keywords,
    check_mapping,
    takes_any_keyword,
)
from avatarl_env.memory import check_memory
from avatarl_env.observation import Observation
from avatarl_env.patient import Evaluation, Patient, Prompts
from avatarl_env.rendering import render
from avatarl_env.scoring import TERMS, Score
from avatarl_env.surgery import OPERATORS, Operator, Targets, find_targets


class Draw(NamedTuple):
    """Everything random in an operation."""

    prompts: Prompts
    injury: NDArray[np.float64]
    """(A,)."""


class SurgeryTask:
    """The patient, operator, rules and score of an environment, and how operations run on them.

    A single operation is performed in place, on the shared model inside a theater; several are
    performed side by side in one forward.
    """

    def __init__(
        self,
        patient: Patient,
        config: EpisodeConfig,
        *,
        operator: str = "head_gain",
        operator_options: Mapping[str, Any] | None = None,
        layers: int | str | Iterable[int | str] | None = None,
        score: Mapping[str, float] | None = None,
    ) -> None:
        """Build the operator and check that everything fits together.

        Args:
            patient: the model, with its text.
            config: the rules.
            operator: name of the operator.
            operator_options: its keyword arguments.
            layers: attention layers to operate on, as for `find_targets`; default all.
            score: weights by term name.

        Raises:
            ValueError: if a name is unknown, the operation does not fit the model or the text, or
                a given injury does not have A numbers.
        """
        config.check_context(patient.model.context)
        n_available = len(patient.splits[config.split])
        if config.prompt_length > n_available:
            raise ValueError(
                f"prompt_length must be at most {n_available} ({config.split}), "
                f"got {config.prompt_length}"
            )
        self.patient = patient
        self.config = config
        self.score = Score(score)
        self.terms = dict(TERMS)
        """Terms to measure, a copy: later changes of `TERMS` do not alter the task."""
        targets = patient.targets if layers is None else find_targets(patient.model, layers)
        options = {} if operator_options is None else operator_options
        self.operator = _make_operator(operator, targets, options)
        n = len(self.operator.labels)
        given = config.injury
        if isinstance(given, tuple) and len(given) != n:
            raise ValueError(
                f"injury must be one number for each of the {n} coefficients, "
                f"got {len(given)}: {[*given]}"
            )
        self.check_memory(1, "n_prompts texts")
        self._action_shape = (n,)
        self._observation = Observation(patient.targets, patient.width, n)

    def check_memory(self, n_rows: int, rule: str = "num_envs * n_prompts texts") -> None:
        """Raise a ValueError if n_rows operations side by side would not fit into memory.

        The need is a lower bound: two evaluations kept for each operation, and the largest tensors
        of the operations that are evaluated at once.
        """
        config, patient, n_new = self.config, self.patient, self.config.n_new
        weight = next(patient.model.parameters())
        whole = patient.tokenizer.vocab_size if patient.keeps_distributions else 2
        n_texts, n_tokens = n_rows * config.n_prompts, config.prompt_length + n_new
        kept = 2 * n_texts * (8 * n_tokens + 8 * n_new * whole)
        width = sum(t.key.n_heads * t.key.head_dim for t in patient.targets)
        each = 2 * width * n_tokens * weight.element_size() + 4 * n_new * whole
        at_once = min(n_texts, max(config.n_prompts, patient.rows_per_forward)) * each
        if weight.device.type != "cuda":
            kept += at_once
        else:
            of_device = torch.cuda.get_device_properties(weight.device).total_memory
            check_memory(rule, at_once, of_device)
        check_memory(rule, kept)

    def observation_space(self) -> Box[np.float32]:
        """Return the observation space, a new object."""
        return self._observation.space()

    def action_space(self) -> Box[np.float32]:
        """Return the action space, a new object."""
        return Box(-1.0, 1.0, self._action_shape, np.float32)

    def draw(self, rng: np.random.Generator) -> Draw:
        """Draw prompts, sampling noise and injury.

        The same numbers are drawn with and without an injury, so a seed gives the same prompts.
        """
        config = self.config
        prompts = self.patient.prompts(
            config.split, config.n_prompts, config.prompt_length, config.n_new, rng
        )
        given = config.injury
        width = 0.0 if isinstance(given, tuple) else given
        injury = rng.uniform(-width, width, self._action_shape)
        return Draw(prompts, np.array(given) if isinstance(given, tuple) else injury)

    def begin(self, draws: Sequence[Draw]) -> list[Episode]:
        """Begin operations at c = 0."""
        prompts = [draw.prompts for draw in draws]
        injures = self.config.injures
        healthy = self.patient.evaluate_many(prompts, terms=self.terms) if injures else []
        # Evaluated like a step, even without an injury, so that the rounding is the same.
        injuries = [draw.injury for draw in draws]
        baselines = self._evaluate(injuries, prompts, in_place=len(draws) == 1)
        version = self.patient.n_changes
        return [
            Episode.begin(self.config, *draw, baseline, sound.terms, self.score, version)
            for draw, baseline, sound in zip(draws, baselines, healthy or baselines, strict=True)
        ]

    def step(self, episodes: Sequence[Episode], actions: Sequence[ArrayLike]) -> list[Outcome]:
        """Make one step in each operation.

        Args:
            episodes: N operations under way.
            actions: N times (A,) numbers, of any kind that `as_numbers` takes.

        Raises:
            ValueError: if the actions have another shape or are not finite; no operation has
                changed.
        """
        pairs = [(e, self._as_action(a)) for e, a in zip(episodes, actions, strict=True)]
        coefficients = [episode.next_coefficients(action) for episode, action in pairs]
        known = [_known(e, c) for e, c in zip(episodes, coefficients, strict=True)]
        rows = [row for row, evaluation in enumerate(known) if evaluation is None]
        evaluated = self._evaluate(
            [episodes[row].injury + coefficients[row] for row in rows],
            [episodes[row].prompts for row in rows],
            in_place=len(episodes) == 1,
        )
        new = iter(evaluated)
        return [
            episode.conclude(c, next(new) if evaluation is None else evaluation, self.score)
            for episode, c, evaluation in zip(episodes, coefficients, known, strict=True)
        ]

    def _as_action(self, action: ArrayLike) -> NDArray[np.float64]:
        """Return one action as (A,) numbers, checked."""
        numbers, rule = as_numbers("action", action), f"action must be {self._action_shape} finite"
        if numbers.shape != self._action_shape:
            raise ValueError(f"{rule} numbers, got shape {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{rule} numbers, got {numbers.tolist()}")
        return numbers

    def observe(self, episode: Episode) -> NDArray[np.float32]:
        """Return the observation, (O,), a fresh array."""
        return self._observation.observe(
            episode.present.vitals,
            episode.baseline.terms,
            episode.improvement,
            episode.coefficients,
            episode.time_left,
        )

    def render(self, mode: str, episode: Episode | None) -> str | NDArray[np.uint8]:
        """Return an operation as text (`ansi`) or as a picture (`rgb_array`).

        Raises:
            RuntimeError: if there is none.
        """
        if episode is None:
            raise RuntimeError("render() needs an operation: call reset() first")
        return render(mode, episode, self.patient.tokenizer, self.operator.labels)

    def is_stale(self, episode: Episode) -> bool:
        """Return whether the model has changed since the operation began."""
        return episode.model_version != self.patient.n_changes

    def check_current(self, episode: Episode | None) -> Episode:
        """Return an operation that a step can continue.

        Raises:
            RuntimeError: if there is none, or the model has changed since it began.
        """
        if episode is None:
            raise RuntimeError("step() needs an operation under way: call reset() first")
        if self.is_stale(episode):
            raise RuntimeError("the model changed during the operation: call reset() first")
        return episode

    def commit(self, episode: Episode | None) -> None:
        """Write an operation (never its injury) to the weights, which makes all operations stale.

        Raises:
            RuntimeError: if there is none, or the model has changed since it began.
        """
        if episode is None or self.is_stale(episode):
            raise RuntimeError(
                "commit() needs an operation begun on the current model: call reset()"
            )
        self.patient.commit(self.operator, episode.coefficients)

    def _evaluate(
        self,
        coefficients: Sequence[NDArray[np.float64]],
        prompts: Sequence[Prompts],
        *,
        in_place: bool,
    ) -> list[Evaluation]:
        if not prompts:
            return []
        if in_place:
            (rows,), (first,) = coefficients, prompts
            return [self.patient.evaluate_operated(self.operator, rows, first, self.terms)]
        return self.patient.evaluate_many(
            prompts, self.operator, np.array(coefficients), self.terms
        )


def _known(episode: Episode, coefficients: NDArray[np.float64]) -> Evaluation | None:
    """Return the evaluation at these coefficients if the episode has it."""
    if not coefficients.any():
        return episode.baseline
    return episode.present if np.array_equal(coefficients, episode.coefficients) else None


def _make_operator(name: str, targets: Targets, given: Any) -> Operator:
    """Build an operator; the names of options are checked here, their values in the operator."""
    check_choice("operator", name, OPERATORS)
    options = check_mapping("operator_options", given)
    maker = functools.partial(OPERATORS[name], targets)
    if not takes_any_keyword(maker):
        check_keywords(f"operator_options of {name!r}", options, maker)
    try:
        return maker(**options)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"operator_options must fit into memory, got {options}: {reason}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. On the CPU torch raises a plain RuntimeError."""
    known = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in known
    )
