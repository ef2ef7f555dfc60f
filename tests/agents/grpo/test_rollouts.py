"""Tests of agents/grpo/rollouts.py: texts and what they earn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.grpo.rollouts import Texts, bigram_log_probs, prompt_length, roll_out
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.text.ngram import NGramReference
from tests.fakes import fingerprint, tiny_gpt

B, K, P, H = 2, 3, 5, 4


class Halving:
    """A reference in which token a has the probability 2^-(a + 1), whatever comes before it."""

    def target_log_probs(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        return -(tokens[:, first:] + 1.0) * math.log(2)


def roll(model: GPT, windows: Tensor, uniforms: Tensor, **changes: Any) -> Texts:
    options = {"temperature": 1.0, "match_bonus": 1.0, **changes}
    return roll_out(model, windows, uniforms, options.pop("reference", Halving()), **options)


def drawn() -> tuple[Tensor, Tensor]:
    """Return windows (B, P + H) and uniforms (B, K, H)."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(16, (B, P + H), generator=generator)
    return windows, torch.rand(B, K, H, generator=generator)


def test_rewards_by_hand() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.embed.weight.zero_()  # all 16 tokens are equally likely: u means token floor(16 u)
    windows = torch.tensor([[9, 9, 0, 1, 2], [8, 8, 3, 3, 3]])  # two tokens of prompt
    written = [[[0, 1, 2], [0, 1, 5], [7, 1, 2]], [[0, 0, 0], [3, 0, 3], [15, 15, 15]]]
    texts = roll(model, windows, (torch.tensor(written) + 0.5) / 16, match_bonus=0.5)
    by_prompt = texts.tokens.view(2, 3, 5)
    assert by_prompt[:, :, 2:].tolist() == written
    assert torch.equal(by_prompt[:, :, :2], windows[:, None, :2].expand(2, 3, 2))
    matched = torch.tensor([[1.0, 2 / 3, 0.0], [0.0, 1 / 3, 0.0]])
    torch.testing.assert_close(texts.matched, matched)
    # log q - log p = (4 - (a + 1)) log 2, the mean over three tokens
    imitation = torch.tensor([[2.0, 1.0, -1 / 3], [3.0, 1.0, -12.0]]) * math.log(2)
    torch.testing.assert_close(texts.rewards, imitation + 0.5 * matched)
    torch.testing.assert_close(texts.log_probs, torch.full((2, 3, 3), -math.log(16)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_tempered_policy(temperature: float) -> None:
    windows, uniforms = drawn()
    model = tiny_gpt()
    texts = roll(model, windows, uniforms, temperature=temperature)
    prompts, noise = windows[:, :P].repeat_interleave(K, 0), uniforms.flatten(0, 1)
    naive = generate(model, prompts, noise, temperature=temperature, use_cache=False)
    assert torch.equal(texts.tokens, naive.tokens)
    with torch.no_grad():
        logits = model(texts.tokens[:, :-1])[:, -H:]
    expected = (logits / temperature).log_softmax(-1).gather(2, texts.tokens[:, -H:, None])
    torch.testing.assert_close(texts.log_probs, expected.view(B, K, H), rtol=0, atol=1e-5)


def test_the_reference_reads_the_prompt_and_scores_the_text() -> None:
    reference = NGramReference.fit(np.random.default_rng(0).integers(0, 16, 500), 16)
    windows, uniforms = drawn()
    texts = roll(tiny_gpt(), windows, uniforms, reference=reference, match_bonus=0.0)
    expected = torch.from_numpy(reference.target_log_probs(texts.tokens.numpy())[:, P:])
    gains = expected.view(B, K, H) - texts.log_probs
    torch.testing.assert_close(texts.rewards, gains.mean(2))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = tiny_gpt().train(training)
    weights = fingerprint(model)
    texts = roll(model, *drawn())
    assert not any(part.requires_grad for part in texts)
    assert model.training is training
    assert fingerprint(model) == weights


def test_the_prompt_has_the_length_that_the_horizon_leaves_and_at_most_32() -> None:
    lengths = {(128, 16): 32, (64, 32): 32, (64, 33): 31, (16, 15): 1}
    assert {sizes: prompt_length(*sizes) for sizes in lengths} == lengths
    for horizon in (16, 17):
        with pytest.raises(ValueError, match=f"^horizon must be less .*, 16, got {horizon}$"):
            prompt_length(16, horizon)


def test_bigrams_are_those_of_the_text() -> None:
    tokens = np.arange(300) % 3
    found = bigram_log_probs(tokens, 4).exp()
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    for token in range(3):
        assert found[token, (token + 1) % 3] > 0.95
