"""The report's section on the result: headline numbers beside the tables they are measured by."""

from __future__ import annotations

from agents.report.data import Row, RunRecord
from agents.report.parts import Html, bars, join, number, paragraph, percent, tile

_CONTROL_NAME = "supervised control"


def result_section(run: RunRecord, control: RunRecord | None = None) -> Html:
    """Write the headline numbers, beside those of the n-gram tables.

    Args:
        run: The run.
        control: A supervised run on the same text, to compare with.
    """
    scores = run.scores()
    if not scores:
        return paragraph("Nothing has been measured yet.")
    references = run.fact("references") or []
    where = "all of the held-out text"
    if not run.finished:
        where = "a fixed slice of the held-out text"
        where += ", the tables on all of it" if references else ""
    tiles = [
        tile(
            "Next-character accuracy",
            percent(scores.get("accuracy")),
            "",
            "Share of characters guessed right. Higher is better.",
        ),
        tile(
            "Loss",
            number(scores.get("loss")),
            "nats per character",
            "How surprised the model is by the text. Lower is better.",
        ),
        tile(
            "Compression",
            number(scores.get("bits_per_char")),
            "bits per character",
            "The same loss in bits. Lower is better.",
        ),
        tile(
            "Entropy",
            number(scores.get("entropy")),
            "nats per character",
            "How undecided the model is. Near zero it would repeat itself.",
        ),
    ]
    if "calibration_error" in scores:  # runs of before do not have it
        tiles.append(
            tile(
                "Calibration error",
                percent(scores["calibration_error"]),
                "",
                "How far the confidence in the first guess is from how often that is right, on "
                "average over 15 ranges of confidence. Lower is better.",
            )
        )
    parts = [
        # What was measured on different texts says nothing of who is ahead.
        paragraph(f"Measured on {where}. {_standing(scores, references)}".strip())
        if run.finished
        else paragraph(f"Measured on {where}."),
        Html('<dl class="tiles">' + join(tiles) + "</dl>"),
    ]
    beside = control.scores() if control is not None else {}
    if "accuracy" in beside and "loss" in beside:
        references = [*references, {**beside, "name": _CONTROL_NAME}]
    if references:
        parts.append(_reference_bars(run, scores, references))
    if control is not None:
        parts.append(paragraph(_control_note(run, control), "note"))
    return join(parts)


def _standing(scores: Row, references: list[Row]) -> str:
    """Say in words where the model stands among n-gram tables, by accuracy and by loss.

    Only a table that it is ahead of in both is one that it predicts better than. What the page
    shows as the same number counts as equal.
    """
    known = [row for row in references if _has_both(row)]
    if not _has_both(scores) or not known:
        return ""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in sorted(known, key=lambda row: (-float(row["loss"]), float(row["accuracy"]))):
        by_accuracy = _lead(scores["accuracy"], row["accuracy"])
        by_loss = _lead(row["loss"], scores["loss"])
        figures = f"the {row['name']} table ({percent(row['accuracy'])}, {number(row['loss'])})"
        groups.setdefault((by_accuracy, by_loss), []).append(figures)
    sentences = []
    if ahead := groups.pop(("better", "better"), []):
        sentences.append(f"By accuracy and by loss the model is better than {ahead[-1]}.")
    if behind := groups.pop(("worse", "worse"), []):
        sentences.append(f"By accuracy and by loss the model is worse than {behind[0]}.")
    for (by_accuracy, by_loss), names in groups.items():
        sentences.append(
            f"Beside {', '.join(names)} its accuracy is {by_accuracy} and its loss is {by_loss}."
        )
    return " ".join(sentences)


def _has_both(row: Row) -> bool:
    return all(isinstance(row.get(name), int | float) for name in ("accuracy", "loss"))


def _lead(ours: float, theirs: float) -> str:
    lead = round(ours, 3) - round(theirs, 3)  # as shown
    return "better" if lead > 0 else "worse" if lead < 0 else "equal"


def _control_note(run: RunRecord, control: RunRecord) -> str:
    note = (
        f"The supervised control is the run {control.name}, whose model was shown the right "
        "characters (cross-entropy): no reinforcement learning, but how far such training gets."
    )
    if not control.finished:
        note += " It has not finished."
    if control.fact("corpus_sha256") != run.fact("corpus_sha256"):
        note += " It read another text, so that the numbers must not be compared."
    return note


def _reference_bars(run: RunRecord, scores: Row, references: list[Row]) -> Html:
    own = "this model"
    accuracies = [(row["name"], row["accuracy"]) for row in references]
    accuracies.append((own, scores["accuracy"]))
    losses = [(row["name"], row["loss"]) for row in references]
    losses.append((own, scores["loss"]))
    floor = run.fact("corpus_nats_per_char")
    if floor is not None:
        losses.append(("true entropy of the text", floor))
    return Html(
        '<div class="figures">'
        + bars(
            "Accuracy (longer is better)",
            [(name, value or 0.0, percent(value)) for name, value in accuracies],
            own,
        )
        + bars(
            "Loss, nats per character (shorter is better)",
            [(name, value or 0.0, number(value)) for name, value in losses],
            own,
        )
        + "</div>"
    )
