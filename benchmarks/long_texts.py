"""Do free-running episodes improve longer texts, and does it help if the operated model samples?

One model is trained at horizon 1. Copies of it then learn in three ways, each for the same compute,
counted in forward tokens (a text that is written and learned from costs four times its length, a
real window three times, plus what the surgeon's operations cost):

- horizon 1: as before, every position of real text is an episode of one character;
- horizon H: the model writes K texts of H characters after each prompt, and is rewarded for
  agreement with the n-gram reference and with the real continuation;
- horizon H, operated: the same, but the texts are written under the best operation that a surgeon
  (an evolution strategy) has found; the model itself is never changed by it.

All have the same learning rates, a tenth of the default peak, and a schedule that ends with the
compute. Their texts after the same validation prompts, with the same sampling noise, are compared
in pairs: `kl_ref` (larger is better; also the reward at horizon H, so it must be read together with
the loss on real text), `collision_l2` (distance to the trigram frequencies of real text, smaller is
better), the loss on real text, and entropy.

    python benchmarks/long_texts.py --out benchmarks/results/long_texts.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from measure import SIZES, make_parser, publish, untrained_model

from agents.evaluation.language_model import evaluate_text
from agents.evaluation.statistics import interval
from agents.evaluation.surgeon_effect import final_operations
from agents.grpo.learner import GRPOConfig, GRPOLearner
from agents.surgeons.registry import Surgeon, make_surgeon
from avatarl_env import AttentionSurgeryVectorEnv, CharTokenizer, load_corpus
from avatarl_env.patient import Patient
from avatarl_env.scoring import kl_ref

CONTEXT = 128  # of every size: room for prompts and texts
UPDATES_PER_ROUND = 8  # at horizon 1, per update at horizon H: about equal compute
SLOW = 0.1  # share of the default peak rates
TERMS = ("kl_ref", "collision_l2", "entropy")


def start(options: argparse.Namespace) -> Patient:
    """Train the common initial model."""
    corpus = load_corpus(options.corpus)
    tokenizer = CharTokenizer.from_text(corpus.split("train"))
    model, rng = untrained_model(options.size, tokenizer.vocab_size, options.seed, context=CONTEXT)
    patient = Patient(model, tokenizer, corpus)
    tokens = patient.splits["train"]
    learner = GRPOLearner(model, tokens, GRPOConfig(), n_updates=options.updates, rng=rng)
    for _ in range(options.updates):
        learner.update()
    return patient


def recipe(horizon: int, options: argparse.Namespace) -> GRPOConfig:
    """Return the settings of further training."""
    usual = GRPOConfig()
    rates = {"learning_rate": SLOW * usual.learning_rate}
    rates["matrix_learning_rate"] = SLOW * usual.matrix_learning_rate
    if horizon == 1:
        return GRPOConfig(warmup_updates=0, **rates)
    return GRPOConfig(
        estimator=options.estimator,
        horizon=horizon,
        group_size=options.texts,
        match_bonus=options.match_bonus,
        warmup_updates=0,
        **rates,
    )


def continued(start: Patient, horizon: int, *, operated: bool, options: argparse.Namespace) -> Any:
    """Train a copy of the model until the compute is spent; return it and its counts."""
    trial = Course(start, horizon, operated, options, n_rounds=1)
    trial.run()
    # As many rounds as the compute allows, so that every schedule ends with it.
    course = Course(start, horizon, operated, options, n_rounds=options.compute // trial.spent)
    course.run()
    return course.patient, course.done()


class Course:
    """Further training of a copy: rounds of updates, and of operations if there is a surgeon."""

    def __init__(
        self,
        start: Patient,
        horizon: int,
        operated: bool,
        options: argparse.Namespace,
        *,
        n_rounds: int,
    ) -> None:
        """Copy the model; the surgeon's randomness does not change the windows drawn."""
        self.patient = Patient(copy.deepcopy(start.model), start.tokenizer, start.corpus)
        rng, self._rng = (np.random.default_rng([options.seed, i]) for i in range(2))
        # Longer episodes cost more: fewer of them make a round of about equal compute.
        self._n_updates = options.round if horizon > 1 else UPDATES_PER_ROUND * options.round
        self.learner = GRPOLearner(
            self.patient.model,
            self.patient.splits["train"],
            recipe(horizon, options),
            n_updates=n_rounds * self._n_updates,
            rng=rng,
        )
        rules = {"n_prompts": 4, "n_new": 64}
        self._exam = AttentionSurgeryVectorEnv(
            8, self.patient, autoreset_mode=AutoresetMode.NEXT_STEP, **rules
        )
        env = AttentionSurgeryVectorEnv(
            options.rows, self.patient, autoreset_mode=AutoresetMode.SAME_STEP, **rules
        )
        self._surgeon = make_surgeon("es", env, seed=options.seed) if operated else None
        self._operation: Any = None
        self._n_rounds = n_rounds
        self._n_helpful = 0

    def run(self) -> None:
        """Do all rounds."""
        for _ in range(self._n_rounds):
            for _ in range(self._n_updates):
                self.learner.update(self._operated())
                self._exam.model_changed()
            if self._surgeon is not None:
                self._surgeon.operate(1)
                self._operation = self._best(self._surgeon)
                self._n_helpful += self._operation is not None

    def _best(self, surgeon: Surgeon) -> Any:
        """Return the coefficients of the best deterministic operation, or None if none helps."""
        endings = final_operations(surgeon, self._exam, int(self._rng.integers(2**31)))
        best = max(endings, key=lambda ending: ending.total)
        return best.coefficients if best.total > 0 and best.flatline is None else None

    def _operated(self) -> Any:
        if self._operation is None:
            return None
        return self.patient.operated(self._exam.operator, self._operation)

    @property
    def spent(self) -> int:
        """Forward tokens so far."""
        return self.learner.forward_tokens + self.patient.forward_tokens

    def done(self) -> dict[str, int]:
        """Return counts of updates, tokens and rounds."""
        learner, patient = self.learner, self.patient
        tokens = {"update_tokens": learner.forward_tokens, "surgeon_tokens": patient.forward_tokens}
        found = {"n_rounds": self._n_rounds, "n_helpful": self._n_helpful}
        return {"updates": learner.n_done, **tokens, **(found if self._surgeon else {})}


