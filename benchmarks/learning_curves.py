"""Does reinforcement learning alone learn language as well as supervised training does?

Estimators are compared with the supervised control (cross-entropy) and with n-gram counts, from the
same random weights, on the same windows of tinyshakespeare in the same order. All use the default
settings, except where their name says otherwise; these were chosen on the `surgeon` split with seed
0, for RL and control alike. The figures are of the whole validation text.

The main comparison, three seeds of 1,500 updates (1.54 million tokens):

    python benchmarks/learning_curves.py --jobs 2 --out benchmarks/results/learning_curves.json

Every estimator once:

    python benchmarks/learning_curves.py --jobs 2 --runs all --seeds 101 --updates 600 \
        --out benchmarks/results/learning_curves_all.json

Writes a picture next to the JSON. The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import SIZES, make_parser, publish, untrained_model
from scipy import stats

from agents.evaluation.language_model import PROGRESS_CHARACTERS, evaluate_text
from agents.grpo.learner import GRPOConfig, GRPOLearner
from agents.training.config import preset
from avatarl_env import CharTokenizer, load_corpus
from avatarl_env.text.ngram import NGramReference

ALL = {"exploration": "all_actions"}
MAIN = ("ce (control)", "proper_maxrl", "proper_maxrl, all actions")
RUNS: dict[str, dict[str, Any]] = {
    "ce (control)": {"estimator": "ce", **ALL},
    "proper_maxrl": {},
    "proper_maxrl, all actions": ALL,
    "proper_maxrl, K = 4": {"group_size": 4},
    "brier": {"estimator": "brier"},
    "brier, all actions": {"estimator": "brier", **ALL},
    "maxrl": {"estimator": "maxrl"},
    "maxrl, all actions": {"estimator": "maxrl", **ALL},
    "rloo": {"estimator": "rloo"},
    "dr_grpo": {"estimator": "dr_grpo"},
    "grpo": {"estimator": "grpo"},
    "grpo, old policy": {"estimator": "grpo", "sync_every": 5},
    "ce (control), AdamW": {"estimator": "ce", **ALL, "optimizer": "adamw"},
    "proper_maxrl, AdamW": {"optimizer": "adamw"},
}
SEED_RECIPES = ("seed_sampled", "seed_exhaustive")
ORDERS = (2, 3, 4, 5)
SHOWN = {"accuracy": "next-character accuracy", "loss": "loss, nats per character"}


def recipe(name: str, options: argparse.Namespace) -> GRPOConfig:
    """Return the settings of a run; the older recipes have those of their presets."""
    usual = {"batch_size": options.batch_size, "precision": options.precision}
    if name in SEED_RECIPES:
        return replace(preset(name).grpo, **usual)
    return GRPOConfig(**{**usual, **RUNS[name]})


def learn(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model from random weights; return its curve and final figures."""
    torch.set_num_threads(options.threads)
    corpus = load_corpus(options.corpus)
    tokenizer = CharTokenizer.from_text(corpus.split("train"))
    splits = {s: np.array(tokenizer.encode(corpus.split(s))) for s in ("train", options.split)}
    model, rng = untrained_model(options.size, tokenizer.vocab_size, seed)
    model = model.to(options.device)
    config = recipe(name, options)
    learner = GRPOLearner(model, splits["train"], config, n_updates=options.updates, rng=rng)
    held_out, curve, seconds = splits[options.split], [], []
    for update in range(options.updates + 1):
        if update % options.every == 0 or update == options.updates:
            metrics = evaluate_text(model, held_out[: PROGRESS_CHARACTERS + 1])
            tokens = update * learner.tokens_per_update
            curve.append({"update": update, "tokens": tokens, **metrics._asdict()})
        if update < options.updates:
            start = time.perf_counter()
            learner.update()
            seconds.append(time.perf_counter() - start)
    final = evaluate_text(model, held_out)._asdict()
    return {
        "run": name,
        "seed": seed,
        "final": final,
        "curve": curve,
        "skipped": learner.n_skipped,
        "seconds": sum(seconds),
        "update_seconds_median": float(np.median(seconds)),
        "n_parameters": model.n_parameters,
        "config": asdict(config),
    }


