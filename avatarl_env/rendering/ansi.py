"""The operation for people to look at: as text, or as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from avatarl_env.episode import Episode
from avatarl_env.lm.protocols import Tokenizer

RENDER_MODES = ("ansi", "rgb_array")
N_SHOWN = 3  # prompts


def render(
    mode: str, episode: Episode, tokenizer: Tokenizer, labels: Sequence[str]
) -> str | NDArray[np.uint8]:
    """Return the operation as a string (`ansi`) or a picture (`rgb_array`).

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


def render_ansi(episode: Episode, tokenizer: Tokenizer, labels: Sequence[str]) -> str:
    """Return prompts, texts before and after, score terms, scores and coefficients.

    Args:
        episode: the operation.
        tokenizer: turns tokens into text.
        labels: names of the coefficients, (A,).
    """
    config = episode.config
    lines = [f"step {episode.n_done} of {config.episode_length}"]
    if episode.flatline:
        lines.append(f"flatline: {episode.flatline}")
    pairs = zip(
        episode.baseline.generations.tokens, episode.present.generations.tokens, strict=True
    )
    for number, (before, after) in enumerate(pairs):
        if number == N_SHOWN:
            break
        lines += [
            f"--- prompt {number + 1}",
            tokenizer.decode(before[: config.prompt_length]),
            "--- before",
            _new_text(before, config.prompt_length, tokenizer),
            "--- after",
            _new_text(after, config.prompt_length, tokenizer),
        ]
    lines.append("--- score terms: before -> after")
    for name, before_value in episode.baseline.terms.items():
        lines.append(f"{name:>14} {before_value:9.4f} -> {episode.present.terms[name]:9.4f}")
    lines.append("--- score: baseline, then after each step")
    lines.append(" ".join(f"{score:9.4f}" for score in episode.scores))
    lines.append(f"--- coefficients; return so far {episode.total_reward:+.4f}")
    for label, value in zip(labels, episode.coefficients, strict=True):
        lines.append(f"{label:>36} {value:+.3f} {_bar(value)}")
    return "\n".join(lines) + "\n"


def _new_text(tokens: NDArray[np.int64], n_prompt: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokens[n_prompt:])


def _bar(value: float, half: int = 10) -> str:
    """Draw a number in [-1, 1] as a bar that grows from the middle."""
    filled = round(abs(value) * half)
    left = "#" * filled if value < 0 else ""
    right = "#" * filled if value > 0 else ""
    return f"{left:>{half}}|{right:<{half}}"
