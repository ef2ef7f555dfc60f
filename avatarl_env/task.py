"""The surgeon's task on one patient: what the single and the vector environment have in common.

Shapes: N operations side by side, A coefficients, O numbers in an observation.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from avatarl_env.episode import Episode, EpisodeConfig, Outcome
from avatarl_env.errors import (
    INTEGER_LIMIT,
    as_numbers,
    check_bool,
    check_choice,
    check_integer,
    check_keywords,
    check_mapping,
    check_number,
    check_text,
    shown,
    takes_any_keyword,
)
from avatarl_env.memory import check_memory
from avatarl_env.observation import Observation
from avatarl_env.patient import ROWS_PER_FORWARD, Evaluation, Patient, Prompts
from avatarl_env.scoring import TERMS, Score
from avatarl_env.surgery import OPERATORS, Operator, Targets, find_targets, make_operator

MOST_COEFFICIENTS = 4096
"""Of an operator's counts (directions, bands, ranks), which take time and memory each."""
MOST_LAYERS = 10_000
"""Entries that `layers` may have."""


class Draw(NamedTuple):
    """The chance in an operation, all of it."""

    prompts: Prompts
    injury: NDArray[np.float64]
    """(A,)."""


class SurgeryTask:
    """Patient, operator, rules and score; begins operations, makes steps, observes.

    A single operation is performed in place, on the shared model inside a theater; several side by
    side in one forward.
    """

    def __init__(
        self,
        patient: Patient,
        config: EpisodeConfig,
        *,
        operator: str = "head_gain",
        operator_options: Mapping[str, Any] | None = None,
        layers: Iterable[int | str] | None = None,
        score: Mapping[str, float] | None = None,
    ) -> None:
        """Bring the parts together.

        Args:
            patient: the model, with its text.
            config: the rules.
            operator: name of the operator.
            operator_options: its keyword arguments.
            layers: attention layers to operate on, as for `find_targets`; default all.
            score: weights by term name.

        Raises:
            ValueError: if a name is unknown, the operation does not fit the model or the text, or
                the injury is given and not of A numbers.
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
        """What is measured, for life: later ones are not of this task."""
        targets = patient.targets
        if layers is not None:
            targets = find_targets(patient.model, _as_layers(layers))
        options = {} if operator_options is None else operator_options
        self.operator = _make_operator(operator, targets, options)
        self._n_coefficients = len(self.operator.labels)
        given = config.injury
        if isinstance(given, tuple) and len(given) != self._n_coefficients:
            raise ValueError(
                f"injury must be one number for each of the {self._n_coefficients} coefficients, "
                f"got {len(given)}: {[*given]}"
            )
        self.check_memory(1, "n_prompts texts")
        self._observation = Observation(
            patient.targets, patient.width, tuple(self.terms), self._n_coefficients
        )

    def check_memory(self, n_rows: int, rule: str = "num_envs * n_prompts texts") -> None:
        """Raise a ValueError if n_rows operations side by side would not fit into memory.

        A lower bound: what is kept of each operation (two evaluations), and the largest tensors of
        as many of them as are evaluated at once.
        """
        config, patient, n_new = self.config, self.patient, self.config.n_new
        weight = next(patient.model.parameters())
        whole = patient.tokenizer.vocab_size if patient.keeps_distributions else 2
        n_texts, n_tokens = n_rows * config.n_prompts, config.prompt_length + n_new
        kept = 2 * n_texts * (8 * n_tokens + 8 * n_new * whole)
        width = sum(t.key.n_heads * t.key.head_dim for t in patient.targets)
        each = 2 * width * n_tokens * weight.element_size() + 4 * n_new * whole
        at_once = min(n_texts, max(config.n_prompts, ROWS_PER_FORWARD)) * each
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
        return Box(-1.0, 1.0, (self._n_coefficients,), np.float32)

    def draw(self, rng: np.random.Generator) -> Draw:
        """Draw prompts, dice and injury.

        As much is drawn whatever the injury is, so that a seed means the same prompts with any.
        """
        config = self.config
        prompts = self.patient.prompts(
            config.split, config.n_prompts, config.prompt_length, config.n_new, rng
        )
        given = config.injury
        width = 0.0 if isinstance(given, tuple) else given
        injury = rng.uniform(-width, width, self._n_coefficients)
        return Draw(prompts, np.array(given) if isinstance(given, tuple) else injury)

    def begin(self, draws: Sequence[Draw]) -> list[Episode]:
        """Begin operations at c = 0."""
        prompts = [draw.prompts for draw in draws]
        injures = self.config.injures
        healthy = self.patient.evaluate_many(prompts, terms=self.terms) if injures else []
        # Also without an injury they go the way that steps go, rounding and all.
        injuries = [draw.injury for draw in draws]
        baselines = self._evaluate(injuries, prompts, in_place=len(draws) == 1)
        if "kl_ref" in self.score.weights:  # the only term that pulls a model to the reference
            self.patient.compare(healthy or baselines)
        return [
            Episode.begin(self.config, *draw, baseline, sound.terms, self.score)
            for draw, baseline, sound in zip(draws, baselines, healthy or baselines, strict=True)
        ]

    def step(self, episodes: Sequence[Episode], actions: Sequence[ArrayLike]) -> list[Outcome]:
        """Make one step in each operation.

        Args:
            episodes: N operations under way.
            actions: N, each (A,) numbers of any kind that `as_numbers` takes.

        Raises:
            ValueError: if the actions have another shape or are not finite. No operation is touched
                then.
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
        numbers = as_numbers("action", action)
        shape = (self._n_coefficients,)
        if numbers.shape != shape:
            raise ValueError(f"action must be {shape} finite numbers, got shape {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"action must be {shape} finite numbers, got {numbers.tolist()}")
        return numbers

    def observe(self, episode: Episode) -> NDArray[np.float32]:
        """Return what the surgeon sees, (O,), a fresh array."""
        return self._observation.observe(
            episode.present.vitals,
            episode.baseline.terms,
            episode.score - self.score(episode.baseline.terms),
            episode.coefficients,
            episode.time_left,
        )

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
        rows = np.array(coefficients)
        return self.patient.evaluate_many(prompts, self.operator, rows, self.terms)


def _known(episode: Episode, coefficients: NDArray[np.float64]) -> Evaluation | None:
    """Return what the coefficients lead to, to the last bit, where that was evaluated before."""
    if not coefficients.any():
        return episode.baseline
    return episode.present if np.array_equal(coefficients, episode.coefficients) else None


def _as_layers(layers: Any) -> list[int | str]:
    """Return what `find_targets` takes, checked by type."""
    if isinstance(layers, np.ndarray):
        layers = layers.tolist()  # one number, where it has no dimension
    entries = [layers] if isinstance(layers, int | str) else layers
    if not isinstance(entries, list | tuple | set | frozenset | range):
        raise ValueError(f"layers must be numbers, names or globs in a list, got {shown(layers)}")
    found: list[int | str] = []
    for entry in itertools.islice(entries, MOST_LAYERS + 1):  # a range has no len() above 2^63
        is_number = isinstance(entry, Integral) and not isinstance(entry, bool)
        if not is_number and not isinstance(entry, str):
            raise ValueError(f"layers must be numbers, names or globs, got {shown(entry)}")
        found.append(int(entry) if is_number else entry)
    if not found:
        raise ValueError("layers must be at least one layer, got none")
    if len(found) > MOST_LAYERS:
        raise ValueError(f"layers must have at most {MOST_LAYERS} entries, got more")
    return found


def _check_names(argument: str, value: Any) -> object:
    """Return a name or a list of names, checked by type."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} must be a name or a list of names, got {shown(value)}")
    return value


_CHECKS: dict[object, Callable[[str, Any], object]] = {
    "bool": check_bool,
    "float": functools.partial(check_number, least=-math.inf, most=math.inf),
    "int": lambda argument, value: check_integer(
        argument, value, most=INTEGER_LIMIT if "seed" in argument else MOST_COEFFICIENTS
    ),
    "str | Sequence[str]": _check_names,
    "str | None": lambda argument, value: None if value is None else check_text(argument, value),
}
"""Checks of an operator's options, by the annotation that its signature has."""


def _make_operator(name: str, targets: Targets, given: Any) -> Operator:
    """Make an operator of options that are checked, where the operator says which it has."""
    check_choice("operator", name, OPERATORS)
    options = check_mapping("operator_options", given)
    maker = functools.partial(OPERATORS[name], targets)
    if not takes_any_keyword(maker):
        check_keywords(f"operator_options of {name!r}", options, maker)
        for option, parameter in inspect.signature(maker).parameters.items():
            check = _CHECKS.get(parameter.annotation)
            if option in options and check is not None:
                options[option] = check(f"operator_options[{option!r}]", options[option])
    try:
        return make_operator(name, targets, **options)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"operator_options must fit into memory, got {options}: {reason}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On the CPU, torch says so in the text of a RuntimeError only."""
    known = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in known
    )
