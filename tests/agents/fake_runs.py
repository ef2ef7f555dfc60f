"""Run folders made up for tests, which look like those of a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

REFERENCES = [
    {"name": "bigram", "loss": 2.486, "accuracy": 0.270},
    {"name": "trigram", "loss": 2.049, "accuracy": 0.381},
    {"name": "4-gram", "loss": 1.774, "accuracy": 0.472},
    {"name": "5-gram", "loss": 1.669, "accuracy": 0.527},
]
VERDICT = (
    "After joint training the surgeon's operations raised the score by 0.021 nats per character "
    "(95 % interval 0.013 to 0.029), more than random ones; no effect on held-out loss larger than "
    "0.004 nats was found."
)
SHA256 = "86c4e6aa" * 8
PLAY = (
    "ROMEO:\nWhat shall I swear the matter of the world,\nAnd be the common hand?\n\n"
    "FRIAR:\nHold, sir; the"
)


class MadeUpRun:
    """Writes the files of a run; call the phases in order, then `finish`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.rows: list[dict[str, Any]] = []
        self.update = self.operation = self.tokens = 0
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "preset": "laptop",
            "seed": 0,
            "corpus": "tinyshakespeare",
            "surgeon": "sac",
            "lm": {"n_layer": 4, "n_head": 4, "width": 128, "context": 128},
            "grpo": {"estimator": "brier", "group_size": 16, "learning_rate": 2e-3},
            "injury": None,
            "corpus_sha256": SHA256,
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        known = {"references": REFERENCES, "corpus_nats_per_char": None}
        (folder / "references.json").write_text(json.dumps(known), encoding="utf-8")
        self.save()

    def add(self, kind: str, phase: str, metrics: dict[str, Any]) -> None:
        clock = {
            "phase": phase,
            "update": self.update,
            "operation": self.operation,
            "forward_tokens": self.tokens,
            "seconds": self.tokens / 5e5,
        }
        self.rows.append({"kind": kind, **clock, **metrics})

    def train(self, phase: str, updates: int) -> None:
        """Add GRPO updates, with an evaluation before the first and after every twentieth."""
        for index in range(updates):
            if index % 20 == 0:
                self.evaluate(phase)
            self.update += 1
            self.tokens += 3 * 16 * 128
            gone = 1 - math.exp(-self.update / 150)
            metrics = {
                "grpo/loss": 0.9 - 0.3 * gone,
                "grpo/reward": 0.02 + 0.3 * gone + 0.02 * self.rng.normal(),
                "grpo/accuracy": 0.1 + 0.33 * gone,
                "grpo/entropy": 4.1 - 2.4 * gone,
                "grpo/grad_norm": None if index == 3 else 0.4,
                "grpo/learning_rate": 2e-3,
                "time/tokens_per_second": 5e5,
            }
            self.add("grpo", phase, metrics)
        self.evaluate(phase)
        self.sample(phase, None)

    def evaluate(self, phase: str) -> None:
        gone = 1 - math.exp(-self.update / 150)
        loss = 4.2 - 2.35 * gone
        metrics = {
            "validation/loss": loss,
            "validation/bits_per_char": loss / math.log(2),
            "validation/accuracy": 0.03 + 0.41 * gone,
            "validation/entropy": 4.15 - 2.4 * gone,
        }
        self.add("evaluation", phase, metrics)

    def operate(self, phase: str, operations: int) -> None:
        """Add operations, with the surgeon's own statistics after every eighth."""
        for index in range(operations):
            self.operation += 1
            if index % 8 == 0:
                self.tokens += 8 * 5 * 32 * 96
            flatline = None
            if self.rng.random() < 0.06:
                flatline = f"entropy {self.operation / 1e4:.4f} outside [1.104, 3.312] nats"
            helped = 0.03 * (1 - math.exp(-self.operation / 120)) - 0.01
            metrics = {
                "surgeon/return": -1.0 if flatline else helped + 0.03 * self.rng.normal(),
                "surgeon/length": 2 if flatline else 4,
                "surgeon/mean_abs_action": 0.5 - 0.2 * min(self.operation / 200, 1),
                "surgeon/coefficients": self.rng.uniform(-1, 1, 8).round(3).tolist(),
                "surgeon/flatline": flatline,
                "score/kl_ref": -0.6 + helped,
                "baseline/kl_ref": -0.6,
            }
            self.add("operation", phase, metrics)
            if index % 8 == 7:
                losses = {"surgeon/actor_loss": -0.2, "surgeon/critic_loss": 0.01}
                self.add("surgeon", phase, losses)
        self.sample(phase, PLAY.replace("matter", "manner"))

    def commit(self, phase: str, *, kept: bool) -> None:
        gain = 0.021 if kept else 0.002
        metrics = {
            "commit/kept": kept,
            "commit/kl_ref_gain": _gain(gain, 0.008),
            "commit/heldout_loss_fall": _gain(gain / 4, 0.004),
            "commit/coefficients": self.rng.uniform(-1, 1, 8).round(3).tolist(),
        }
        self.add("commit", phase, metrics)

    def sample(self, phase: str, operated: str | None) -> None:
        metrics = {"prompt": "the gods themselves,\n", "text": PLAY, "operated_text": operated}
        self.add("sample", phase, metrics)

    def save(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        (self.folder / "metrics.jsonl").write_text(lines, encoding="utf-8")

    def finish(self, **changes: Any) -> None:
        """Write the rows and the summary; keyword arguments replace parts of the summary."""
        self.save()
        commits = [row for row in self.rows if row["kind"] == "commit"]
        kept = sum(row["commit/kept"] for row in commits)
        phases = list(dict.fromkeys(row["phase"] for row in self.rows))
        summary = {
            "preset": "laptop",
            "seed": 0,
            "surgeon": "sac",
            "corpus": "tinyshakespeare",
            "corpus_sha256": SHA256,
            "corpus_nats_per_char": None,
            "phases": [self._phase(name) for name in phases],
            "validation": {
                "loss": 1.842,
                "bits_per_char": 2.657,
                "accuracy": 0.4387,
                "entropy": 1.731,
            },
            "references": REFERENCES,
            "commits": {
                "policy": "if_better",
                "tried": len(commits),
                "kept": kept,
                "expected_false_at_most": 0.05 * len(commits),
                "operations": [],
            },
            "surgeon_effect": {
                "verdict": VERDICT,
                "measurements": [_measurement("surgery", 0.012), _measurement("joint", 0.021)],
            },
            "environment": {"versions": {"torch": "2.13.0"}, "device": "cpu", "threads": 2},
            "seconds": self.tokens / 5e5,
            "command": "python train.py --corpus tinyshakespeare --out runs/first",
        }
        text = json.dumps({**summary, **changes})
        (self.folder / "summary.json").write_text(text, encoding="utf-8")

    def _phase(self, name: str) -> dict[str, Any]:
        rows = [row for row in self.rows if row["phase"] == name and row["kind"] == "evaluation"]
        first, last = (
            {key: value for key, value in row.items() if key.startswith("validation/")}
            for row in (rows[0], rows[-1])
        )
        steps = sum(row["phase"] == name and row["kind"] == "grpo" for row in self.rows)
        return {"name": name, "steps": steps, "seconds": 71.5, "first": first, "last": last}


def make_run(folder: Path) -> MadeUpRun:
    """Write a whole run of three phases into a folder."""
    run = MadeUpRun(folder)
    run.sample("bootstrap", None)
    run.train("bootstrap", 400)
    run.evaluate("surgery")
    run.operate("surgery", 160)
    run.evaluate("surgery")
    for block in range(6):
        run.train("joint", 40)
        run.operate("joint", 16)
        run.commit("joint", kept=block in (2, 4))
    run.finish()
    return run


def _gain(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "lower_bound": mean - 0.8 * half}


def _measurement(after: str, gain: float) -> dict[str, Any]:
    def whom(scale: float) -> dict[str, dict[str, float]]:
        return {
            "surgeon": _gain(scale * gain, 0.008 * scale),
            "random": _gain(-0.015 * scale, 0.011 * scale),
            "zero": _gain(0.0, 0.0),
        }

    return {
        "after": after,
        "kl_ref_gain": whom(1.0),
        "heldout_loss_fall": whom(0.2),
        "n_prompts": 256,
        "n_operations": 64,
    }
