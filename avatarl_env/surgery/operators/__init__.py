"""Operators: coefficients in, weight edits out. Add one as a class in a file and a row here."""

from __future__ import annotations

from collections.abc import Callable

from avatarl_env.errors import check_choice
from avatarl_env.surgery.operators.base import Operator
from avatarl_env.surgery.operators.head_gain import HeadGain
from avatarl_env.surgery.operators.low_rank import LowRankSeed
from avatarl_env.surgery.operators.spectral import LayerTruncation, SeedRankOne, SpectralBands
from avatarl_env.surgery.operators.temperature import OutputTemperature
from avatarl_env.surgery.targets import Targets

OPERATORS: dict[str, Callable[..., Operator]] = {
    "head_gain": HeadGain,
    "spectral_bands": SpectralBands,
    "low_rank_seed": LowRankSeed,
    "layer_truncation": LayerTruncation,
    "seed_rank_one": SeedRankOne,
    "output_temperature": OutputTemperature,
}
"""Operators by name, made from `Targets`; add one with `OPERATORS["mine"] = Mine`."""


def make_operator(name: str, targets: Targets, **options: object) -> Operator:
    """Build the operator called `name` on `targets`.

    Raises:
        ValueError: if there is no such operator; names the closest.
    """
    check_choice("operator", name, OPERATORS)
    return OPERATORS[name](targets, **options)