def write(patient: Patient, options: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    """Let a model continue validation prompts; return `kl_ref` of each text, and all figures."""
    rng = np.random.default_rng([options.seed, 1])
    prompts = patient.prompts("validation", options.prompts, 32, options.length, rng)
    evaluation = patient.evaluate(prompts)
    held_out = evaluate_text(patient.model, patient.splits["validation"])
    figures = {name: evaluation.terms[name] for name in TERMS}
    figures |= {"heldout_loss": held_out.loss, "accuracy": held_out.accuracy}
    return kl_ref(evaluation.generations, patient.reference), figures


def main(argv: Sequence[str] | None = None) -> None:
    """Train, continue in each way, compare, publish."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", default="0.8M", choices=list(SIZES))
    parser.add_argument("--updates", type=int, default=600, help="of the initial model")
    parser.add_argument("--compute", type=int, default=3_000_000, help="forward tokens from there")
    parser.add_argument("--horizon", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8, help="for each prompt")
    parser.add_argument("--estimator", default="rloo")
    parser.add_argument("--match-bonus", type=float, default=1.0)
    parser.add_argument("--round", type=int, default=10, help="updates between operations")
    parser.add_argument("--rows", type=int, default=8, help="operations side by side")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--length", type=int, default=96, help="characters written")
    parser.add_argument("--corpus", default="tinyshakespeare")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    beginning = start(options)
    base, figures = write(beginning, options)
    rows = {"the beginning": {**figures}}
    many = options.horizon
    ways = {"horizon 1": (1, False), f"horizon {many}": (many, False)}
    ways[f"horizon {many}, operated"] = (many, True)
    scores = {}
    for name, (horizon, operated) in ways.items():
        patient, done = continued(beginning, horizon, operated=operated, options=options)
        scores[name], figures = write(patient, options)
        gain = interval(scores[name] - base)._asdict()
        rows[name] = {**figures, **done, "kl_ref_gain": gain}
        if name != "horizon 1":
            rows[name]["kl_ref_over_horizon_1"] = interval(
                scores[name] - scores["horizon 1"]
            )._asdict()
    print("| | kl_ref | collision_l2 | entropy | loss on real text | accuracy |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row[key]:.3f}" for key in (*TERMS, "heldout_loss")]
        print(f"| {name} | {' | '.join(cells)} | {100 * row['accuracy']:.1f} % |")
    publish({"rows": rows}, options)


if __name__ == "__main__":
    main()
