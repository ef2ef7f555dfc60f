"""Do free-running episodes make longer texts better, and if the operated model samples them?

One model is trained at horizon 1. From there on, copies of it learn in different ways, each for the
same compute, counted in forward tokens (a text that is written and then learned from costs four
times its length, a real window three times, the surgeon's operations what they take):

- horizon 1 goes on as before: every position of real text is an episode of one character;
- horizon H: the model writes K texts of H characters after each prompt, and is rewarded for
  writing what the n-gram reference would write, and for what really stands there;
- horizon H, operated: the same, but the texts are written under the operation that a surgeon (an
  evolution strategy) finds best at the time, which the model itself never keeps.

All three have the same learning rates, a tenth of the default peak, and a schedule that ends with
the compute. `kl_ref` is what horizon H is rewarded with, so the loss on real text has to be read
beside it. What they write on prompts of
validation text is then compared in pairs, on the same dice: `kl_ref` (larger is better),
`collision_l2` (distance of trigram frequencies to real text's, smaller is better), the loss on
real text, and entropy.

    python benchmarks/long_texts.py --out benchmarks/results/long_texts.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from measure import SIZES, publish

from agents.evaluation.language_model import evaluate_text
from agents.evaluation.statistics import interval
from agents.grpo.learner import GRPOConfig, GRPOLearner
from agents.surgeons.registry import make_surgeon
from agents.training.curriculum import ROLLOUT, Curriculum, CurriculumConfig, Phase
from avatarl_env import GPT, AttentionSurgeryVectorEnv, CharTokenizer, GPTConfig, load_corpus
from avatarl_env.patient import Patient
from avatarl_env.scoring import kl_ref

CONTEXT = 128  # of every size: room for prompts and texts
UPDATES_PER_ROUND = 8  # of horizon 1, for one of rollouts
SLOW = 0.1  # of the default peak rates
TERMS = ("kl_ref", "collision_l2", "entropy")


class Notes:
    """A journal that only counts how often an operation was found that helps."""

    def __init__(self) -> None:
        """Count from zero."""
        self.n_rounds = 0
        self.n_helpful = 0

    def updated(self, stats: object) -> None:
        """Let an update pass."""

    def operated(self, records: object, surgeon: object) -> None:
        """Let a round of operations pass."""

    def judged(self, commit: object) -> None:
        """Let a judgement pass."""

    def behaved(self, operation: object) -> None:
        """Count."""
        self.n_rounds += 1
        self.n_helpful += operation is not None


def start(options: argparse.Namespace) -> Patient:
    """Train the model that all go on from."""
    corpus = load_corpus(options.corpus)
    tokenizer = CharTokenizer.from_text(corpus.split("train"))
    init, dice = np.random.SeedSequence(options.seed).spawn(2)
    generator = torch.Generator().manual_seed(int(init.generate_state(1)[0] >> 1))
    patient = Patient(
        GPT(
            GPTConfig(
                vocab_size=tokenizer.vocab_size, **{**SIZES[options.size], "context": CONTEXT}
            ),
            generator,
        ),
        tokenizer,
        corpus,
    )
    tokens, rng = patient.splits["train"], np.random.default_rng(dice)
    learner = GRPOLearner(patient.model, tokens, GRPOConfig(), n_updates=options.updates, rng=rng)
    for _ in range(options.updates):
        learner.update()
    return patient


def recipe(horizon: int, options: argparse.Namespace) -> GRPOConfig:
    """Return how the model goes on learning."""
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


def go_on(start: Patient, horizon: int, *, operated: bool, options: argparse.Namespace) -> Any:
    """Let a copy of the model learn on until the compute is spent; return it, and what was done."""
    trial = Course(start, horizon, operated, options, n_rounds=1)
    trial.run()
    # As many rounds as the compute lasts for, so that every schedule comes to its end.
    course = Course(start, horizon, operated, options, n_rounds=options.compute // trial.spent)
    course.run()
    return course.patient, course.done()


class Course:
    """One way of going on: rounds of some updates, and of operations where there are any."""

    def __init__(
        self,
        start: Patient,
        horizon: int,
        operated: bool,
        options: argparse.Namespace,
        *,
        n_rounds: int,
    ) -> None:
        """Copy the model; the same windows are drawn whatever the surgeon draws."""
        self.patient = Patient(copy.deepcopy(start.model), start.tokenizer, start.corpus)
        dice, choice = (np.random.default_rng([options.seed, i]) for i in range(2))
        # A longer episode costs more: as much compute in a round, about, whatever the way.
        n_updates = options.round if horizon > 1 else UPDATES_PER_ROUND * options.round
        self.learner = GRPOLearner(
            self.patient.model,
            self.patient.splits["train"],
            recipe(horizon, options),
            n_updates=n_rounds * n_updates,
            rng=dice,
        )
        rules = {"n_prompts": 4, "n_new": 64}
        exam = AttentionSurgeryVectorEnv(
            8, self.patient, autoreset_mode=AutoresetMode.NEXT_STEP, **rules
        )
        env = AttentionSurgeryVectorEnv(
            options.rows, self.patient, autoreset_mode=AutoresetMode.SAME_STEP, **rules
        )
        surgeon = make_surgeon("es", env, seed=options.seed) if operated else None
        self._phase = Phase("joint", n_rounds, n_updates, int(operated), False, operated)
        self._whole = Curriculum(
            self.learner, exam, surgeon, CurriculumConfig(commit=ROLLOUT), choice
        )
        self._notes = Notes()

    def run(self) -> None:
        """Do all rounds."""
        for _ in self._whole.steps(self._phase, self._notes):
            pass

    @property
    def spent(self) -> int:
        """Forward tokens so far."""
        return self.learner.forward_tokens + self.patient.forward_tokens

    def done(self) -> dict[str, int]:
        """Return what was done."""
        learner, patient = self.learner, self.patient
        tokens = {"update_tokens": learner.forward_tokens, "surgeon_tokens": patient.forward_tokens}
        return {"updates": learner.n_done, **tokens, **vars(self._notes)}


def write(patient: Patient, options: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    """Let a model write on fresh prompts of validation text; return its `kl_ref` by text."""
    rng = np.random.default_rng([options.seed, 1])
    prompts = patient.prompts("validation", options.prompts, 32, options.length, rng)
    evaluation = patient.evaluate(prompts)
    held_out = evaluate_text(patient.model, patient.splits["validation"])
    figures = {name: evaluation.terms[name] for name in TERMS}
    figures |= {"heldout_loss": held_out.loss, "accuracy": held_out.accuracy}
    return kl_ref(evaluation.generations, patient.reference), figures


def main() -> None:
    """Train, go on in each way, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="0.8M", choices=list(SIZES))
    parser.add_argument("--updates", type=int, default=600, help="of the common beginning")
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    beginning = start(options)
    base, figures = write(beginning, options)
    rows = {"the beginning": {**figures}}
    many = options.horizon
    ways = {"horizon 1": (1, False), f"horizon {many}": (many, False)}
    ways[f"horizon {many}, operated"] = (many, True)
    scores = {}
    for name, (horizon, operated) in ways.items():
        patient, done = go_on(beginning, horizon, operated=operated, options=options)
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
