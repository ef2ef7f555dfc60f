"""The data of the figures; draw.js turns each into a plot by its `type`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from agents.report.data import (
    MOST_POINTS,
    Run,
    Series,
    flatlines,
    is_number,
    mean,
    plotted,
    references,
    running_mean,
    same_text,
)
from agents.report.html import MINUS, Html, figure, percent

Figure = dict[str, Any]

LIMIT = "limit"  # name of the level at the text's true entropy
NATS = "nats per character"

_MOST_CELLS = 20_000  # of a heat map; beyond this only every n-th round is shown


class Curve(NamedTuple):
    """A metric plotted against compute; as a running mean unless it is an evaluation."""

    kind: str
    """Kind of the rows that carry the metric."""
    metric: str
    """The metric's name in the rows, and the key of its figure."""
    title: str
    caption: str = ""
    """Explanation for a reader without prior knowledge."""
    unit: str = ""
    reference: str = ""
    """Field of the n-gram references to plot as levels; empty for none."""

    @property
    def is_share(self) -> bool:
        """Whether the metric is shown in percent."""
        return self.unit.startswith("share")

    def show(self, value: float) -> str:
        """Format a value of the metric."""
        return percent(value) if self.is_share else f"{value:.4g}".replace("-", MINUS)


CURVES = [
    Curve(
        "evaluation",
        "validation/accuracy",
        "Next-character accuracy",
        "How often the model's most likely next character is the right one, on held-out text. "
        "Higher is better.",
        "share of characters",
        reference="accuracy",
    ),
    Curve(
        "evaluation",
        "validation/loss",
        "Loss",
        "Cross-entropy on held-out text. Lower is better.",
        NATS,
        reference="loss",
    ),
    Curve(
        "evaluation",
        "validation/entropy",
        "Entropy of the predictions",
        "How uncertain the model is about the next character. Near zero it repeats itself; far "
        "above the loss it is less confident than it could be.",
        NATS,
    ),
    Curve(
        "grpo",
        "grpo/reward",
        "Probability of the right character",
        "The probability that a character sampled by the language model in training is the right "
        "one. The estimator turns this into the reward.",
        "probability",
    ),
    Curve(
        "grpo",
        "grpo/text_reward",
        "Reward of the model's own texts",
        "The training reward for texts of many characters: how much more likely they are under the "
        "n-gram reference than under the model, plus a bonus for a beginning that matches the real "
        "text.",
        NATS,
    ),
    Curve(
        "operation",
        "surgeon/return",
        "Return of the operations",
        "The surgeon's reward for one operation: score of the operated model minus score of the "
        "same model without the operation.",
        NATS,
    ),
    Curve(
        "operation",
        "surgeon/mean_abs_action",
        "Size of the surgeon's actions",
        "Zero leaves the model unchanged; one is the largest possible action.",
        "mean absolute action, 0 to 1",
    ),
]
"""The metrics that every page plots, in order."""


def other_curves(runs: Sequence[Run]) -> list[Curve]:
    """Return a curve for each metric of training and operations that `CURVES` lacks."""
    kinds = ("grpo", "operation", "surgeon")
    found = {name: kind for run in runs for kind in kinds for name in run.metrics(kind)}
    known = {curve.metric for curve in CURVES}
    return [Curve(kind, name, name) for name, kind in found.items() if name not in known]


def curve_frames(
    runs: Sequence[Run], curves: Iterable[Curve], figures: dict[str, Figure]
) -> list[Html]:
    """Return a frame for each curve that at least one run has; add its data to `figures`."""
    frames = []
    for curve in curves:
        drawn = curve_figure(runs, curve)
        if drawn is None:
            continue
        figures[curve.metric] = drawn
        ends = (
            f"{runs[series['run']].name} from {curve.show(series['lines'][0]['y'][0])} to "
            f"{curve.show(series['lines'][-1]['y'][-1])}"
            for series in drawn["series"]
        )
        caption = " ".join(filter(None, [curve.caption, *_notes(runs, drawn)]))
        spoken = f"{curve.title}: {'; '.join(ends)}"
        frames.append(figure(curve.metric, curve.title, caption, spoken))
    return frames


