"""Free-running episodes: texts that the model writes by itself after real prompts.

Shapes: B prompts, K texts for each, P prompt characters, H written ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.grpo.rewards import imitation_reward, matching_prefix
from avatarl_env.lm.generation import Generation, generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.head_reader import eval_mode
from avatarl_env.text.ngram import NGramReference

MOST_PROMPT = 32  # characters of real text before a rollout: enough for the speaker and the verse


class Rollouts(NamedTuple):
    """What was written, by whom, and what it earned."""

    tokens: Tensor
    """(B * K, P + H) prompts and texts, K rows for each prompt."""
    behavior_log_probs: Tensor
    """(B, K, H) of what was written, under who wrote it."""
    rewards: Tensor
    """(B, K)."""
    matched: Tensor
    """(B, K) share of leading characters that are those of the real text."""


def prompt_length(context: int, horizon: int) -> int:
    """Return P for a model of this context: up to 32, and less where H leaves no room.

    Raises:
        ValueError: if there is none left.
    """
    if not horizon < context:
        raise ValueError(f"horizon must be less than the context, {context}, got {horizon}")
    return min(MOST_PROMPT, context - horizon)


def roll_out(
    model: GPT,
    windows: Tensor,
    uniforms: Tensor,
    reference: NGramReference,
    *,
    temperature: float,
    match_bonus: float,
    write: Callable[..., Generation] = generate,
) -> Rollouts:
    """Let a model continue every prompt K times, and reward what it writes.

    `r = mean_t (log q(a_t) - log p(a_t)) + match_bonus * (leading characters that are right) / H`
    with q the reference: its first part is minus the KL divergence from it, on the model's own
    texts, the second says that this very continuation was asked for.

    Args:
        model: writes, as it stands.
        windows: (B, P + H) real text: prompts, and how they go on.
        uniforms: (B, K, H) in [0, 1).
        reference: q.
        temperature: of the policy.
        match_bonus: at least 0.
        write: how; `generate`, or what does the same.
    """
    n_prompts, group_size, horizon = uniforms.size()
    real = windows[:, -horizon:]
    prompts = windows[:, :-horizon].repeat_interleave(group_size, 0)
    with eval_mode(model):
        written = write(model, prompts, uniforms.flatten(0, 1), temperature=temperature)
    shape = (n_prompts, group_size, horizon)
    log_probs = written.log_probs.view(shape)
    expected = _reference_log_probs(reference, written.tokens.cpu().numpy(), horizon)
    matched = matching_prefix(written.tokens[:, -horizon:].view(shape), real)
    rewards = imitation_reward(log_probs, torch.from_numpy(expected).to(log_probs).view(shape))
    return Rollouts(written.tokens, log_probs, rewards + match_bonus * matched, matched)


def _reference_log_probs(
    reference: NGramReference, tokens: NDArray[np.int64], horizon: int
) -> NDArray[np.float32]:
    return reference.target_log_probs(tokens, first=tokens.shape[1] - horizon)
