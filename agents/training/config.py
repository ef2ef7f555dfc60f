"""The configuration of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, get_type_hints

from agents.grpo.config import GRPOConfig
from agents.surgeons.registry import check_surgeon
from agents.tracking.wandb import TRACK_CHOICES
from agents.tracking.writer import to_json
from agents.training.curriculum import IF_BETTER, PROBE, ROLLOUT, CurriculumConfig, make_phases
from agents.training.presets import PRESETS, ModelConfig
from avatarl_env import errors
from avatarl_env.episode import EpisodeConfig
from avatarl_env.scoring import DEFAULT_WEIGHTS, Score
from avatarl_env.surgery import OPERATORS

MOST_SEED = 2**128 - 1
MOST_THREADS = 1024  # more than any machine has; torch overflows not much further
NOT_FINITE = ("inf", "-inf", "nan")  # strings that stand for these numbers in config.json
_FROM_PRESET: Any = None  # default of the settings in which presets differ


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model by RL, operate on it, and report the surgeon's effect.

    `surgeon`, `lm`, `grpo`, `operation` and `curriculum` default to the preset's values:
    `TrainConfig(preset="smoke")` equals `preset("smoke")`.

    Raises:
        ValueError: if a value is unknown or out of range, or all of these five are the default
            preset's under the name of another.
    """

    preset: str = "laptop"
    """smoke (under a minute), laptop (a few minutes on two cores), full (a GPU), or the recipes of
    earlier projects (seed_sampled, seed_exhaustive)."""
    corpus: str = "auto"
    """tinyshakespeare, shakespeare, playwright, a file, or auto: the first that is available."""
    surgeon: str = _FROM_PRESET
    """sac, td3, ppo, cma_es, ..., random, zero, or none for no surgery at all."""
    # Types for the command line. Python and JSON may also give None, lists and mappings.
    surgeon_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """The surgeon's own options, in pairs: learning_rate 3e-4 gradient_steps 8."""
    operator: str = "head_gain"
    """How the surgeon's coefficients edit the weights: head_gain, spectral_bands, ..."""
    layers: tuple[int | str, ...] | None = None
    """Attention layers to operate on: numbers (-1 is the last), names or globs; None: all."""
    score: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """The surgeon's reward: a term, or weighted terms, kl_ref 1 heldout_loss 20."""
    seed: int = 0
    """The same seed, machine, threads and ranks give the same run."""
    out: str | None = None
    """Run folder, new or empty; default runs/DATE-TIME-PRESET."""
    resume: str | None = None
    """A run folder to resume exactly, with its own settings."""
    checkpoint_seconds: float = 30.0
    """Shortest time between two checkpoints; 0 for one after each step."""
    track: str | None = None
    """Weights & Biases: off, offline or online; default the value of WANDB_MODE, else off."""
    tensorboard: bool = False
    """Also write event files for TensorBoard; needs the extra tensorboard."""
    device: str = "auto"
    """cpu, cuda, or auto (a GPU if there is one)."""
    threads: int = 0
    """CPU threads; 0 for torch's own choice."""
    lm: ModelConfig = _FROM_PRESET
    """The language model."""
    grpo: GRPOConfig = _FROM_PRESET
    """The training of the language model."""
    operation: EpisodeConfig = _FROM_PRESET
    """The rules of an operation, the surgeon's task."""
    curriculum: CurriculumConfig = _FROM_PRESET
    """Phases and commits."""

    def __post_init__(self) -> None:
        errors.check_choice("preset", self.preset, PRESETS)
        self._complete()
        # One form of each value is stored, compared and resumed.
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        check_surgeon(self.surgeon, self.surgeon_options)
        errors.check_choice("operator", self.operator, OPERATORS)
        if self.track is not None:
            errors.check_choice("track", self.track, TRACK_CHOICES)
        self.operation.check_context(self.lm.context)
        self._check_phases()

    @property
    def rules(self) -> dict[str, Any]:
        """The rules of operations: keyword arguments of an environment."""
        return rules_of(asdict(self))

    def _complete(self) -> None:
        """Fill in the preset's values; see the class for errors."""
        own, usual = PRESETS[self.preset](), PRESETS["laptop"]()
        for name, value in own.items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)  # frozen, but still under construction
            elif not isinstance(given, type(value)):
                raise ValueError(
                    f"{name} must be a {type(value).__name__}, got {errors.shown(given)}"
                )
        if own != usual and all(getattr(self, name) == usual[name] for name in usual):
            raise ValueError(
                f"preset must be 'laptop' since all settings are that preset's, got "
                f"{self.preset!r}; for the settings of {self.preset!r} write "
                f"preset({self.preset!r})"
            )

    def _checked(self) -> dict[str, Any]:
        """Return the settings of plain types, checked and converted."""
        given = [name for name in ("out", "resume") if getattr(self, name) is not None]
        seconds: Any = self.checkpoint_seconds
        if not (isinstance(seconds, float) and seconds == math.inf):
            seconds = errors.check_number("checkpoint_seconds", seconds, 0, math.inf)
        return {
            **{n: errors.check_text(n, getattr(self, n)) for n in ("corpus", "device", *given)},
            "surgeon_options": errors.check_mapping("surgeon_options", self.surgeon_options),
            "layers": None if self.layers is None else errors.check_layers(self.layers),
            "score": Score(self.score).weights,
            "seed": errors.check_integer("seed", self.seed, most=MOST_SEED),
            "checkpoint_seconds": seconds,
            "tensorboard": errors.check_bool("tensorboard", self.tensorboard),
            "threads": errors.check_integer("threads", self.threads, most=MOST_THREADS),
        }

    def _check_phases(self) -> None:
        """Refuse settings that exclude each other."""
        if any(phase.rollouts for phase in make_phases(self.curriculum, self.surgeon)):
            rule = f"commit must be {PROBE} or {IF_BETTER}"
            self.grpo.check_off_policy(rule, repr(ROLLOUT))
        if self.operation.injury:
            raise ValueError(
                "injury must be 0 in a run, which evaluates operations on the healthy model, "
                f"got {self.operation.injury}"
            )
        if self.operation.split != "surgeon":
            raise ValueError(
                "split must be 'surgeon' in a run, as the others are for training and reporting, "
                f"got {self.operation.split!r}"
            )