def _notes(runs: Sequence[Run], drawn: Figure) -> Iterable[str]:
    """Explain what a figure shows besides the metric."""
    if "points" in drawn:
        yield "Faint points are single values, the line is their running mean."
    elif drawn["noisy"]:
        yield "Lines are running means."
    if drawn.get("flatlines"):
        yield "Crosses mark flatlines: operations that broke the text. The mean includes them."
    if drawn["levels"].keys() - {LIMIT}:
        yield "Dashed levels are n-gram models, which use the last 1 (bigram) to 4 characters."
    if LIMIT in drawn["levels"]:
        yield "The limit is the entropy of the text's grammar: about the best possible loss."
    if len(runs) > 1 and any(runs[series["run"]].is_control for series in drawn["series"]):
        yield "Dashed curves are supervised controls."


def curve_figure(runs: Sequence[Run], curve: Curve) -> Figure | None:
    """Return one metric of all runs as `series`, with `levels`; None if no run has it.

    The figure of a single run also has its `phases`, `points`, `flatlines` and `commits`.
    """
    found = {run.index: run.series(curve.kind, curve.metric) for run in runs}
    found = {index: series for index, series in found.items() if series.y}
    if not found:
        return None
    noisy = curve.kind != "evaluation"
    most = max(100, MOST_POINTS // len(runs))
    drawn: Figure = {
        "type": "curve",
        "unit": curve.unit,
        "colour": "surgeon" if curve.kind in ("operation", "surgeon") else "model",
        "share": curve.is_share,
        "noisy": noisy,
        "end": max(row["forward_tokens"] for run in runs for row in run.rows),
        "levels": levels(runs, curve),
        "series": [
            {
                "run": index,
                "lines": [
                    plotted(line, most) for line in (running_mean(series) if noisy else [series])
                ],
            }
            for index, series in found.items()
        ],
    }
    if len(runs) == 1:
        kept = [row for row in runs[0].of_kind("commit") if row.get("commit/kept")]
        drawn["phases"] = runs[0].phases
        drawn["commits"] = [row["forward_tokens"] for row in kept]
        if noisy:
            drawn |= _points(runs[0], curve)
    return drawn


def _points(run: Run, curve: Curve) -> Figure:
    """Return single values, with flatlines apart: their penalty is far below other returns."""
    rows = [row for row in run.of_kind(curve.kind) if is_number(row.get(curve.metric))]
    if curve.metric != "surgeon/return":
        return {"points": plotted(run.series(curve.kind, curve.metric), MOST_POINTS)}
    alive = [row for row in rows if not row.get("surgeon/flatline")]
    crosses = []
    dead = (row for row in rows if row.get("surgeon/flatline"))
    for x, group in groupby(dead, key=lambda row: row["forward_tokens"]):
        causes = ", ".join(f"{n} {cause}" for cause, n in flatlines(group).items())
        crosses.append({"x": x, "text": causes})
    points = Series([r["forward_tokens"] for r in alive], [r[curve.metric] for r in alive], [])
    return {"points": plotted(points, MOST_POINTS), "flatlines": crosses}


def levels(runs: Sequence[Run], curve: Curve) -> dict[str, float]:
    """Return the levels of the n-gram references by name, and the limit of the loss."""
    if not curve.reference:
        return {}
    found = {row["name"]: row.get(curve.reference) for row in references(runs)}
    if curve.reference == "loss" and same_text(runs):
        found[LIMIT] = runs[0].fact("corpus_nats_per_char")
    return {name: float(level) for name, level in found.items() if level is not None}


def coefficient_figure(run: Run) -> Figure | None:
    """Return the mean coefficients of each round of operations.

    Returns:
        The figure, or None if there are no coefficients or their number varies.
    """
    rows = [row for row in run.of_kind("operation") if row.get("surgeon/coefficients")]
    if len({len(row["surgeon/coefficients"]) for row in rows}) != 1:
        return None
    rounds = [list(group) for _, group in groupby(rows, key=lambda row: row["forward_tokens"])]
    stride = -(-len(rounds) * len(rows[0]["surgeon/coefficients"]) // _MOST_CELLS)
    rounds = rounds[(len(rounds) - 1) % stride :: stride]
    columns = [
        [
            mean(values, 3)
            for values in zip(*(r["surgeon/coefficients"] for r in group), strict=True)
        ]
        for group in rounds
    ]
    return {
        "type": "heat",
        "x": [group[-1].get("operation") for group in rounds],
        "z": [list(row) for row in zip(*columns, strict=True)],
    }
