"""The section on operations: effect, returns, commits and coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from agents.report.data import Run, flatlines, mean
from agents.report.figures import NATS, Figure, coefficient_figure
from agents.report.html import (
    DASH,
    Html,
    by_run,
    figure,
    grid,
    interval,
    join,
    number,
    paragraph,
    percent,
    run_table,
    signed,
)

POLICIES = ("surgeon", "random", "zero")

_MOST_COEFFICIENTS = 16  # of a tested operation in its table


class Effect(NamedTuple):
    """A measure of the surgeon's effect; positive is better."""

    key: str
    """Name in the measurements of `summary.json`; a run may lack it."""
    title: str
    unit: str
    caption: str


EFFECTS = [
    Effect(
        "score_gain",
        "Gain in the surgeon's score",
        "score",
        "How much an operation raises the score that the surgeon is rewarded for.",
    ),
    Effect(
        "kl_ref_gain",
        "Gain in kl_ref",
        NATS,
        "How much an operation raises kl_ref: how close the texts that the model writes after "
        "unseen prompts are to the n-gram reference.",
    ),
    Effect(
        "heldout_loss_fall",
        "Fall in held-out loss",
        NATS,
        "How much an operation lowers the loss on real held-out text.",
    ),
]


def operations_section(runs: Sequence[Run], figures: dict[str, Figure]) -> Html:
    """Show the surgeon's effect, and the operations by phase, test and round."""
    if not any(run.of_kind("operation") or run.measurements for run in runs):
        return paragraph("There were no operations.")
    head = ["Phase", "Operations", "Mean return", "Best return", "Above zero", "Flatlines"]
    parts = [*_effects(runs, figures), run_table("Operations by phase", head, runs, _returns)]
    if any(run.of_kind("commit") or run.summary.get("commits") for run in runs):
        parts.append(by_run(runs, _commits))
    if any(run.of_kind("commit") for run in runs):
        title = "Operations tested for a commit, with 95 % intervals"
        head = ["Test", "Phase", "Update", "Outcome", "Gain in kl_ref", "Fall in held-out loss"]
        parts.append(run_table(title, [*head, "Coefficients"], runs, _tests))
    frames = [frame for run in runs for frame in _coefficients(run, figures)]
    return join([*parts, grid(frames)])


def measured(runs: Sequence[Run]) -> list[Effect]:
    """Return the measures that at least one run has."""
    rows = [row for run in runs for row in run.measurements]
    return [effect for effect in EFFECTS if any(row.get(effect.key) for row in rows)]


def _effects(runs: Sequence[Run], figures: dict[str, Figure]) -> Iterable[Html]:
    """Yield figures and a table; for several runs, the figures show the last measurements."""
    effects, frames = measured(runs), []
    if not effects:
        return
    for effect in effects:
        rows = [
            {"label": f"after {row['after']}" if len(runs) == 1 else run.name, **row[effect.key]}
            for run in runs
            for row in (run.measurements if len(runs) == 1 else run.measurements[-1:])
            if row.get(effect.key)
        ]
        key = f"effect-{effect.key}"
        figures[key] = {"type": "effect", "unit": effect.unit, "rows": rows}
        spoken = "; ".join(f"{row['label']}: {interval(row['surgeon'])}" for row in rows)
        caption = f"{effect.caption} Right of zero is better. Bars are 95 % intervals."
        frames.append(figure(key, effect.title, caption, spoken))

    def rows_of(run: Run) -> Iterable[tuple[object, ...]]:
        for row in run.measurements:
            for policy in POLICIES:
                gains = (interval((row.get(e.key) or {}).get(policy)) for e in effects)
                sizes = (row.get(name, DASH) for name in ("n_prompts", "n_operations"))
                yield f"after {row['after']}", policy, *gains, *sizes

    titles = (effect.title for effect in effects)
    head = ("Measured", "Operations by", *titles, "Prompts", "Operations")
    yield grid(frames)
    yield run_table("The surgeon compared with random operations and none", head, runs, rows_of)


def _returns(run: Run) -> Iterable[tuple[object, ...]]:
    operations = run.of_kind("operation")
    for phase in dict.fromkeys(row["phase"] for row in operations):
        rows = [row for row in operations if row["phase"] == phase]
        returns = [row["surgeon/return"] for row in rows if row.get("surgeon/return") is not None]
        yield (
            phase,
            len(rows),
            signed(mean(returns)),
            signed(max(returns, default=None)),
            percent(mean([float(value > 0) for value in returns])),
            ", ".join(f"{n} {cause}" for cause, n in flatlines(rows).items()) or "none",
        )


def _commits(run: Run) -> Html:
    """Describe the commit policy and its results."""
    parts = []
    if summary := run.summary.get("commits"):
        text = (
            f"Commit policy: {summary.get('policy', DASH)}. Operations tested on fresh prompts: "
            f"{summary.get('tried', 0)}; kept: {summary.get('kept', 0)}."
        )
        if expected := summary.get("expected_false_at_most"):
            text += f" Chance alone would keep at most {number(expected, 2)} on average."
        parts.append(paragraph(text))
    if rounds := run.of_kind("behavior"):
        n_operated = sum(bool(row.get("behavior/operated")) for row in rounds)
        text = (
            f"After {n_operated} of {len(rounds)} rounds an operation helped on its own prompts; "
            "until the next round the operated model sampled the training texts."
        )
        parts.append(paragraph(text))
    return join(parts)


def _tests(run: Run) -> Iterable[tuple[object, ...]]:
    for index, row in enumerate(run.of_kind("commit"), start=1):
        coefficients = row.get("commit/coefficients") or []
        shown = [number(value, 2) for value in coefficients[:_MOST_COEFFICIENTS]]
        yield (
            index,
            row["phase"],
            row.get("update"),
            Html('<span class="yes">kept</span>') if row.get("commit/kept") else "undone",
            interval(row.get("commit/kl_ref_gain")),
            interval(row.get("commit/heldout_loss_fall")),
            ", ".join(shown) + (", \u2026" if len(coefficients) > len(shown) else "") or DASH,
        )


def _coefficients(run: Run, figures: dict[str, Figure]) -> Iterable[Html]:
    drawn = coefficient_figure(run)
    if drawn is not None:
        key = f"coefficients-{run.index}"
        figures[key] = drawn
        yield figure(
            key,
            f"Coefficients of the operations: {run.name}",
            "Columns are rounds of operations, rows are coefficients, averaged over the round. "
            "Zero leaves the model unchanged. An even colour along a row means that the surgeon "
            "has settled on a value.",
            "Means of the last round: " + ", ".join(number(row[-1], 2) for row in drawn["z"]),
        )
