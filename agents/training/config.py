"""What can be chosen of a run, and the presets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.estimators import ALL_ACTIONS
from agents.surgeons.registry import check_surgeon
from agents.tracking.wandb import TRACK_CHOICES
from agents.tracking.writer import to_json
from agents.training.curriculum import IF_BETTER, PROBE, ROLLOUT, CurriculumConfig, make_phases
from avatarl_env import errors as choices
from avatarl_env.episode import EpisodeConfig
from avatarl_env.lm.gpt import GPTConfig
from avatarl_env.scoring import DEFAULT_WEIGHTS, Score
from avatarl_env.surgery import OPERATORS

PRESET_NAMES = ("smoke", "laptop", "full", "seed_sampled", "seed_exhaustive")
MOST_SEED = 2**128 - 1
MOST_THREADS = 1024  # beyond every machine there is; torch cannot count much further
NOT_FINITE = ("inf", "-inf", "nan")  # how JSON holds a number that it has no form for
_OF_PRESET: Any = None  # default of what the presets differ in


class BadInput(ValueError):
    """What was asked for cannot be done; nothing has been trained or written."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the language model; the vocabulary comes from the corpus.

    Raises:
        ValueError: if the heads do not divide the width into even head dims, or a size is below 1.
    """

    context: int = 128
    """Longest window it sees, characters."""
    n_layers: int = 3
    """Blocks."""
    n_heads: int = 4
    """Attention heads per block; divides the width."""
    width: int = 96
    """Residual stream, channels."""

    def __post_init__(self) -> None:
        self.with_vocabulary(1)

    def with_vocabulary(self, vocab_size: int) -> GPTConfig:
        """Return the sizes of a GPT over so many tokens."""
        return GPTConfig(vocab_size=vocab_size, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model by RL, operate on it, and say what the surgeon was worth.

    What is not given (or None) of `surgeon`, `lm`, `grpo`, `operation` and `curriculum`
    is the preset's: `TrainConfig(preset="smoke")` is `preset("smoke")`.

    Raises:
        ValueError: if a value is unknown or out of range, or nothing is as the preset has it.
    """

    preset: str = "laptop"
    """smoke (under a minute), laptop (a few minutes on two cores), full (a GPU), or the recipes
    that came before (seed_sampled, seed_exhaustive)."""
    corpus: str = "auto"
    """tinyshakespeare, shakespeare, playwright, a file, or auto: what can be had."""
    surgeon: str = _OF_PRESET
    """sac, td3, ppo, cma_es, ..., random, zero, or none for no surgery at all."""
    # What words of a command line become. From Python and JSON come also None, lists and mappings.
    surgeon_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """The surgeon's own, in pairs: learning_rate 3e-4 gradient_steps 8."""
    operator: str = "head_gain"
    """What the surgeon's coefficients mean: head_gain, spectral_bands, low_rank_seed, ..."""
    layers: tuple[int | str, ...] | None = None
    """Attention layers that it acts on: numbers (-1 is the last), names or globs; None: all."""
    score: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """What the surgeon is paid for: a term, or weighted terms, kl_ref 1 heldout_loss 20."""
    seed: int = 0
    """Of everything: the same seed, machine, threads and processes give the same run."""
    out: str | None = None
    """Run folder, new or empty; default runs/DATE-TIME-PRESET."""
    resume: str | None = None
    """A run folder to go on with, exactly; all other settings are that run's own."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints, which come between rounds; 0 for one after each."""
    track: str | None = None
    """Weights & Biases: off, offline or online; default what WANDB_MODE says, else off."""
    tensorboard: bool = False
    """Write event files for TensorBoard too, into the run folder; needs the extra tensorboard."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 is torch's own choice."""
    lm: ModelConfig = _OF_PRESET
    """The language model."""
    grpo: GRPOConfig = _OF_PRESET
    """How it learns."""
    operation: EpisodeConfig = _OF_PRESET
    """The surgeon's task; with many operations side by side, few prompts each teach it most."""
    curriculum: CurriculumConfig = _OF_PRESET
    """Who learns when."""

    def __post_init__(self) -> None:
        choices.check_choice("preset", self.preset, PRESET_NAMES)
        self._complete()
        # What is stored, compared and resumed has one form.
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        check_surgeon(self.surgeon, self.surgeon_options)
        choices.check_choice("operator", self.operator, OPERATORS)
        if self.track is not None:
            choices.check_choice("track", self.track, TRACK_CHOICES)
        self.operation.check_context(self.lm.context)
        self._check_phases()

    @property
    def rules(self) -> dict[str, Any]:
        """The rules of operations: keyword arguments of an environment."""
        return rules_of(asdict(self))

    def _complete(self) -> None:
        """Take from the preset what was not given.

        Raises:
            ValueError: if everything is the default preset's, under the name of another.
        """
        own, usual = _PRESETS[self.preset](), _laptop()
        for name, value in own.items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)  # frozen, but not yet made
            elif not isinstance(given, type(value)):
                raise ValueError(
                    f"{name} must be a {type(value).__name__}, got {choices.shown(given)}"
                )
        if own != usual and all(getattr(self, name) == usual[name] for name in usual):
            raise ValueError(
                f"preset must be 'laptop', whose settings these all are, got {self.preset!r}; "
                f"for the settings of {self.preset!r} write preset({self.preset!r})"
            )

    def _checked(self) -> dict[str, Any]:
        """Return the settings that have plain values, each of its type and in its range."""
        given = [name for name in ("out", "resume") if getattr(self, name) is not None]
        seconds: Any = self.checkpoint_seconds
        if not (isinstance(seconds, float) and seconds == math.inf):
            seconds = choices.check_number("checkpoint_seconds", seconds, 0, math.inf)
        return {
            **{n: choices.check_text(n, getattr(self, n)) for n in ("corpus", "device", *given)},
            "surgeon_options": choices.check_mapping("surgeon_options", self.surgeon_options),
            "layers": _as_layers(self.layers),
            "score": _as_weights(self.score),
            "seed": choices.check_integer("seed", self.seed, most=MOST_SEED),
            "checkpoint_seconds": seconds,
            "tensorboard": choices.check_bool("tensorboard", self.tensorboard),
            "threads": choices.check_integer("threads", self.threads, most=MOST_THREADS),
        }

    def _check_phases(self) -> None:
        """Refuse what the phases could not be run, or judged, with."""
        if any(phase.rollouts for phase in make_phases(self.curriculum, self.surgeon)):
            able = f"{PROBE} or {IF_BETTER}"
            self.grpo.check_off_policy(f"commit must be {able}", repr(ROLLOUT))
        if self.operation.injury:
            raise ValueError(
                "injury must be 0 in a run, which judges operations on the healthy model, "
                f"got {self.operation.injury}"
            )
        if self.operation.split != "surgeon":
            raise ValueError(
                "split must be 'surgeon' in a run, the others are for training and reporting, "
                f"got {self.operation.split!r}"
            )


