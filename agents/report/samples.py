"""The report's section on samples: what the model wrote, without and with an operation."""

from __future__ import annotations

from agents.report.data import Row, RunRecord
from agents.report.diff import mark_changes
from agents.report.parts import Html, escape, join, paragraph

_SAMPLES_PER_PHASE = 2


def samples_section(run: RunRecord) -> Html:
    """Write texts of every phase, operated ones beside unoperated ones."""
    rows = run.of_kind("sample")
    if not rows:
        return paragraph("No text has been sampled yet.")
    parts = [paragraph("The prompt is in bold; all that follows it was written by the model.")]
    if any(row.get("operated_text") is not None for row in rows):
        parts.append(
            Html(
                "<p>Side by side stand texts that began with the same prompt and the same luck. "
                "What only the text <del>without the operation</del> has and what only the one "
                "<ins>with it</ins> has is marked, word by word.</p>"
            )
        )
    for name in dict.fromkeys(row["phase"] for row in rows):
        mine = [row for row in rows if row["phase"] == name]
        # The last ones show where the phase led to; the first one of all, where it began.
        chosen = mine[-_SAMPLES_PER_PHASE:]
        if mine[0] is rows[0] and mine[0] not in chosen:
            chosen = [mine[0], *chosen]
        parts.append(Html(f"<h3>{escape(name)}</h3>"))
        parts += [_sample(row) for row in chosen]
    return join(parts)


def _sample(row: Row) -> Html:
    where = f"after {row.get('update')} updates and {row.get('operation')} operations"
    text, operated = str(row.get("text", "")), row.get("operated_text")
    if operated is None:
        sides = [_side("", row, escape(text))]
    else:
        marked = mark_changes(text, str(operated))
        sides = [
            _side("without an operation", row, marked.before),
            _side("with the surgeon's operation", row, marked.after),
        ]
        where += (
            f"; {100 * marked.changed:.0f} % of the words differ"
            if text != operated
            else "; the operation changed nothing here"
        )
    return Html(
        f'<div class="sample"><p class="note">{escape(where)}</p>'
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def _side(title: str, row: Row, text: Html) -> Html:
    heading = f"<h4>{escape(title)}</h4>" if title else ""
    prompt = escape(row.get("prompt", ""))
    return Html(f'<div>{heading}<div class="text"><strong>{prompt}</strong>{text}</div></div>')
