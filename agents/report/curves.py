"""The metrics that a report draws against compute, with what a reader has to know of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric that is drawn against compute.

    Attributes:
        key: Short name, unique in the page.
        kind: Kind of the rows that carry the metric.
        metric: The metric's name in the rows.
        title: Title of the figure.
        unit: Unit of the metric, in words.
        caption: What one sees, for somebody who has read nothing else.
        colour: CSS variable of the line.
        percent: Whether the metric is a share, to be shown in percent.
        reference: Field of the n-gram references to compare with, if any.
        reference_note: What the lines of these references are.
        noisy: Whether to draw faint points under a running mean.
        overlay_caption: The caption for the curves of several runs; empty for the same.
    """

    key: str
    kind: str
    metric: str
    title: str
    unit: str = ""
    caption: str = ""
    colour: str = "--model"
    percent: bool = False
    reference: str | None = None
    reference_note: str = ""
    noisy: bool = False
    overlay_caption: str = ""

    def show(self, value: float) -> str:
        """Write a value with its unit's precision."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"


CURVES = (
    Curve(
        key="accuracy",
        kind="evaluation",
        metric="validation/accuracy",
        title="Next-character accuracy",
        unit="share of characters",
        caption="How often the model's first guess is the character that comes next, on held-out "
        "text. Higher is better.",
        reference_note="The dashed lines are tables that count which character follows the last 1 "
        "(bigram) to 4 (5-gram) characters.",
        percent=True,
        reference="accuracy",
    ),
    Curve(
        key="loss",
        kind="evaluation",
        metric="validation/loss",
        title="Loss",
        unit="nats per character",
        caption="How surprised the model is by held-out text. Lower is better.",
        reference_note="The dashed lines are the same tables.",
        reference="loss",
    ),
    Curve(
        key="entropy",
        kind="evaluation",
        metric="validation/entropy",
        title="Entropy of the predictions",
        unit="nats per character",
        caption="How undecided the model is about the next character. Near zero it would say the "
        "same thing over and over; far above the loss it hedges.",
    ),
    Curve(
        key="reward",
        kind="grpo",
        metric="grpo/reward",
        title="Chance of a right guess",
        unit="probability",
        caption="The chance that a character that the language model draws while it trains is the "
        "right one. What it is paid follows from this and from its estimator. Faint points are "
        "single updates, the line is their running mean.",
        overlay_caption="The chance that a character that the language model draws while it trains "
        "is the right one: the running mean.",
        noisy=True,
    ),
    Curve(
        key="text-reward",
        kind="grpo",
        metric="grpo/text_reward",
        title="Reward of the model's own texts",
        unit="nats per character",
        caption="What the language model is paid for the texts that it writes while it trains: how "
        "much likelier the n-gram reference finds them than the model itself does, and how much of "
        "their beginning is what really stands there. Faint points are single updates, the line is "
        "their running mean.",
        noisy=True,
    ),
    Curve(
        key="return",
        kind="operation",
        metric="surgeon/return",
        title="Return of the operations",
        unit="nats per character",
        caption="What the surgeon is paid for one operation: by how much the text of the operated "
        "model scores above that of the same model without it. The line is the running mean. A "
        "cross at the lower edge marks operations that broke the text (flatlines) and were fined.",
        overlay_caption="What the surgeon is paid for one operation: by how much the text of the "
        "operated model scores above that of the same model without it. The running mean, with the "
        "fines for operations that broke the text.",
        colour="--surgeon",
        noisy=True,
    ),
    Curve(
        key="action",
        kind="operation",
        metric="surgeon/mean_abs_action",
        title="Size of the surgeon's actions",
        unit="mean absolute action, 0 to 1",
        caption="How boldly the surgeon moves. Zero leaves the model as it is, one is as far as an "
        "action can go.",
        colour="--surgeon",
        noisy=True,
    ),
)
