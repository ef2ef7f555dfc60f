"""Operators: coefficients in, weight edits out.

Coefficients are a vector c of A numbers, nominally in [-1, 1], 0 meaning "untouched". Every
operator writes ``factor(c) * W`` or ``W + delta(c)`` with W the *unoperated* weights, so applying
one twice is applying it once, and is the exact identity, bit for bit, at c = 0.

Shapes: A coefficients, L layers, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from avatarl_env.choices import check_choice
from avatarl_env.surgery.targets import AttentionTarget
from avatarl_env.surgery.theater import SurgicalTheater


class Operator(Protocol):
    """What the environment needs of an operator."""

    @property
    def labels(self) -> tuple[str, ...]:
        """One name for each coefficient; their number is A."""

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that ``coefficients`` (A,) stand for."""


class HeadGain:
    """Per head a log-sharpness (minus a log-temperature) and a log-value-gain.

    ``gain = exp(scale * c)``. The first scales the head's query rows (and their bias), hence its
    attention logits: positive is sharper. The second scales the columns of the output projection
    that read the head: positive is louder. A key's gain would repeat the first and a value's the
    second, so these two are all there is to choose (SVF, arXiv 2501.06252, scales singular values
    in the same spirit).
    """

    def __init__(
        self, targets: Sequence[AttentionTarget], *, tied: bool = True, scale: float = 1.0
    ) -> None:
        """Choose the coefficients.

        Args:
            targets: the layers to operate on.
            tied: one pair per head for all layers (A = 2H: H temperatures, then H gains) or a
                pair per layer and head (A = 2HL, layer by layer in the same order).
            scale: nats of gain at c = 1, > 0; 1.0 is a factor of e.

        Raises:
            ValueError: if there are no targets, layers differ in heads while tied, or the scale
                is not positive and finite.
        """
        heads = {target.n_heads for target in targets}
        if not heads or (tied and len(heads) > 1):
            raise ValueError(f"targets must agree in the number of heads, got {sorted(heads)}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.targets = tuple(targets)
        self.tied = tied
        self.scale = scale
        layers = ["all"] if tied else [str(target.layer) for target in targets]
        counts = [targets[0].n_heads] if tied else [target.n_heads for target in targets]
        self._labels = tuple(
            f"{kind} layer {layer} head {head}"
            for layer, count in zip(layers, counts, strict=True)
            for kind in ("log-sharpness", "log-value-gain")
            for head in range(count)
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """One name for each coefficient; their number is A."""
        return self._labels

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that ``coefficients`` (A,) stand for.

        Raises:
            ValueError: if the coefficients have another shape or are not finite.
        """
        gains = (self.scale * as_coefficients(coefficients, len(self.labels))).exp()
        start = 0
        for target in self.targets:
            n_heads = target.n_heads
            pair = gains if self.tied else gains[start : start + 2 * n_heads]
            start += 2 * n_heads
            _scale_queries(theater, target, pair[:n_heads])
            weight = target.output.weight
            factor = _per_channel(pair[n_heads:], target, weight)
            theater.write(weight, theater.original(weight) * factor)


OPERATORS: dict[str, Callable[..., Operator]] = {"head_gain": HeadGain}
"""Operators by name; add one with ``OPERATORS["mine"] = make_mine``."""


def make_operator(name: str, targets: Sequence[AttentionTarget], **options: object) -> Operator:
    """Build the operator called ``name`` on ``targets``.

    Raises:
        ValueError: if there is no such operator; names the closest.
    """
    check_choice("operator", name, OPERATORS)
    return OPERATORS[name](targets, **options)


def as_coefficients(coefficients: ArrayLike, count: int) -> Tensor:
    """Return the coefficients as float64 (A,), checked.

    Raises:
        ValueError: if the shape is not (A,) or a number is not finite.
    """
    array = np.asarray(coefficients, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"coefficients must have shape ({count},), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"coefficients must be finite, got {array.tolist()}")
    return torch.from_numpy(array.copy())


def _per_channel(gains: Tensor, target: AttentionTarget, like: Tensor) -> Tensor:
    """Repeat per-head gains (H,) over the head's channels: (H * D,), in the weight's dtype."""
    return gains.repeat_interleave(target.head_dim).to(like)


def _scale_queries(theater: SurgicalTheater, target: AttentionTarget, gains: Tensor) -> None:
    weight, bias = target.query.weight, target.query.bias
    factor = torch.ones(weight.size(0), dtype=weight.dtype, device=weight.device)
    factor[: target.query_rows] = _per_channel(gains, target, weight)
    theater.write(weight, theater.original(weight) * factor[:, None])
    if bias is not None:
        theater.write(bias, theater.original(bias) * factor)
