"""An operation as text (`ansi`) or as a picture (`rgb_array`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from avatarl_env.episode import Episode
from avatarl_env.lm.protocols import Tokenizer
from avatarl_env.rendering.ansi import render_ansi

RENDER_MODES = ("ansi", "rgb_array")


def render(
    mode: str, episode: Episode, tokenizer: Tokenizer, labels: Sequence[str]
) -> str | NDArray[np.uint8]:
    """Return an operation as a string, or as a picture (400, 600, 3).

    Args:
        mode: one of `RENDER_MODES`.
        episode: the operation.
        tokenizer: turns tokens into text.
        labels: names of the coefficients, (A,).
    """
    if mode == "ansi":
        return render_ansi(episode, tokenizer, labels)
    from avatarl_env.rendering.rgb_array import draw

    return draw(episode, labels)