def preset(name: str) -> TrainConfig:
    """Return the configuration of a preset.

    Raises:
        ValueError: if the name is unknown; offers the closest.
    """
    return TrainConfig(preset=name)


def rules_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rules of a run's operations as keyword arguments of an environment.

    Args:
        settings: contents of the run's `config.json`; `layers` and `score` may be missing.
    """
    chosen = {"layers": settings.get("layers"), "score": settings.get("score")}
    return {"operator": settings["operator"], **chosen, **settings["operation"]}


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """Convert a configuration to JSON types for `config.json`; `from_settings` reads them.

    Non-finite numbers become the strings "inf", "-inf" or "nan".
    """
    settings: dict[str, Any] = to_json(asdict(config), "config", exact=True)
    return settings


def from_settings(settings: Mapping[str, Any]) -> TrainConfig:
    """Rebuild a configuration from a run's `config.json`.

    Raises:
        ValueError: if it is not that of a run of this version.
    """
    recorded = ("corpus_sha256", "processes")  # not settings
    try:
        chosen = {name: value for name, value in settings.items() if name not in recorded}
        missing = PRESETS["laptop"]().keys() - chosen.keys()
        if missing:
            raise ValueError(f"{min(missing)} is missing")  # noqa: TRY301 - one message for all
        config: TrainConfig = _rebuilt(TrainConfig, chosen)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"config.json must be that of a run of this version: {error}") from error
    return config


def _rebuilt(kind: Any, value: Any) -> Any:
    """Rebuild a value of a type: dataclasses from mappings, non-finite numbers from strings."""
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        return kind(**{name: _rebuilt(hints.get(name), item) for name, item in value.items()})  # type: ignore[operator]
    if "float" not in str(kind):
        return value
    if isinstance(value, dict):
        return {name: _rebuilt(kind, item) for name, item in value.items()}
    return float(value) if isinstance(value, str) and value in NOT_FINITE else value
