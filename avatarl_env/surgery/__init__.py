"""Weight surgery on any torch model: edit attention weights in place, get them back bit for bit.

Nothing here knows of text, rewards or Gymnasium. The theater works on any torch module.
"""

from avatarl_env.surgery.operators import HeadGain, Operator, make_operator
from avatarl_env.surgery.targets import AttentionTarget, find_targets
from avatarl_env.surgery.theater import SurgicalTheater

__all__ = [
    "AttentionTarget",
    "HeadGain",
    "Operator",
    "SurgicalTheater",
    "find_targets",
    "make_operator",
]
