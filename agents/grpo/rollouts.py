"""Sampling of characters at every position of real text, or of texts after real prompts.

Shapes: B windows or prompts of this process, T context, N = B T positions, K samples in each
group, P prompt characters, H characters of an episode, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.distributed import Ranks
from agents.grpo.config import PRECISIONS, GRPOConfig
from agents.grpo.estimators import SAMPLED
from agents.grpo.losses import EMPTY, Batch, imitation_reward, kl_divergence, matching_prefix
from avatarl_env.lm.cuda_graphs import GraphedGeneration
from avatarl_env.lm.generation import Generation, generate, inverse_cdf
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.head_reader import eval_mode
from avatarl_env.text.ngram import NGramReference

MAX_PROMPT = 32  # characters; enough for a speaker and the metre
TRAINING_COST = 3  # a forward with its backward costs about as much as three forwards

Operated = AbstractContextManager[object] | None


class Texts(NamedTuple):
    """Texts written by a model, and their rewards."""

    tokens: Tensor
    """(B K, P + H) prompts and texts, K rows for each prompt."""
    log_probs: Tensor
    """(B, K, H) of the written characters, under that model."""
    rewards: Tensor
    """(B, K)."""
    matched: Tensor
    """(B, K) share of leading characters that equal the real text."""


class Sample(NamedTuple):
    """A batch, and its reported figures (scalars)."""

    batch: Batch
    reward: Tensor
    """Mean p(y); of texts the mean reward before clipping."""
    accuracy: Tensor
    """Share of positions where the most probable character is right; of texts mean `matched`."""
    behavior_kl: Tensor
    """KL(behaviour policy || policy), nats per character."""


def prompt_length(context: int, horizon: int) -> int:
    """Return P for a model of this context: up to 32, and less if H leaves no room.

    Raises:
        ValueError: if H leaves no room at all.
    """
    if not horizon < context:
        raise ValueError(f"horizon must be less than the context, {context}, got {horizon}")
    return min(MAX_PROMPT, context - horizon)


def roll_out(
    model: GPT,
    windows: Tensor,
    uniforms: Tensor,
    reference: NGramReference,
    *,
    temperature: float,
    match_bonus: float,
    write: Callable[..., Generation] = generate,
) -> Texts:
    """Let a model continue every prompt K times, and compute the reward of each text.

    `r = mean_t (log q(a_t) - log p(a_t)) + match_bonus * (leading characters that are right) / H`
    with q the reference. The mean of the first part over the model's own texts is minus its KL
    divergence from the reference; the second asks for the real continuation.

    Args:
        model: writes the texts.
        windows: (B, P + H) int64, real text: prompts and their continuations.
        uniforms: (B, K, H) in [0, 1), the sampling noise.
        reference: q.
        temperature: of the policy.
        match_bonus: at least 0.
        write: `generate` or an equivalent.
    """
    _, group_size, horizon = shape = uniforms.shape
    prompts = windows[:, :-horizon].repeat_interleave(group_size, 0)  # (B K, P)
    with eval_mode(model):
        written = write(model, prompts, uniforms.flatten(0, 1), temperature=temperature)
    tokens, log_probs = written.tokens, written.log_probs.view(shape)
    expected = reference.target_log_probs(tokens.cpu().numpy(), first=tokens.size(1) - horizon)
    matched = matching_prefix(tokens[:, -horizon:].view(shape), windows[:, -horizon:])
    rewards = imitation_reward(log_probs, torch.from_numpy(expected).to(log_probs).view(shape))
    return Texts(tokens, log_probs, rewards + match_bonus * matched, matched)


class Sampler:
    """Draws batches of the training text and samples from the behaviour policy.

    The behaviour policy is the model itself, an older copy of it (`sync_every` above 1), or the
    model under an operation.
    """

    def __init__(
        self,
        model: GPT,
        tokens: NDArray[np.int64],
        config: GRPOConfig,
        rng: np.random.Generator,
        ranks: Ranks,
    ) -> None:
        """Count n-grams if rewards or regularizer need them; see `GRPOLearner` for arguments."""
        if len(tokens) <= model.context:
            raise ValueError(
                f"context must be less than {len(tokens)} (train), got {model.context}"
            )
        if config.batch_size % ranks.count:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {ranks.count}, "
                f"got {config.batch_size}"
            )
        self.rng = rng
        self.old: GPT | None = copy.deepcopy(model) if config.sync_every > 1 else None
        """The old policy, if there is one."""
        self.forward_tokens = 0
        """Compute of all processes so far: 1 per token of a forward, 3 if a backward follows."""
        self._model = model
        self._tokens = tokens
        self._config = config
        self._ranks = ranks
        self._write = GraphedGeneration()
        self._reference: NGramReference | None = None
        self._n_prompt = 0
        if config.horizon > 1:
            self._n_prompt = prompt_length(model.context, config.horizon)
            self._reference = NGramReference.fit(tokens, model.vocab_size)
        self._bigrams = EMPTY
        if config.regularizer.kl_coefficient or config.regularizer.partial_credit:
            self._bigrams = bigram_log_probs(tokens, model.vocab_size)

    def sample(self, operated: Operated) -> Sample:
        """Draw a batch and sample its episodes.

        Args:
            operated: a context in which the model is operated on, to sample from it; None to
                sample from the old policy or the model itself.
        """
        return self._positions(operated) if self._config.horizon == 1 else self._texts(operated)

    def sync(self) -> None:
        """Copy the model to the old policy, if there is one."""
        if self.old is not None:
            self.old.load_state_dict(self._model.state_dict())

    def _positions(self, operated: Operated) -> Sample:
        """Sample at every position of B windows, each an episode of one character."""
        windows = self._windows(self._model.context + 1)
        inputs, targets = windows[:, :-1], windows[:, 1:].flatten()  # (B, T), (N,)
        # Before the forward with gradient, whose graph a theater opened later would invalidate.
        behavior = self._behavior(inputs, operated)
        policy = self._log_probs(self._model, inputs)  # (N, V)
        self._count(TRAINING_COST * targets.numel())
        batch = Batch(self._config, policy, targets=targets)
        if len(self._bigrams):
            self._bigrams = self._bigrams.to(policy.device)
            batch = batch._replace(bigrams=self._bigrams[inputs.flatten()])
        if self._config.exploration == SAMPLED:
            sampler = policy.detach() if behavior is None else behavior
            n_all = len(policy) * self._ranks.count
            actions = inverse_cdf(sampler, self._uniforms(n_all, self._config.group_size))
            batch = batch._replace(
                actions=actions,  # (N, K)
                log_probs=policy.gather(1, actions)[:, :, None],  # (N, K, 1)
                behavior_log_probs=sampler.gather(1, actions)[:, :, None],
            )
        with torch.no_grad():
            right = policy.gather(1, targets[:, None]).exp().mean()
            accuracy = (policy.argmax(1) == targets).float().mean()
            distance = policy.new_zeros(()) if behavior is None else kl_divergence(behavior, policy)
        return Sample(batch, right, accuracy, distance)

    def _texts(self, operated: Operated) -> Sample:
        """Sample K texts after each of B prompts; compute their log-probabilities."""
        config, horizon = self._config, self._config.horizon
        assert self._reference is not None
        windows = self._windows(self._n_prompt + horizon)
        uniforms = self._uniforms(config.batch_size, config.group_size, horizon)
        with operated or nullcontext():
            texts = roll_out(
                self._model if self.old is None or operated is not None else self.old,
                windows,
                uniforms,
                self._reference,
                temperature=config.temperature,
                match_bonus=config.match_bonus,
                write=self._write,
            )
        tokens, behavior = texts.tokens, texts.log_probs
        self._count((1 + TRAINING_COST) * tokens[:, 1:].numel())  # written once, learned from once
        policy = self._log_probs(self._model, tokens[:, :-1])
        policy = policy.view(len(tokens), -1, policy.size(1))[:, -horizon:]  # (B K, H, V)
        taken = policy.gather(2, tokens[:, -horizon:, None])[:, :, 0].view(behavior.shape)
        if self.old is None and operated is None:
            # Not the log-probabilities of the cached forward, which rounds differently: ratios
            # are exactly 1.
            behavior = taken.detach()
        batch = Batch(config, policy, log_probs=taken, behavior_log_probs=behavior)
        batch = batch._replace(rewards=texts.rewards)
        distance = (behavior - taken.detach()).mean()
        return Sample(batch, texts.rewards.mean(), texts.matched.mean(), distance)

    def _behavior(self, inputs: Tensor, operated: Operated) -> Tensor | None:
        """Return the behaviour policy's log-probabilities (N, V); None for the policy itself."""
        if operated is None and self.old is None:
            return None
        self._count(inputs.numel())
        writer = self._model if self.old is None or operated is not None else self.old
        with torch.no_grad(), operated or nullcontext():
            return self._log_probs(writer, inputs)

    def _log_probs(self, model: GPT, inputs: Tensor) -> Tensor:
        """Return a model's log-probabilities (N, V) at every position of inputs (B, T)."""
        dtype = PRECISIONS[self._config.precision]
        with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(inputs).float()  # (B, T, V)
        return torch.log_softmax(logits / self._config.temperature, dim=-1).flatten(0, 1)

    def _windows(self, length: int) -> Tensor:
        """Draw windows of the training text; return this process's share: (B, length).

        Every process draws the whole batch, so that generators advance as in a single process.
        """
        starts = self.rng.integers(0, len(self._tokens) - length + 1, self._config.batch_size)
        starts = self._ranks.shard(starts)
        windows = self._tokens[starts[:, None] + np.arange(length)]
        return torch.from_numpy(windows).to(self._model.embed.weight.device)

    def _uniforms(self, *shape: int) -> Tensor:
        """Draw uniforms for all processes; return this process's rows."""
        uniforms = self._ranks.shard(self.rng.random(shape, dtype=np.float32))
        return torch.from_numpy(uniforms).to(self._model.embed.weight.device)

    def _count(self, n_tokens: int) -> None:
        """Add tokens of a forward, and as many for every other process."""
        self.forward_tokens += n_tokens * self._ranks.count


def bigram_log_probs(tokens: NDArray[np.int64], vocab_size: int) -> Tensor:
    """Return log q(next | last) of a text's bigrams, interpolated Witten-Bell: (V, V)."""
    pairs = np.stack([np.arange(vocab_size)] * 2, axis=1)  # only the first of each pair is read
    bigrams = NGramReference.fit(tokens, vocab_size, 2).next_log_probs(pairs, first=1)
    return torch.from_numpy(bigrams[:, 0])
