"""All parts of a run, built of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents.distributed import ALONE, Ranks, own_device
from agents.evaluation.surgeon_effect import N_OPERATIONS
from agents.grpo.learner import GRPOLearner
from agents.surgeons.registry import NONE, Surgeon, make_surgeon
from agents.tracking.writer import check_tracking
from agents.training.config import TrainConfig
from agents.training.room import check_room
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import find_device
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.patient import Patient
from avatarl_env.text.corpus import load_corpus
from avatarl_env.vector_env import AttentionSurgeryVectorEnv


@dataclass(frozen=True)
class Generators:
    """One generator per consumer, all spawned from the run's seed."""

    init: torch.Generator
    grpo: np.random.Generator
    commit: np.random.Generator
    effect: np.random.Generator
    samples: np.random.Generator
    surgeon_seed: int
    _ONGOING: ClassVar = ("commit", "effect")

    def get_state(self) -> dict[str, Any]:
        """Return where those stand that are drawn from while the run goes on, but GRPO's."""
        return {name: dict(getattr(self, name).bit_generator.state) for name in self._ONGOING}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for name in self._ONGOING:
            getattr(self, name).bit_generator.state = state[name]

    @classmethod
    def spawn(cls, seed: int) -> Generators:
        """Spawn them; adding a consumer at the end changes none of the others."""
        init, grpo, commit, effect, samples, surgeon = np.random.SeedSequence(seed).spawn(6)
        return cls(
            torch.Generator().manual_seed(_seed(init)),
            np.random.default_rng(grpo),
            np.random.default_rng(commit),
            np.random.default_rng(effect),
            np.random.default_rng(samples),
            _seed(surgeon),
        )


class LearningSetup:
    """The language model, its text and who trains it: what every process of a run has."""

    def __init__(self, config: TrainConfig, ranks: Ranks = ALONE, corpus: str = "") -> None:
        """Build it.

        Args:
            config: of the run.
            ranks: the processes that train together.
            corpus: what the first of them found `config.corpus` to be.

        Raises:
            ValueError: if the configuration does not fit the corpus or the machine.
        """
        self.device = _device(config.device)
        if ranks.count > 1 and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # for kernels that ask no tensor where it is
        self.corpus = load_corpus(corpus or config.corpus)
        self.corpus.require(config.lm.context, "context")  # windows are one longer than that
        self.generators = Generators.spawn(config.seed)
        # Characters that only held-out text has are unknown, as they would be to any user.
        self.tokenizer = CharTokenizer.from_text(self.corpus.split("train"))
        check_room(config, self.tokenizer.vocab_size, self.device, ranks.count)
        sizes = config.lm.with_vocabulary(self.tokenizer.vocab_size)
        model = GPT(sizes, self.generators.init).to(self.device)
        self.patient = Patient(model, self.tokenizer, self.corpus)
        self.learner = GRPOLearner(
            model,
            self.patient.splits["train"],
            config.grpo,
            n_updates=config.curriculum.n_updates,
            rng=self.generators.grpo,
            ranks=ranks,
        )


class Setup(LearningSetup):
    """Everything a run consists of, built and checked before anything is written."""

    def __init__(self, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        """Build it.

        Raises:
            ValueError: if the configuration does not fit the corpus or the machine.
        """
        check_tracking(config.track, config.tensorboard)  # refuses a WANDB_MODE that there is not
        super().__init__(config, ranks)
        rules = config.rules
        try:
            self.env = AttentionSurgeryVectorEnv(config.curriculum.n_rows, self.patient, **rules)
        except ValueError as error:  # a run calls them rows
            raise ValueError(str(error).replace("num_envs", "n_rows")) from error
        # Of its own, so that trying operations out disturbs none under way.
        self.eval_env = AttentionSurgeryVectorEnv(
            N_OPERATIONS, self.patient, autoreset_mode=AutoresetMode.NEXT_STEP, **rules
        )
        self.surgeon: Surgeon | None = None
        if config.surgeon != NONE:
            seed, options = self.generators.surgeon_seed, config.surgeon_options
            self.surgeon = make_surgeon(config.surgeon, self.env, seed, options)


def resolved(config: TrainConfig, setup: LearningSetup) -> TrainConfig:
    """Return a configuration that means the same anywhere: what "auto" and a path came to."""
    device = setup.device.type if config.device == "auto" else config.device
    return replace(config, corpus=setup.corpus.name, device=device)


def _device(name: str) -> torch.device:
    """Return the device that `name` means.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return find_device(own_device(name))


def _seed(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1)[0] >> 1)  # 31 bits: what every library takes
