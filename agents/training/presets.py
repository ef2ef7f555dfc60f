"""The sizes of the language model, and the presets: named values of parts of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from agents.grpo.config import GRPOConfig, RegularizerConfig
from agents.grpo.estimators import ALL_ACTIONS
from agents.training.curriculum import CurriculumConfig
from avatarl_env.episode import EpisodeConfig
from avatarl_env.lm.gpt import GPTConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the language model; the vocabulary comes from the corpus.

    Raises:
        ValueError: if the heads do not divide the width into even head dims, or a size is below 1.
    """

    context: int = 128
    """Longest window, characters."""
    n_layers: int = 3
    """Blocks."""
    n_heads: int = 4
    """Attention heads per block; divides the width."""
    width: int = 96
    """Residual stream, channels."""

    def __post_init__(self) -> None:
        self.with_vocabulary(1)

    def with_vocabulary(self, vocab_size: int) -> GPTConfig:
        """Return the sizes of a GPT with a vocabulary of `vocab_size` tokens."""
        return GPTConfig(vocab_size=vocab_size, **asdict(self))


def laptop(**changes: Any) -> dict[str, Any]:
    """The default: a few minutes on two cores."""
    parts = {
        "surgeon": "sac",
        "lm": ModelConfig(),
        "grpo": GRPOConfig(),
        # With many parallel operations, the surgeon learns most from few prompts in each.
        "operation": EpisodeConfig(n_prompts=4),
        "curriculum": CurriculumConfig(),
    }
    return parts | changes


def smoke() -> dict[str, Any]:
    """Every part of the program in under a minute; nothing is learned well."""
    return laptop(
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


def full() -> dict[str, Any]:
    """A model of ten million parameters, for a GPU."""
    return laptop(
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


def seed_sampled() -> dict[str, Any]:
    """An earlier project's sampled recipe for this task, kept for comparison."""
    return laptop(
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


def seed_exhaustive() -> dict[str, Any]:
    """An earlier project's exhaustive recipe for this task, kept for comparison."""
    return laptop(
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


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "smoke": smoke,
    "laptop": laptop,
    "full": full,
    "seed_sampled": seed_sampled,
    "seed_exhaustive": seed_exhaustive,
}
"""Presets by name; each returns the parts of a `TrainConfig` in which presets differ."""
