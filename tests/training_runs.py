"""Small learners, surgeons and whole runs that several test files share."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file
from torch import Tensor

from agents.distributed import ALONE, Ranks
from agents.grpo.learner import GRPOConfig, GRPOLearner
from agents.surgeons.episodes import BoolArray, FloatArray
from agents.surgeons.registry import EpisodeRecord, Surgeon
from agents.training.config import TrainConfig
from agents.training.curriculum import CurriculumConfig
from agents.training.presets import ModelConfig
from agents.training.summary import RunSummary
from avatarl_env.episode import EpisodeConfig
from avatarl_env.lm.gpt import GPT
from avatarl_env.patient import Patient
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import tiny_patient, tiny_text, tiny_vector_env

QUICK_SAC: dict[str, Any] = {
    "learning_starts": 3,
    "gradient_steps": 2,
    "batch_size": 8,
    "policy_kwargs": {"net_arch": [8]},
}
"""Learns from the first operations on, little and fast, as every off-policy algorithm can."""

SmallRun = Callable[..., RunSummary]
"""The fixture `small_run`: trains, with these changes of `small_config`."""

CE: dict[str, Any] = {"estimator": "ce", "exploration": "all_actions"}


def make_learner(
    model: GPT,
    tokens: NDArray[np.int64],
    *,
    n_updates: int = 100,
    seed: int = 0,
    ranks: Ranks = ALONE,
    **recipe: Any,
) -> GRPOLearner:
    """Build a learner of small batches."""
    recipe = {"batch_size": 4, "warmup_updates": 5, **recipe}
    rng = np.random.default_rng(seed)
    config = GRPOConfig(**recipe)
    return GRPOLearner(model, tokens, config, n_updates=n_updates, rng=rng, ranks=ranks)


def fresh_model(vocab_size: int = 16, context: int = 16, seed: int = 0, width: int = 32) -> GPT:
    """Build an untrained GPT as the product does: from a generator, with its own scale."""
    sizes = ModelConfig(context=context, n_layers=2, n_heads=2, width=width)
    return GPT(sizes.with_vocabulary(vocab_size), torch.Generator().manual_seed(seed))


@functools.cache
def _taught_weights() -> dict[str, Tensor]:
    patient = tiny_patient()
    recipe = {"learning_rate": 5e-3, "optimizer": "adamw", **CE}
    learner = make_learner(patient.model, patient.splits["train"], n_updates=200, **recipe)
    for _ in range(200):
        learner.update()
    return patient.model.state_dict()


def taught_patient() -> Patient:
    """Return a tiny patient that has learned its text; each call gives another copy."""
    patient = tiny_patient()
    patient.model.load_state_dict(copy.deepcopy(_taught_weights()))
    return patient


def small_env(
    patient: Patient | None = None, n_rows: int = 2, **keywords: Any
) -> AttentionSurgeryVectorEnv:
    """Return an environment of two steps on `patient`, or on a new tiny one: fast."""
    sizes = {"episode_length": 2, "n_prompts": 4, "prompt_length": 8, "n_new": 5}
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}  # as surgeons practise
    return tiny_vector_env(n_rows, patient, **{**sizes, **mode, **keywords})


def small_eval_env(
    patient: Patient | None = None, n_rows: int = 2, **keywords: Any
) -> AttentionSurgeryVectorEnv:
    """Return such an environment for one operation on every row and no more."""
    return small_env(patient, n_rows, autoreset_mode=AutoresetMode.NEXT_STEP, **keywords)


def everything(learner: GRPOLearner) -> list[Tensor]:
    """Copy all parameters and the whole state of the optimizer, in a fixed order."""
    known = learner.get_state()["optimizer"]
    state = [
        entry
        for name, _ in learner.model.named_parameters()
        for entry in known.get(name, {}).values()
    ]
    return [tensor.detach().clone() for tensor in (*learner.model.parameters(), *state)]


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the last bit."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def first_actions(surgeon: Surgeon, observations: FloatArray) -> FloatArray:
    """Return what the surgeon does where every row's operation begins."""
    return surgeon.act(observations, np.ones(len(observations), dtype=np.bool_))


def episode_record(
    coefficients: ArrayLike, total: float, flatline: str | None = None
) -> EpisodeRecord:
    """Return a record of an operation with this end."""
    ending = np.asarray(coefficients, np.float64)
    return EpisodeRecord(total, 2, 0.5, ending, flatline, {"kl_ref": -2.0}, {"kl_ref": -3.0}, 0.0)


class ScriptedSurgeon(Surgeon):
    """Plays one and the same action for ever: a number, (A,) for every row, or (N, A)."""

    def __init__(self, env: AttentionSurgeryVectorEnv, action: ArrayLike = 0.0) -> None:
        super().__init__(env, 0)
        self.next_seed = 0
        self.action = np.asarray(action, np.float32)

    def act(self, observations: FloatArray, begins: BoolArray) -> FloatArray:
        return np.broadcast_to(self.action, (len(observations), self.n_coefficients))

    def save(self, folder: Path) -> None:
        (folder / "scripted.txt").write_text("scripted", encoding="utf-8")

    def load(self, folder: Path) -> None:
        assert (folder / "scripted.txt").read_text(encoding="utf-8") == "scripted"

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        assert not state


