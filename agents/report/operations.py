"""The report's section on operations: what they were worth, how they went, which were kept."""

from __future__ import annotations

from agents.report.data import Row, RunRecord, flatlines
from agents.report.figures import WHO, effect_figure
from agents.report.heat import coefficient_cells, coefficient_figure
from agents.report.marks import Figure
from agents.report.parts import (
    DASH,
    Html,
    figure,
    interval,
    join,
    number,
    paragraph,
    percent,
    signed,
    table,
)

EFFECTS = (
    (
        "kl_ref_gain",
        "Gain in kl_ref",
        "nats per character",
        "By how much the operation raises kl_ref: the model's own texts after fresh held-out "
        "prompts, and how near they are to the n-gram reference. Right of zero is better.",
    ),
    (
        "heldout_loss_fall",
        "Fall in held-out loss",
        "nats per character",
        "By how much an operation lowers the loss on real held-out text. Right of zero is better.",
    ),
)


def operations_section(run: RunRecord, figures: dict[str, Figure]) -> Html:
    """Write the whole section.

    Args:
        run: The run.
        figures: The page's figures by key; those of this section are added.
    """
    operations = run.of_kind("operation")
    effect = run.summary.get("surgeon_effect") or {}
    measurements = effect.get("measurements") or []
    if not operations and not measurements:
        return paragraph("There were no operations.")
    parts = [_effect(measurements, figures)] if measurements else []
    if operations:
        parts.append(_operation_table(run, operations))
    parts.append(_commits(run))
    parts.append(_coefficients(run, figures))
    return join(parts)


def _coefficients(run: RunRecord, figures: dict[str, Figure]) -> Html:
    drawn = coefficient_figure(run)
    if drawn is None:
        return Html("")
    figures["coefficients"] = drawn
    (trace,) = drawn["data"]
    spoken = "Mean coefficients of the last round: " + ", ".join(
        number(line[-1], 2) for line in trace["z"]
    )
    caption = (
        "Each column is one round of operations, each row one coefficient, averaged over it. "
        "Zero leaves the model as it is. Even colours along a row mean that the surgeon has made "
        "up its mind about it."
    )
    frame = figure("coefficients", "What the surgeon did to the weights", caption, spoken)
    return Html(f'<div class="figures">{frame}</div>')


def _effect(measurements: list[Row], figures: dict[str, Figure]) -> Html:
    frames = []
    for quantity, title, unit, caption in EFFECTS:
        key = f"effect-{quantity}"
        figures[key] = effect_figure(measurements, quantity, unit)
        spoken = "; ".join(
            f"after {measurement['after']}, {who}: {interval(measurement[quantity][who])}"
            for measurement in measurements
            for who in WHO
        )
        frames.append(figure(key, title, f"{caption} The bars are 95 % intervals.", spoken))
    rows = [
        (
            f"after {measurement['after']}",
            who,
            *(interval(measurement[quantity][who]) for quantity, *_ in EFFECTS),
            measurement["n_prompts"],
            measurement["n_operations"],
        )
        for measurement in measurements
        for who in WHO
    ]
    head = (
        "Measured",
        "Who operated",
        *(title for _, title, *_ in EFFECTS),
        "Prompts",
        "Operations",
    )
    return join(
        [
            Html(f'<div class="figures">{join(frames)}</div>'),
            table("The surgeon beside chance and beside doing nothing", head, rows),
        ]
    )


def _operation_table(run: RunRecord, operations: list[Row]) -> Html:
    rows = []
    for name in dict.fromkeys(row["phase"] for row in operations):
        mine = [row for row in operations if row["phase"] == name]
        returns = [row["surgeon/return"] for row in mine if row.get("surgeon/return") is not None]
        helped = sum(value > 0 for value in returns)
        rows.append(
            (
                name,
                len(mine),
                signed(_mean(returns)),
                signed(max(returns, default=None)),
                percent(helped / len(returns) if returns else None),
                ", ".join(f"{count} {cause}" for cause, count in flatlines(mine).items()) or "none",
                number(_mean([row.get("surgeon/length") for row in mine]), 1),
                number(_mean([row.get("surgeon/mean_abs_action") for row in mine]), 2),
            )
        )
    head = (
        "Phase",
        "Operations",
        "Mean return",
        "Best return",
        "Above zero",
        "Flatlines",
        "Mean length",
        "Mean |action|",
    )
    return table("Operations, by phase", head, rows)


def _commits(run: RunRecord) -> Html:
    tries = run.of_kind("commit")
    summary = run.summary.get("commits") or {}
    parts = []
    if summary:
        text = (
            f"Commit policy: {summary.get('policy', DASH)}. Put to the test on fresh draws from "
            "the text reserved for the surgeon: "
            f"{summary.get('tried', len(tries))}; kept: {summary.get('kept', 0)}."
        )
        expected = summary.get("expected_false_at_most")
        if expected:
            text += f" Luck alone would keep at most {number(expected, 2)} of them on average."
        parts.append(paragraph(text))
    chosen = run.of_kind("behavior")
    if chosen:
        n_operated = sum(bool(row.get("behavior/operated")) for row in chosen)
        text = (
            f"After {n_operated} of {len(chosen)} rounds an operation was found that helped on its "
            "own prompts: until the next one the operated model wrote what the model as it stands "
            "learned from."
        )
        parts.append(paragraph(text))
    if tries:
        rows = [_commit_row(index, row) for index, row in enumerate(tries, start=1)]
        head = (
            "Try",
            "Phase",
            "Update",
            "Kept",
            "Gain in kl_ref",
            "Fall in held-out loss",
            "Coefficients",
        )
        parts.append(table("Operations put to the test, with 95 % intervals", head, rows))
    return join(parts)


def _commit_row(index: int, row: Row) -> tuple[object, ...]:
    return (
        index,
        row["phase"],
        row["update"],
        Html('<span class="yes">kept</span>') if row.get("commit/kept") else "undone",
        interval(row["commit/kl_ref_gain"]),
        interval(row["commit/heldout_loss_fall"]),
        coefficient_cells(row.get("commit/coefficients") or []),
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
