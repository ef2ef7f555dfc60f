"""Weight surgery on any torch model: edit attention weights in place, restore them bit for bit.

The theater works on any torch module; targets and operators work on causal language models, ours
and those of transformers; the overlay performs many operations in one forward. Nothing here depends
on text, rewards or Gymnasium.
"""

from avatarl_env.surgery.layouts import LAYOUTS, Layout
from avatarl_env.surgery.operators import OPERATORS, make_operator
from avatarl_env.surgery.operators.base import Operator
from avatarl_env.surgery.operators.head_gain import HeadGain
from avatarl_env.surgery.operators.low_rank import LowRankSeed
from avatarl_env.surgery.operators.spectral import LayerTruncation, SeedRankOne, SpectralBands
from avatarl_env.surgery.operators.temperature import OutputTemperature
from avatarl_env.surgery.overlay import Overlay, Overlayable, RowEdit
from avatarl_env.surgery.projections import AttentionTarget, Projection
from avatarl_env.surgery.targets import Targets, find_targets
from avatarl_env.surgery.theater import SurgicalTheater

__all__ = [
    "LAYOUTS",
    "OPERATORS",
    "AttentionTarget",
    "HeadGain",
    "LayerTruncation",
    "Layout",
    "LowRankSeed",
    "Operator",
    "OutputTemperature",
    "Overlay",
    "Overlayable",
    "Projection",
    "RowEdit",
    "SeedRankOne",
    "SpectralBands",
    "SurgicalTheater",
    "Targets",
    "find_targets",
    "make_operator",
]