class ToyOperation(gymnasium.Env[FloatArray, FloatArray]):
    """Looks like an operation: pays `rewards` one after the other, whatever is done, and ends.

    `truncates` ends it the wrong way: as if time had run out of a task that goes on.
    """

    def __init__(self, *rewards: float, truncates: bool = False) -> None:
        self.observation_space = Box(-10.0, 10.0, (3,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.rewards = rewards
        self.truncates = truncates
        self.n_done = 0
        self.n_resets = 0
        self.flatline = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_done = 0
        self.n_resets += 1
        return np.zeros(3, np.float32), {}

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        reward = self.rewards[self.n_done]
        self.n_done += 1
        is_over = self.n_done == len(self.rewards)
        info: dict[str, Any] = {
            "coefficients": np.full(2, self.n_done / 10),
            "score_terms": {"kl_ref": -1.0 + self.n_done},
            "baseline_terms": {"kl_ref": -1.0},
            "flatline": self.flatline if is_over else "",
            "lost_score": 0.25,
        }
        observation = np.full(3, self.n_done, np.float32)
        return observation, reward, is_over and not self.truncates, is_over and self.truncates, info


class ToyOperations(SyncVectorEnv):
    """Toy operations side by side: row i is `envs[i]`, whose rewards may be set apart."""

    envs: list[ToyOperation]  # type: ignore[assignment]

    def __init__(self, *rewards: float, n_rows: int = 1, truncates: bool = False) -> None:
        makers = [functools.partial(ToyOperation, *rewards, truncates=truncates)] * n_rows
        super().__init__(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self.config = SimpleNamespace(episode_length=len(rewards))
        self.operator = SimpleNamespace(labels=("left", "right"))

    def get_state(self) -> dict[str, Any]:
        return {"rngs": [env._np_random for env in self.envs]}

    def get_rng_state(self) -> list[dict[str, Any]]:
        return [dict(env.np_random.bit_generator.state) for env in self.envs]

    def set_state(self, state: dict[str, Any]) -> None:
        for env, rng in zip(self.envs, state["rngs"], strict=True):
            env._np_random = rng


def small_curriculum(**changes: Any) -> CurriculumConfig:
    """Return a curriculum of ten updates and four rounds of operations."""
    sizes: dict[str, Any] = {
        "bootstrap_updates": 6,
        "surgery_rounds": 2,
        "joint_rounds": 2,
        "updates_per_round": 2,
        "n_rows": 3,
        "operations_per_round": 2,
        "paired_prompts": 4,
        "evaluate_every": 4,
        "effect_operations": 2,
        "effect_prompts": 8,
        "sample_length": 24,
    }
    return CurriculumConfig(**{**sizes, **changes})


def small_config(corpus: Path | str, out: Path | str | None = None, **changes: Any) -> TrainConfig:
    """Return a configuration of which a whole run takes seconds."""
    parts: dict[str, Any] = {
        "preset": "smoke",
        "corpus": str(corpus),
        "out": None if out is None else str(out),
        "track": "off",
        "device": "cpu",
        "threads": 1,
        "lm": ModelConfig(context=32, n_layers=1, n_heads=2, width=16),
        "grpo": GRPOConfig(batch_size=4, group_size=4, warmup_updates=2),
        "operation": EpisodeConfig(episode_length=2, n_prompts=2, prompt_length=4, n_new=8),
        "curriculum": small_curriculum(),
    }
    return TrainConfig(**{**parts, **changes})


def final_weights(run: RunSummary) -> dict[str, Tensor]:
    """Read the weights of the model that a run ended with."""
    weights: dict[str, Tensor] = load_file(run.folder / "checkpoints/final/model.safetensors")
    return weights


def rows_of(run: RunSummary, kind: str | None = None) -> list[dict[str, Any]]:
    """Read a run's rows, all or those of one kind."""
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if kind in (None, row["kind"])]


def flags(config: TrainConfig) -> list[str]:
    """Spell a configuration out as command-line arguments."""

    def spell(settings: object, prefix: str) -> Iterator[str]:
        for name in settings.__dataclass_fields__:  # type: ignore[attr-defined]
            value = getattr(settings, name)
            if hasattr(value, "__dataclass_fields__"):
                yield from spell(value, f"{prefix}{name}.")
            elif isinstance(value, dict):
                words = [str(word) for pair in value.items() for word in pair]
                yield from [f"{prefix}{name}".replace("_", "-"), *words] if words else []
            elif isinstance(value, tuple):
                yield from (f"{prefix}{name}".replace("_", "-"), *map(str, value))
            elif value is not None:
                yield from (f"{prefix}{name}".replace("_", "-"), str(value))

    return list(spell(config, "--"))


def write_text(folder: Path, n_characters: int = 4000) -> Path:
    """Write a small text to learn from."""
    path = folder / "text.txt"
    path.write_text(tiny_text(n_characters), encoding="utf-8")
    return path


def cycle(n_tokens: int, vocab_size: int) -> NDArray[np.int64]:
    """Return 0, 1, 2, ..., V - 1, 0, 1, ...: whoever sees one token knows all that follow."""
    return np.fromiter(itertools.islice(itertools.cycle(range(vocab_size)), n_tokens), np.int64)
