from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.grpo import rollouts as rollouts_module
from agents.grpo.rollouts import Rollouts, prompt_length, roll_out
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.text.ngram import NGramReference
from tests.fakes import fingerprint, tiny_gpt
from tests.patients import global_random_states

B, K, P, H = 2, 3, 5, 4


class Halving:
    """A reference that finds token a likely to degree 2^-(a + 1), whatever stands before it."""

    def target_log_probs(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        return -(tokens[:, first:] + 1.0) * math.log(2)


def uniform_gpt() -> GPT:
    """Return a model to which all 16 tokens are equally likely: u means token floor(16 u)."""
    model = tiny_gpt()
    with torch.no_grad():
        model.embed.weight.zero_()
    return model


def dice(tokens: list[Any]) -> Tensor:
    return (torch.tensor(tokens) + 0.5) / 16


def write(model: GPT, windows: Tensor, uniforms: Tensor, **changes: Any) -> Rollouts:
    options = {"temperature": 1.0, "match_bonus": 1.0, **changes}
    reference = options.pop("reference", Halving())
    return roll_out(model, windows, uniforms, reference, **options)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return windows (B, P + H) and uniforms (B, K, H)."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(16, (B, P + H), generator=generator)
    return windows, torch.rand(B, K, H, generator=generator)


def test_rewards_by_hand() -> None:
    windows = torch.tensor([[9, 9, 0, 1, 2], [8, 8, 3, 3, 3]])  # two tokens of prompt
    written = [
        [[0, 1, 2], [0, 1, 5], [7, 1, 2]],
        [[0, 0, 0], [3, 0, 3], [15, 15, 15]],
    ]
    rollouts = write(uniform_gpt(), windows, dice(written), match_bonus=0.5)
    assert rollouts.tokens.view(2, 3, 5)[:, :, 2:].tolist() == written
    matched = torch.tensor([[1.0, 2 / 3, 0.0], [0.0, 1 / 3, 0.0]])
    torch.testing.assert_close(rollouts.matched, matched)
    # log q - log p = (4 - (a + 1)) log 2, on average over three tokens
    imitation = torch.tensor([[2.0, 1.0, -1 / 3], [3.0, 1.0, -12.0]]) * math.log(2)
    torch.testing.assert_close(rollouts.rewards, imitation + 0.5 * matched)
    sixteenth = torch.full((2, 3, 3), -math.log(16))
    torch.testing.assert_close(rollouts.behavior_log_probs, sixteenth)


def test_without_the_bonus_what_the_text_says_does_not_matter() -> None:
    windows, uniforms = drawn()
    other = windows.clone()
    other[:, P:] = (other[:, P:] + 1) % 16
    model = tiny_gpt()
    left, right = (write(model, w, uniforms, match_bonus=0.0) for w in (windows, other))
    assert torch.equal(left.rewards, right.rewards)
    assert not torch.equal(write(model, windows, dice([[[0] * H] * K] * B)).rewards, left.rewards)


def test_the_texts_of_a_prompt_share_it() -> None:
    windows, uniforms = drawn()
    rollouts = write(tiny_gpt(), windows, uniforms)
    assert rollouts.tokens.shape == (B * K, P + H)
    by_prompt = rollouts.tokens.view(B, K, P + H)
    assert torch.equal(by_prompt[:, :, :P], windows[:, None, :P].expand(B, K, P))
    assert rollouts.rewards.shape == rollouts.matched.shape == (B, K)
    assert len({tuple(text) for text in by_prompt[0, :, P:].tolist()}) == K  # each its own dice


def test_what_a_text_earns_is_the_same_in_a_batch_and_alone() -> None:
    windows, uniforms = drawn()
    model = tiny_gpt()
    together = write(model, windows, uniforms)
    for b in range(B):
        alone = write(model, windows[b : b + 1], uniforms[b : b + 1])
        assert torch.equal(alone.tokens, together.tokens.view(B, K, -1)[b])
        torch.testing.assert_close(alone.rewards[0], together.rewards[b])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_cached_writing_is_the_naive_one_and_has_the_tempered_policys_log_probs(
    temperature: float,
) -> None:
    windows, uniforms = drawn()
    model = tiny_gpt()
    rollouts = write(model, windows, uniforms, temperature=temperature)
    prompts = windows[:, :P].repeat_interleave(K, 0)
    naive = generate(
        model, prompts, uniforms.flatten(0, 1), temperature=temperature, use_cache=False
    )
    assert torch.equal(rollouts.tokens, naive.tokens)
    with torch.no_grad():
        logits = model(rollouts.tokens[:, :-1])[:, -H:]
    expected = (logits / temperature).log_softmax(-1).gather(2, rollouts.tokens[:, -H:, None])
    torch.testing.assert_close(
        rollouts.behavior_log_probs, expected.view(B, K, H), rtol=0, atol=1e-5
    )


def test_the_reference_reads_prompt_and_text_and_scores_the_text() -> None:
    rng = np.random.default_rng(0)
    reference = NGramReference.fit(rng.integers(0, 16, 500), 16)
    windows, uniforms = drawn()
    rollouts = write(tiny_gpt(), windows, uniforms, reference=reference, match_bonus=0.0)
    all_of_it = reference.target_log_probs(rollouts.tokens.numpy())[:, P:]
    expected = torch.from_numpy(all_of_it).view(B, K, H) - rollouts.behavior_log_probs
    torch.testing.assert_close(rollouts.rewards, expected.mean(2))


def test_writing_leaves_the_model_its_mode_and_everybodys_dice_alone() -> None:
    windows, uniforms = drawn()
    before = global_random_states()
    for training in (True, False):
        model = tiny_gpt().train(training)
        weights = fingerprint(model)
        rollouts = write(model, windows, uniforms)
        assert not any(part.requires_grad for part in rollouts)
        assert model.training is training
        assert fingerprint(model) == weights
        assert all(p.grad is None for p in model.parameters())
    assert global_random_states() == before


def test_the_length_of_a_prompt_is_what_the_horizon_leaves_and_32_at_most() -> None:
    assert rollouts_module.MOST_PROMPT == 32
    assert prompt_length(128, 16) == 32
    assert prompt_length(64, 32) == 32
    assert prompt_length(64, 33) == 31
    assert prompt_length(16, 15) == 1


@pytest.mark.parametrize("horizon", [16, 17])
def test_a_horizon_that_leaves_no_room_is_refused(horizon: int) -> None:
    message = rf"^horizon must be less than the context, 16, got {horizon}$"
    with pytest.raises(ValueError, match=message):
        prompt_length(16, horizon)
