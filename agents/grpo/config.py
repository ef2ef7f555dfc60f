"""How the language model learns: what can be chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch

from agents.grpo.estimators import (
    CONFIDENCE_POWER,
    ESTIMATORS,
    MOST_CONFIDENCE,
    SAMPLED,
    check_estimator,
)
from agents.grpo.optimizer import MUON, OPTIMIZERS
from avatarl_env.errors import check_choice, shown

TEMPERATURES = (1e-6, 1e6)  # beyond them all is one character, or chance, in float32
MOST_GROUP = 65_536
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _check_numbers(config: Any) -> None:
    """Refuse what is no number in the fields of a dataclass that are numbers."""
    kinds = {"int": (Integral, "a whole number"), "float": (Real, "a number")}
    for part in fields(config):
        kind, words = kinds.get(str(part.type), (object, ""))
        value = getattr(config, part.name)
        if words and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"{part.name} must be {words}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """What is added to an estimator's loss or reward, all off by default, and weights and bounds.

    Raises:
        ValueError: if a value is negative or not finite.
    """

    entropy_bonus: float = 0.0
    """Weight of the policy's entropy."""
    entropy_floor: float = 0.0
    """Nats below which missing entropy is charged, one for one."""
    kl_coefficient: float = 0.0
    """Weight of KL(policy || bigram model of the training text); the first one, if it adapts."""
    kl_target: float = 0.0
    """Nats that the coefficient adapts to; 0: it stays."""
    partial_credit: float = 0.0
    """Reward of a character besides an exact match: so much times its bigram probability."""
    reward_clip: float = 0.0
    """Largest absolute reward, partial credit included; 0: no bound."""
    confidence_power: float = CONFIDENCE_POWER
    """seed_exhaustive weighs advantages by min((V p)^confidence_power, confidence_clip)."""
    confidence_clip: float = MOST_CONFIDENCE
    """Largest such weight."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        for name in self.__dataclass_fields__:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if self.confidence_clip == 0:
            raise ValueError("confidence_clip must be positive, or nothing is learned, got 0.0")
        if self.kl_target and not self.kl_coefficient:
            raise ValueError(
                f"kl_coefficient must be positive where kl_target is, got {self.kl_coefficient}"
            )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """How the language model learns.

    Raises:
        ValueError: if a value is unknown or out of range, or a combination does not exist.
    """

    estimator: str = "proper_maxrl"
    """proper_maxrl, brier, maxrl, grpo, dr_grpo, rloo, gspo, cispo, the recipes that came before
    (seed_sampled, seed_exhaustive), or ce (the supervised control, not RL)."""
    exploration: str = SAMPLED
    """sampled (K characters per position) or all_actions (the limit without sampling noise)."""
    horizon: int = 1
    """H, characters of an episode: 1, or texts that the model goes on with by itself."""
    group_size: int = 16
    """K, characters (or texts) sampled at each position (or prompt)."""
    batch_size: int = 8
    """B, windows (or prompts) per update; windows are a whole context long."""
    temperature: float = 1.0
    """Of the policy, wherever it counts: softmax(logits / temperature)."""
    sync_every: int = 1
    """Updates that an old policy samples before it is the present one again; 1: there is none."""
    clip: float = 0.2
    """How far below 1 a ratio of new to old probability counts; gspo's paper has 3e-4."""
    clip_high: float = 0.28
    """How far above 1; gspo's paper has 4e-4."""
    match_bonus: float = 1.0
    """Reward of a text, H > 1: so much times its share of leading characters that are right."""
    optimizer: str = MUON
    """muon (for matrices; AdamW for the rest) or adamw (for everything)."""
    learning_rate: float = 6e-3
    """Peak of AdamW's learning rate."""
    matrix_learning_rate: float = 0.02
    """Peak of Muon's."""
    warmup_updates: int = 30
    """Updates of linear warm-up, on top of a cosine from the peak down to a tenth of it."""
    weight_decay: float = 0.1
    """On matrices only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    precision: str = "float32"
    """Of the forward's matrix products: float32, or bfloat16 by autocast."""
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    """What is added to the loss."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        is_made = isinstance(self.regularizer, RegularizerConfig)
        if not is_made:
            raise ValueError(
                f"regularizer must be a RegularizerConfig, got {shown(self.regularizer)}"
            )
        check_estimator(self.estimator, self.exploration, self.group_size, self.horizon)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        positive = ("batch_size", "temperature", "sync_every", "clip", "clip_high")
        for name in (*positive, "learning_rate", "matrix_learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        least, most = TEMPERATURES
        if not least <= self.temperature <= most:
            raise ValueError(
                f"temperature must be within {least:g} and {most:g}, got {self.temperature}"
            )
        if self.group_size > MOST_GROUP:
            raise ValueError(f"group_size must be at most {MOST_GROUP}, got {self.group_size}")
        for name in ("match_bonus", "warmup_updates", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self._check_combination()

    def check_off_policy(self, rule: str, value: object) -> None:
        """Raise a ValueError, of a rule that `value` breaks, unless somebody else may sample."""
        if not ESTIMATORS[self.estimator].is_off_policy:
            raise ValueError(
                f"{rule} for {self.estimator}, whose policy samples itself, got {value}"
            )
        if self.horizon > 1 and self.precision != "float32":  # texts are written in float32
            raise ValueError(
                f"{rule} for texts in {self.precision}, whose ratios would be its rounding, "
                f"got {value}"
            )

    def _check_combination(self) -> None:
        estimator, extra = ESTIMATORS[self.estimator], self.regularizer
        if self.sync_every > 1:
            self.check_off_policy("sync_every must be 1", self.sync_every)
        if extra.partial_credit and not (estimator.takes_credit and self.horizon == 1):
            raise ValueError(
                f"partial_credit must be 0 for {self.estimator} at horizon {self.horizon}, "
                f"got {extra.partial_credit}"
            )
        if extra.reward_clip and not estimator.clips_rewards:
            raise ValueError(
                f"reward_clip must be 0 for {self.estimator}, whose rewards are bounded, "
                f"got {extra.reward_clip}"
            )
        if not estimator.weighs_confidence:
            self._check_unweighted()
        if self.horizon > 1 and (extra.kl_coefficient or extra.entropy_floor):
            raise ValueError(
                "kl_coefficient and entropy_floor must be 0 where horizon is above 1, whose reward "
                f"is a KL itself, got {extra.kl_coefficient} and {extra.entropy_floor}"
            )

    def _check_unweighted(self) -> None:
        """Refuse a weight that the estimator would not look at."""
        usual = {"confidence_power": CONFIDENCE_POWER, "confidence_clip": MOST_CONFIDENCE}
        for name, value in usual.items():
            if getattr(self.regularizer, name) != value:
                raise ValueError(
                    f"{name} must be {value} for {self.estimator}, which does not weigh advantages "
                    f"by confidence, got {getattr(self.regularizer, name)}"
                )
