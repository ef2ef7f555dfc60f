"""An operation as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from avatarl_env.episode import Episode
from avatarl_env.lm.protocols import Tokenizer

N_SHOWN = 3  # prompts


def render_ansi(episode: Episode, tokenizer: Tokenizer, labels: Sequence[str]) -> str:
    """Return prompts, texts before and after, score terms, scores and coefficients.

    Args:
        episode: the operation.
        tokenizer: turns tokens into text.
        labels: names of the coefficients, (A,).
    """
    n_prompt = episode.config.prompt_length
    lines = [f"step {episode.n_done} of {episode.config.episode_length}"]
    if episode.flatline:
        lines.append(f"flatline: {episode.flatline}")
    baseline, present = episode.baseline, episode.present
    pairs = zip(baseline.generations.tokens, present.generations.tokens, strict=True)
    for number, (before, after) in enumerate(islice(pairs, N_SHOWN), start=1):
        lines += [f"--- prompt {number}", tokenizer.decode(before[:n_prompt])]
        lines += ["--- before", tokenizer.decode(before[n_prompt:])]
        lines += ["--- after", tokenizer.decode(after[n_prompt:])]
    lines.append("--- score terms: before -> after")
    for name, value in baseline.terms.items():
        lines.append(f"{name:>14} {value:9.4f} -> {present.terms[name]:9.4f}")
    lines.append("--- score: baseline, then after each step")
    lines.append(" ".join(f"{score:9.4f}" for score in episode.scores))
    lines.append(f"--- coefficients; return so far {episode.total_reward:+.4f}")
    for label, value in zip(labels, episode.coefficients, strict=True):
        lines.append(f"{label:>36} {value:+.3f} {_bar(value)}")
    return "\n".join(lines) + "\n"


def _bar(value: float, half: int = 10) -> str:
    """Draw a number in [-1, 1] as a bar that grows from the middle."""
    filled = round(abs(value) * half)
    left = "#" * filled if value < 0 else ""
    right = "#" * filled if value > 0 else ""
    return f"{left:>{half}}|{right:<{half}}"