def rules_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rules of a run's operations, keyword arguments of an environment.

    Args:
        settings: the run's `config.json`; one of before there was a choice has no layers or
            score.
    """
    chosen = {"layers": settings.get("layers"), "score": settings.get("score")}
    return {"operator": settings["operator"], **chosen, **settings["operation"]}


def _as_layers(value: Any) -> tuple[int | str, ...] | None:
    if value is None:
        return None
    is_row = isinstance(value, list | tuple) and len(value) > 0
    if not is_row or not all(type(entry) in (int, str) for entry in value):
        raise ValueError(
            f"layers must be None, or numbers, names or globs of layers, one or more, got {value!r}"
        )
    return tuple(value)


def _as_weights(value: Any) -> dict[str, float]:
    weights = value.values() if isinstance(value, Mapping) else [None]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in weights):
        raise ValueError(f"score must be numbers, weights by the name of a term, got {value!r}")
    return Score(value).weights


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what `config.json` holds of a configuration; `from_settings` reads it.

    Numbers that are not finite are strings: "inf", "-inf" or "nan".
    """
    settings: dict[str, Any] = to_json(asdict(config), "config", exact=True)
    return settings


def from_settings(settings: Mapping[str, Any]) -> TrainConfig:
    """Rebuild a configuration from a run's `config.json`.

    Raises:
        ValueError: if it is not that of a run of this version.
    """
    parts = {"lm": ModelConfig, "grpo": GRPOConfig, "operation": EpisodeConfig}
    parts |= {"curriculum": CurriculumConfig}
    found = ("corpus_sha256", "processes")  # not chosen
    try:
        known = {name: value for name, value in settings.items() if name not in found}
        recipe = dict(known["grpo"])
        known["grpo"] = {**recipe, "regularizer": _made(RegularizerConfig, recipe["regularizer"])}
        made = {name: _made(kind, known[name]) for name, kind in parts.items()}
        config: TrainConfig = _made(TrainConfig, {**known, **made})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"config.json must be that of a run of this version: {error}") from error
    return config


