"""The parts of a run, built from its configuration on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents.distributed import Ranks, own_device
from agents.grpo.learner import GRPOLearner
from agents.surgeons.registry import NONE, Surgeon, make_surgeon
from agents.training.config import TrainConfig
from agents.training.curriculum import Curriculum
from avatarl_env.lm.gpt import GPT, LAYER_BYTES
from avatarl_env.lm.head_reader import WHOLE_UP_TO
from avatarl_env.lm.storage import find_device
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.memory import check_memory, memory_limit
from avatarl_env.patient import Patient
from avatarl_env.text.corpus import Corpus
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

FLOAT, DOUBLE, TOKEN = 4, 8, 8  # bytes
TRANSITION = 2 * 16 * FLOAT  # lower bound of a transition in a replay buffer: two observations


@dataclass(frozen=True)
class Generators:
    """One generator per consumer, all spawned from the run's seed."""

    init: torch.Generator
    grpo: np.random.Generator
    commit: np.random.Generator
    effect: np.random.Generator
    samples: np.random.Generator
    surgeon_seed: int
    _STORED: ClassVar = ("commit", "effect")

    @classmethod
    def spawn(cls, seed: int) -> Generators:
        """Spawn them; a new consumer at the end changes none of the others."""
        init, grpo, commit, effect, samples, surgeon = np.random.SeedSequence(seed).spawn(6)
        return cls(
            torch.Generator().manual_seed(_seed(init)),
            np.random.default_rng(grpo),
            np.random.default_rng(commit),
            np.random.default_rng(effect),
            np.random.default_rng(samples),
            _seed(surgeon),
        )

    def get_state(self) -> dict[str, Any]:
        """Return the states that a checkpoint needs; the learner stores that of `grpo`."""
        return {name: dict(getattr(self, name).bit_generator.state) for name in self._STORED}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the states."""
        for name in self._STORED:
            getattr(self, name).bit_generator.state = state[name]


@dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    config: TrainConfig
    corpus: Corpus
    device: torch.device
    generators: Generators
    tokenizer: CharTokenizer
    patient: Patient
    learner: GRPOLearner
    env: AttentionSurgeryVectorEnv
    """The surgeon's environment."""
    surgeon: Surgeon | None
    """None for no surgery, and on every rank but the first."""
    curriculum: Curriculum


def build(config: TrainConfig, corpus: Corpus, ranks: Ranks) -> Parts:
    """Build the parts of a run.

    Args:
        config: of the run.
        corpus: its text.
        ranks: the processes that train together.

    Raises:
        ImportError: if the surgeon needs a library that is not installed.
        ValueError: if the configuration does not fit the corpus or the machine.
    """
    device = find_device(own_device(config.device))
    if ranks.count > 1 and device.type == "cuda":
        torch.cuda.set_device(device)  # for kernels that take the current device
    corpus.require(config.lm.context, "context")  # windows are one character longer
    generators = Generators.spawn(config.seed)
    # Characters that occur in held-out text only are unknown, as in a user's text.
    tokenizer = CharTokenizer.from_text(corpus.split("train"))
    check_room(config, tokenizer.vocab_size, device, ranks.count)
    model = GPT(config.lm.with_vocabulary(tokenizer.vocab_size), generators.init).to(device)
    patient = Patient(model, tokenizer, corpus)
    learner = GRPOLearner(
        model,
        patient.splits["train"],
        config.grpo,
        n_updates=config.curriculum.n_updates,
        rng=generators.grpo,
        ranks=ranks,
    )
    env = _make_env("n_rows", config, patient, AutoresetMode.SAME_STEP)
    surgeon: Surgeon | None = None
    if config.surgeon != NONE and ranks.is_first:
        seed, options = generators.surgeon_seed, config.surgeon_options
        surgeon = make_surgeon(config.surgeon, env, seed, options)
    # A second environment: evaluations must not disturb the surgeon's operations.
    eval_env = _make_env("effect_operations", config, patient, AutoresetMode.NEXT_STEP)
    return Parts(
        config,
        corpus,
        device,
        generators,
        tokenizer,
        patient,
        learner,
        env,
        surgeon,
        Curriculum(learner, eval_env, surgeon, config.curriculum, generators.commit),
    )


def _make_env(
    rows: str, config: TrainConfig, patient: Patient, mode: AutoresetMode
) -> AttentionSurgeryVectorEnv:
    """Make an environment; `rows` is the setting that holds its number of rows."""
    n_rows = getattr(config.curriculum, rows)
    try:
        return AttentionSurgeryVectorEnv(n_rows, patient, autoreset_mode=mode, **config.rules)
    except ValueError as error:
        raise ValueError(str(error).replace("num_envs", rows)) from error


def check_room(
    config: TrainConfig, vocab_size: int, device: torch.device, n_ranks: int = 1
) -> None:
    """Refuse a run that cannot fit into memory.

    Estimates are lower bounds, so no run is refused that would fit. The environment itself checks
    the memory of parallel operations.

    Args:
        config: of the run.
        vocab_size: characters of the vocabulary.
        device: of the model.
        n_ranks: number of processes that share each batch.

    Raises:
        ValueError: names the setting, the memory it needs and the memory there is.
    """
    limit = memory_limit()
    if device.type == "cuda":
        limit = max(limit, torch.cuda.get_device_properties(device).total_memory)
    sizes = config.lm.with_vocabulary(vocab_size)
    copies = 3 if config.grpo.sync_every == 1 else 4  # with the gradient and one moment
    model = copies * FLOAT * sizes.n_parameters + LAYER_BYTES * sizes.n_layers
    check_memory("lm (n_layers, width)", max(model, sizes.building_bytes), limit)
    check_memory("batch_size", model + _update_bytes(config, vocab_size) // n_ranks, limit)
    operation = config.operation
    text = TOKEN * (operation.prompt_length + operation.n_new) + FLOAT * operation.n_new
    if vocab_size <= WHOLE_UP_TO:
        text += DOUBLE * operation.n_new * vocab_size  # the distributions that are scored
    buffer = config.surgeon_options.get("buffer_size")
    if isinstance(buffer, int):
        check_memory("buffer_size", model + buffer * TRANSITION, limit)
    window = TOKEN * (config.lm.context + 1)
    for name in ("paired_prompts", "effect_prompts"):
        pairs = getattr(config.curriculum, name) * (text + window)
        check_memory(name, model + pairs, limit)
    noise = 2 * FLOAT * config.curriculum.sample_length  # of two samples
    check_memory("sample_length", model + noise, limit)


def _update_bytes(config: TrainConfig, vocab_size: int) -> int:
    """Return the bytes that an update keeps for its backward pass, over all ranks."""
    grpo, lm = config.grpo, config.lm
    n_windows = grpo.batch_size if grpo.horizon == 1 else grpo.batch_size * grpo.group_size
    length = lm.context if grpo.horizon == 1 else grpo.horizon
    half = FLOAT // 2  # of activations in half precision
    kept = half * 10 * lm.n_layers * lm.width + FLOAT * 2 * vocab_size
    drawn = (FLOAT + TOKEN) * grpo.group_size if grpo.horizon == 1 else FLOAT + TOKEN
    return n_windows * length * (kept + drawn)


def _seed(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1)[0] >> 1)  # 31 bits, which every library takes
