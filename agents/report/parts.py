"""Building blocks of the report's HTML; every text that goes in is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH = "\u2013"
MINUS = "\u2212"


class Html(str):
    """Markup that is ready for the page; any other string gets escaped."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Make a value safe for the text and the attributes of a page; markup stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[str]) -> Html:
    """Put markup together, one part per line."""
    return Html("\n".join(escape(part) for part in parts))


def paragraph(text: object, css: str = "") -> Html:
    """Write one paragraph."""
    return Html(f"<p{_css(css)}>{escape(text)}</p>")


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many decimals, a dash where there is none."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """Write a share in percent, a dash where there is none."""
    return DASH if value is None else number(100 * value, 1) + "\u202f%"


def interval(gain: Mapping[str, float | None]) -> str:
    """Write a mean and its 95 % interval."""
    low, high = number(gain["low"], 4), number(gain["high"], 4)
    return f"{signed(gain['mean'])} [{low}, {high}]"


def signed(value: float | None) -> str:
    """Write a difference with its sign."""
    sign = "+" if value is not None and value > 0 else ""
    return sign + number(value, 4)


def duration(seconds: float) -> str:
    """Write a duration in hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Write a table whose first column names the row.

    It scrolls inside the page where it is too large, also by keyboard.
    """
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


def settings(title: str, values: Mapping[str, Any], *, is_open: bool = False) -> Html:
    """Write nested names and values as a list that folds."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in flat(values)
    )
    return Html(
        f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>\n"
        f'<table class="settings"><tbody>\n{rows}\n</tbody></table></details>'
    )


def bars(caption: str, rows: Sequence[tuple[str, float, str]], own: str) -> Html:
    """Write horizontal bars.

    Args:
        caption: What they show.
        rows: Name, length and the length in words, for each bar.
        own: Name of the bar to bring out.
    """
    longest = max(length for _, length, _ in rows) or 1.0
    body = "\n".join(
        f'<tr{_css("own" if name == own else "")}><th scope="row">{escape(name)}</th>'
        f'<td><span style="width:{100 * length / longest:.1f}%"></span></td>'
        f"<td>{escape(words)}</td></tr>"
        for name, length, words in rows
    )
    return Html(
        f'<table class="bars"><caption>{escape(caption)}</caption>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


def tile(name: str, value: str, unit: str, note: str) -> Html:
    """Write one headline number."""
    return Html(
        f'<div><dt>{escape(name)}</dt><dd><span class="value">{escape(value)}</span> '
        f'<span class="unit">{escape(unit)}</span><p class="note">{escape(note)}</p></dd></div>'
    )


def figure(key: str, title: str, caption: str, spoken: str) -> Html:
    """Write the frame that the plot of that key is drawn into.

    Args:
        key: Key of the plot among the page's figures.
        title: Heading.
        caption: What one sees.
        spoken: What somebody is told who cannot see the plot.
    """
    return Html(
        f"<figure>\n<h3>{escape(title)}</h3>\n"
        f'<figcaption id="caption-{escape(key)}">{escape(caption)}</figcaption>\n'
        f'<div class="plot" id="plot-{escape(key)}" role="img" aria-label="{escape(spoken)}" '
        f'aria-describedby="caption-{escape(key)}"></div>\n</figure>'
    )


def toggles(title: str, choices: Sequence[tuple[str, str, str]]) -> Html:
    """Write boxes that show and hide layers in all figures of the page.

    Args:
        title: What they are for.
        choices: Key of the layer, what it is called, and its colour or nothing, for each box.
    """
    if not choices:
        return Html("")
    boxes = "".join(
        f'<label><input type="checkbox" checked data-layer="{escape(key)}">'
        + (f'<i style="background:{escape(colour)}"></i>' if colour else "")
        + f"{escape(name)}</label>"
        for key, name, colour in choices
    )
    return Html(
        f'<fieldset class="toggles"><legend>{escape(title)}</legend>{boxes}</fieldset>\n'
        '<p class="note zoom">Point at a curve to read it, drag over it to zoom in, double-click '
        "to see all of it again.</p>"
    )


def _css(name: str) -> str:
    return f' class="{name}"' if name else ""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Give the names, with dots, and values of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", DASH if value is None else value