def _made(kind: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Make a part of a configuration; strings that stand for a number become that number."""

    def number(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: number(item) for name, item in value.items()}
        return float(value) if value in NOT_FINITE else value

    numeric = {part.name for part in fields(kind) if "float" in str(part.type)}  # type: ignore[arg-type]
    return kind(**{n: number(v) if n in numeric else v for n, v in settings.items()})


def preset(name: str) -> TrainConfig:
    """Return a preset.

    Raises:
        ValueError: if there is none of that name; names the closest.
    """
    return TrainConfig(preset=name)


def _laptop(**changes: Any) -> dict[str, Any]:
    """Return the parts of the default preset, of a few minutes on two cores, with changes."""
    parts = {
        "surgeon": "sac",
        "lm": ModelConfig(),
        "grpo": GRPOConfig(),
        "operation": EpisodeConfig(n_prompts=4),
        "curriculum": CurriculumConfig(),
    }
    return parts | changes


def _smoke() -> dict[str, Any]:
    """Every part of the machinery in under a minute; nothing is learned well."""
    return _laptop(
        lm=ModelConfig(context=64, n_layers=2, n_heads=2, width=64),
        grpo=GRPOConfig(batch_size=16, learning_rate=6e-3, warmup_updates=10),
        operation=EpisodeConfig(n_prompts=4, prompt_length=16, n_new=32),
        curriculum=CurriculumConfig(
            bootstrap_updates=120,
            surgery_rounds=4,
            joint_rounds=2,
            updates_per_round=10,
            n_rows=32,
            paired_prompts=64,
            evaluate_every=40,
        ),
    )


def _full() -> dict[str, Any]:
    """The model of ten million parameters, for a GPU."""
    return _laptop(
        lm=ModelConfig(context=256, n_layers=6, n_heads=6, width=384),
        grpo=GRPOConfig(
            batch_size=64, learning_rate=1e-3, warmup_updates=100, precision="bfloat16"
        ),
        operation=EpisodeConfig(n_prompts=8, prompt_length=64, n_new=128),
        curriculum=CurriculumConfig(
            bootstrap_updates=3_000,
            surgery_rounds=100,
            joint_rounds=50,
            updates_per_round=20,
            n_rows=128,
            evaluate_every=250,
        ),
    )


def _seed_sampled() -> dict[str, Any]:
    """The sampled recipe for this task that came before, to show where it ends."""
    return _laptop(
        surgeon="none",
        grpo=GRPOConfig(
            estimator="seed_sampled",
            group_size=4,
            temperature=1.2,
            sync_every=5,
            clip=0.5,
            clip_high=0.5,
            optimizer="adamw",
            learning_rate=2e-3,
            regularizer=RegularizerConfig(
                entropy_bonus=0.01, kl_coefficient=0.1, kl_target=0.5, partial_credit=0.1
            ),
        ),
        curriculum=CurriculumConfig(surgery_rounds=0, joint_rounds=0),
    )


def _seed_exhaustive() -> dict[str, Any]:
    """The exhaustive recipe for this task that came before, to show where it ends."""
    return _laptop(
        surgeon="none",
        grpo=GRPOConfig(
            estimator="seed_exhaustive",
            exploration=ALL_ACTIONS,
            optimizer="adamw",
            learning_rate=2e-3,
            regularizer=RegularizerConfig(entropy_floor=1.5, partial_credit=0.1),
        ),
        curriculum=CurriculumConfig(surgery_rounds=0, joint_rounds=0),
    )


_PRESETS: dict[str, Callable[[], dict[str, Any]]] = dict(
    zip(PRESET_NAMES, (_smoke, _laptop, _full, _seed_sampled, _seed_exhaustive), strict=True)
)
