"""Settings for training the language model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch

from agents.grpo.estimators import ALL_ACTIONS, ESTIMATORS, OPTIONAL, SAMPLED
from agents.grpo.optimizer import MUON, OPTIMIZERS
from avatarl_env.errors import check_choice, shown

TEMPERATURES = (1e-6, 1e6)  # beyond these, softmax in float32 is one-hot or uniform
MAX_GROUP_SIZE = 65_536
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HORIZON_1_ONLY = ("partial_credit", "kl_coefficient", "entropy_floor")
"""Settings that must be 0 at horizons above 1: they concern single characters, or would count the
KL to the reference twice, since a text's reward contains it."""


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """Additions to an estimator's loss or reward, off by default, and their weights and bounds.

    Raises:
        ValueError: if a value is negative or not finite.
    """

    entropy_bonus: float = 0.0
    """Weight of the policy's entropy."""
    entropy_floor: float = 0.0
    """Entropy, in nats, below which the loss rises by the missing nats."""
    kl_coefficient: float = 0.0
    """Weight of KL(policy || bigram model of the training text); with kl_target, its initial
    value."""
    kl_target: float = 0.0
    """KL, in nats, that the coefficient adapts to; 0 for a constant coefficient."""
    partial_credit: float = 0.0
    """Weight of a character's bigram probability, added to its reward for an exact match."""
    reward_clip: float = 0.0
    """Largest absolute reward, partial credit included; 0 for no limit."""
    confidence_power: float = 0.7
    """Exponent w of seed_exhaustive's weight min((V p)^w, confidence_clip)."""
    confidence_clip: float = 2.0
    """Upper bound of that weight."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in self.__dataclass_fields__:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if self.confidence_clip == 0:
            raise ValueError("confidence_clip must be positive, or nothing is learned, got 0.0")
        if self.kl_target and not self.kl_coefficient:
            raise ValueError(
                f"kl_coefficient must be positive if kl_target is, got {self.kl_coefficient}"
            )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of the language model's learner.

    Raises:
        ValueError: if a value is unknown or out of range, or the combination is not supported.
    """

    estimator: str = "proper_maxrl"
    """A row of agents.grpo.estimators.ESTIMATORS: proper_maxrl, grpo, ..., or ce (a supervised
    control, not RL)."""
    exploration: str = SAMPLED
    """sampled (K characters per position) or all_actions (the limit without sampling noise)."""
    horizon: int = 1
    """H, characters per episode: 1 for an episode at every position of real text, more for texts
    that the model writes after real prompts."""
    group_size: int = 16
    """K, characters sampled per position, or texts per prompt."""
    batch_size: int = 8
    """B, windows of one context each, or prompts, per update."""
    temperature: float = 1.0
    """Temperature of the policy, in sampling and learning: softmax(logits / temperature)."""
    sync_every: int = 1
    """Updates between two copies of the policy to an old policy, which samples; 1 for no old
    policy."""
    clip: float = 0.2
    """Clip range of the ratio of new to old probability below 1; 3e-4 in gspo's paper."""
    clip_high: float = 0.28
    """Clip range above 1; 4e-4 in gspo's paper."""
    match_bonus: float = 1.0
    """Weight, in a text's reward, of the share of leading characters that are right."""
    optimizer: str = MUON
    """muon (for matrices; AdamW for the rest) or adamw (for everything)."""
    learning_rate: float = 6e-3
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.02
    """Peak learning rate of Muon."""
    warmup_updates: int = 30
    """Updates of linear warm-up, multiplied by a cosine from the peak down to a tenth of it."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    precision: str = "float32"
    """Precision of matrix products in the forward: float32, or bfloat16 by autocast."""
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    """Additions to the loss and the reward."""

    def __post_init__(self) -> None:
        _check_types(self)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        self._check_ranges()
        self._check_form()
        self._check_options()

    def check_off_policy(self, rule: str, value: object) -> None:
        """Refuse a setting that lets another policy sample, unless the estimator has ratios.

        Args:
            rule: start of the message, "ARGUMENT must be VALUE".
            value: of the argument.

        Raises:
            ValueError: if another policy cannot sample.
        """
        if "sync_every" not in ESTIMATORS[self.estimator].allows:
            raise ValueError(
                f"{rule} for {self.estimator}, which has no ratio to another policy, got {value}"
            )
        if self.horizon > 1 and self.precision != "float32":
            raise ValueError(
                f"{rule} for texts in {self.precision}: sampling is in float32, so ratios would "
                f"consist of rounding errors, got {value}"
            )

    def _check_ranges(self) -> None:
        positive = ("horizon", "batch_size", "temperature", "sync_every", "clip", "clip_high")
        for name in (*positive, "learning_rate", "matrix_learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("match_bonus", "warmup_updates", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        least, most = TEMPERATURES
        if not least <= self.temperature <= most:
            raise ValueError(
                f"temperature must be within {least:g} and {most:g}, got {self.temperature}"
            )
        if self.group_size > MAX_GROUP_SIZE:
            raise ValueError(f"group_size must be at most {MAX_GROUP_SIZE}, got {self.group_size}")

    def _check_form(self) -> None:
        """Check exploration, horizon and group size against the estimator's row."""
        name, row = self.estimator, ESTIMATORS[self.estimator]
        forms = {SAMPLED: row.sampled, ALL_ACTIONS: row.all_actions}
        possible = [form for form, function in forms.items() if function is not None]
        if self.exploration not in possible:
            raise ValueError(
                f"exploration must be {' or '.join(possible)} for {name}, got {self.exploration!r}"
            )
        least, most = row.horizons
        if not least <= self.horizon <= most:
            rule = f"{least}" if least == most else f"at least {least}"
            raise ValueError(f"horizon must be {rule} for {name}, got {self.horizon}")
        if row.sampled is None:
            return
        least = row.sampled.min_group_size
        if self.exploration == SAMPLED and self.group_size < least:
            raise ValueError(
                f"group_size must be at least {least} for {name}, got {self.group_size}"
            )
        order = row.max_order
        if self.exploration == ALL_ACTIONS and order and not least <= self.group_size <= order:
            raise ValueError(
                f"group_size must be within {least} and {order} for {name} over all actions, "
                f"got {self.group_size}"
            )

    def _check_options(self) -> None:
        """Refuse settings without an effect for this estimator and horizon."""
        if self.sync_every > 1:
            self.check_off_policy("sync_every must be 1", self.sync_every)
        allowed = ESTIMATORS[self.estimator].allows
        for part in fields(self.regularizer):
            value = getattr(self.regularizer, part.name)
            if part.name in OPTIONAL and part.name not in allowed and value != part.default:
                raise ValueError(
                    f"{part.name} must be {part.default} for {self.estimator}, which does not use "
                    f"it, got {value}"
                )
            if part.name in HORIZON_1_ONLY and self.horizon > 1 and value:
                raise ValueError(
                    f"{part.name} must be 0 for {self.estimator} at horizon {self.horizon}, "
                    f"got {value}"
                )


def _check_types(config: Any) -> None:
    """Check the types of numeric fields and of the regularizer."""
    kinds: dict[str, tuple[type, str]] = {
        "int": (Integral, "a whole number"),
        "float": (Real, "a number"),
        "RegularizerConfig": (RegularizerConfig, "a RegularizerConfig"),
    }
    for part in fields(config):
        kind, words = kinds.get(str(part.type), (object, ""))
        value = getattr(config, part.name)
        if words and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"{part.name} must be {words}, got {shown(value)}")