def bars(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return loss and accuracy of n-gram counts, with the same training and held-out text."""
    corpus = load_corpus(options.corpus)
    tokenizer = CharTokenizer.from_text(corpus.split("train"))
    counted, asked = (tokenizer.encode(corpus.split(s)) for s in ("train", options.split))
    made = []
    for order in ORDERS:
        ngram = NGramReference.fit(np.array(counted), tokenizer.vocab_size, order)
        metrics = ngram.evaluate(np.array(asked))
        made.append({"order": order, "loss": metrics.loss, "accuracy": metrics.accuracy})
    return made


def table(results: list[dict[str, Any]], references: list[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table; intervals are 95 %, over seeds, by Student's t."""
    lines = [
        "| model | seeds | accuracy | of the control's | loss, nats | entropy, nats |",
        "|---|---|---|---|---|---|",
    ]
    by_run = _by_run(results)
    control = {r["seed"]: r["final"]["accuracy"] for r in by_run.get(MAIN[0], [])}
    for name, runs in by_run.items():
        finals = [r["final"] for r in runs]
        pairs = [r["final"]["accuracy"] / control[r["seed"]] for r in runs if r["seed"] in control]
        cells = [_spread([100 * f["accuracy"] for f in finals], 2, " %")]
        cells.append(_spread([100 * x for x in pairs], 1, " %") if pairs else "")
        cells += [_spread([f[key] for f in finals], 3) for key in ("loss", "entropy")]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    for row in references:
        figures = f"{row['accuracy']:.2%} | | {row['loss']:.3f}"
        lines.append(f"| {row['order']}-gram counts | | {figures} | |")
    return "\n".join(lines).replace("%", " %").replace("  %", " %")


def _by_run(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = dict.fromkeys(r["run"] for r in results)
    return {name: [r for r in results if r["run"] == name] for name in names}


def _spread(values: list[float], digits: int, unit: str = "") -> str:
    """Return a mean, with its interval if there are several values."""
    mean = f"{np.mean(values):.{digits}f}{unit}"
    if len(values) < 2:
        return mean
    error = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean} ± {error:.{digits}f}"


def draw(results: list[dict[str, Any]], references: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy and loss by tokens; a band spans the seeds, dotted lines are n-grams."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for axis, key in zip(axes, SHOWN, strict=True):
        for number, (name, runs) in enumerate(_by_run(results).items()):
            tokens = [point["tokens"] / 1e6 for point in runs[0]["curve"]]
            values = np.array([[point[key] for point in r["curve"]] for r in runs])
            style = "--" if "control" in name else "-"
            colour = f"C{number % 10}"
            marker = "" if number < 10 else "."
            axis.plot(tokens, values.mean(0), style, label=name, color=colour, marker=marker)
            axis.fill_between(tokens, values.min(0), values.max(0), alpha=0.2, color=colour)
        for row in references:
            axis.axhline(row[key], linestyle=":", linewidth=1, color="grey")
            axis.annotate(f"{row['order']}-gram", (0, row[key]), fontsize=8, color="grey")
        axis.set_xlabel("million training tokens")
        axis.set_ylabel(SHOWN[key])
    axes[0].set_ylim(0.1, None)
    axes[1].set_ylim(1.3, 4.3)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, publish."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", nargs="+", default=list(MAIN), help="names, or all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[101, 102, 103])
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", default="0.8M", choices=list(SIZES))
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--corpus", default="tinyshakespeare")
    parser.add_argument("--split", default="validation", choices=["validation", "surgeon"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    options = parser.parse_args(argv)
    names = [*RUNS, *SEED_RECIPES] if options.runs == ["all"] else options.runs
    for name in names:
        if name not in (*RUNS, *SEED_RECIPES):
            parser.error(f"runs must be in {', '.join([*RUNS, *SEED_RECIPES])}, got {name!r}")
    jobs = [(name, seed, options) for seed in options.seeds for name in names]
    if options.jobs == 1:
        results = [learn(*job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            results = pool.starmap(learn, jobs, chunksize=1)
    references = bars(options)
    print(table(results, references))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(results, references, options.out.with_suffix(".png"))
    publish({"results": results, "references": references}, options)


if __name__ == "__main__":
    main()
