"""Building blocks of the pages; all text is escaped here."""

from __future__ import annotations

import difflib
import functools
import html
import importlib.resources
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agents.report.data import Run

DASH = "\u2013"
MINUS = "\u2212"

_WORDS = re.compile(r"\S+\s*|\s+")


class Html(str):
    """Markup that is ready for the page; any other string is escaped."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Escape a value for the text and the attributes of a page; markup is not changed."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[str]) -> Html:
    """Join markup, one part per line."""
    return Html("\n".join(escape(part) for part in parts))


def paragraph(text: object, css: str = "") -> Html:
    """Return one paragraph, with a CSS class if one is given."""
    return Html(f"<p{_css(css)}>{escape(text)}</p>")


def grid(frames: Iterable[str]) -> Html:
    """Arrange figures or bars side by side."""
    return Html(f'<div class="figures">{join(frames)}</div>')


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` decimals, or None as a dash."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Format a share in percent, or None as a dash."""
    return DASH if value is None else number(100 * value, 1) + "\u202f%"


def signed(value: float | None) -> str:
    """Format a difference with its sign."""
    return ("+" if value is not None and value > 0 else "") + number(value, 4)


def interval(gain: Mapping[str, float | None] | None) -> str:
    """Format a mean with its 95 % interval, or None as a dash."""
    if gain is None:
        return DASH
    return f"{signed(gain['mean'])} [{number(gain['low'], 4)}, {number(gain['high'], 4)}]"


def duration(seconds: float) -> str:
    """Format a duration in hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yield the dotted names and the values of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", DASH if value is None else value


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table with row names in the first column; it scrolls if it is too large."""
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table><caption><span>{escape(caption)}</span></caption>\n"
        f"<thead><tr>{names}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def run_table(
    caption: str,
    head: Sequence[str],
    runs: Sequence[Run],
    rows_of: Callable[[Run], Iterable[Sequence[object]]],
) -> Html:
    """Return a table of rows from every run; with several runs, the first column names them."""
    if len(runs) == 1:
        return table(caption, head, rows_of(runs[0]))
    rows = [(run_name(run), *row) for run in runs for row in rows_of(run)]
    return table(caption, ("Run", *head), rows)


def by_run(runs: Sequence[Run], text_of: Callable[[Run], str]) -> Html:
    """Return the text of a single run, or the texts of several with their names and tags."""
    if len(runs) == 1:
        return escape(text_of(runs[0]))
    items = []
    for run in runs:
        tags = "".join(f' <span class="tag">{escape(tag)}</span>' for tag in run.tags)
        items.append(f"<dt>{run_name(run)}{tags}</dt><dd>{escape(text_of(run))}</dd>")
    return Html(f'<dl class="words">{"".join(items)}</dl>')


def run_name(run: Run) -> Html:
    """Return a run's name with its colour, linked to its own report if there is one."""
    name = escape(run.name)
    if run.link:
        name = Html(f'<a href="{escape(run.link)}">{name}</a>')
    return Html(f'<i class="swatch" style="background:{run_colour(run)}"></i>{name}')


def run_colour(run: Run) -> str:
    """Return the CSS colour of a run on a page of several; draw.js uses the same."""
    return f"var(--run-{run.index % 8})"


def fold(title: str, content: str) -> Html:
    """Return content that a click on its title shows."""
    body = escape(content)
    return Html(f"<details><summary>{escape(title)}</summary>\n{body}</details>")


def bars(caption: str, rows: Sequence[tuple[str, float | None, str, bool]]) -> Html:
    """Return horizontal bars; each row has a name, length, formatted length and emphasis."""
    longest = max(length or 0.0 for _, length, *_ in rows) or 1.0
    body = "\n".join(
        f'<tr{_css("own" if own else "")}><th scope="row">{escape(name)}</th>'
        f'<td><span style="width:{100 * (length or 0.0) / longest:.1f}%"></span></td>'
        f"<td>{escape(words)}</td></tr>"
        for name, length, words, own in rows
    )
    return Html(
        f'<table class="bars"><caption>{escape(caption)}</caption>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


def tiles(values: Iterable[tuple[str, str, str]]) -> Html:
    """Return headline numbers: name, number and unit of each."""
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd><span class="value">{escape(value)}</span> '
        f'<span class="unit">{escape(unit)}</span></dd></div>'
        for name, value, unit in values
    )
    return Html(f'<dl class="tiles">{items}</dl>')


def figure(key: str, title: str, caption: str, spoken: str) -> Html:
    """Return the frame into which draw.js draws a figure.

    Args:
        key: of the figure's data.
        title: heading.
        caption: explanation.
        spoken: text for screen readers.
    """
    return Html(
        f"<figure>\n<h3>{escape(title)}</h3>\n"
        f'<figcaption id="caption-{escape(key)}">{escape(caption)}</figcaption>\n'
        f'<div class="plot" id="plot-{escape(key)}" role="img" aria-label="{escape(spoken)}" '
        f'aria-describedby="caption-{escape(key)}"></div>\n</figure>'
    )


def toggles(title: str, choices: Sequence[tuple[str, str, str]]) -> Html:
    """Return checkboxes that show and hide layers in all figures.

    Args:
        title: legend.
        choices: for each box, the layer's key, its name, and its colour or an empty string.
    """
    boxes = "".join(
        f'<label><input type="checkbox" checked data-layer="{escape(key)}">'
        + (f'<i style="background:{escape(colour)}"></i>' if colour else "")
        + f"{escape(name)}</label>"
        for key, name, colour in choices
    )
    return Html(
        f'<fieldset class="toggles"><legend>{escape(title)}</legend>{boxes}</fieldset>\n'
        '<p class="note zoom">Point at a curve to read its value, drag to zoom in, double-click to '
        "zoom out.</p>"
    )


def mark_changes(before: str, after: str) -> tuple[Html, Html, float]:
    """Mark the words that differ between two texts.

    Returns:
        The first text with deletions marked, the second with insertions marked, and the share of
        all words that are marked, in [0, 1].
    """
    left, right = _WORDS.findall(before), _WORDS.findall(after)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    sides: tuple[list[str], list[str]] = ([], [])
    for name, i, j, k, m in matcher.get_opcodes():
        for side, tag, words in zip(sides, ("del", "ins"), (left[i:j], right[k:m]), strict=True):
            text = escape("".join(words))
            side.append(text if name == "equal" or not text else f"<{tag}>{text}</{tag}>")
    return Html("".join(sides[0])), Html("".join(sides[1])), 1.0 - matcher.ratio()


@functools.cache
def part(name: str) -> str:
    """Read a file of this package that is part of the pages."""
    return importlib.resources.files("agents.report").joinpath(name).read_text(encoding="utf-8")


def _css(name: str) -> str:
    return f' class="{name}"' if name else ""
