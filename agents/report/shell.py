"""What every page of ours is wrapped in: styles, figures, and the scripts that draw them."""

from __future__ import annotations

import functools
import importlib.resources
import json
from pathlib import Path
from string import Template

from agents.report.marks import Figure
from avatarl_env.files import write_atomically


def write_page(
    path: Path,
    *,
    title: str,
    body: str,
    figures: dict[str, Figure],
    reload_seconds: int | None = None,
) -> Path:
    """Write a page that needs no network and no other file.

    The file is replaced in one step: who looks at it meanwhile finds the old page or the new one.

    Args:
        path: Where to.
        title: Title, as markup.
        body: Everything between the body's tags but the scripts, as markup.
        figures: Figures by the key of their frame.
        reload_seconds: After how long the browser is to load the page anew; None for never.

    Returns:
        The path.
    """
    reload = (
        ""
        if reload_seconds is None
        else f'<meta http-equiv="refresh" content="{reload_seconds}">\n'
    )
    page = Template(part("shell.html")).substitute(
        title=title,
        reload=reload,
        style=part("style.css"),
        body=body,
        figures=script_json(figures),
        plotly=_plotly(),
        draw=part("draw.js"),
    )
    # A path in it may hold bytes that are not text.
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


@functools.cache
def part(name: str) -> str:
    """Read one of the files that the pages are put together from."""
    return importlib.resources.files("agents.report").joinpath(name).read_text(encoding="utf-8")


def script_json(value: object) -> str:
    """Write JSON that cannot end the script element that it stands in.

    Only `<` can begin what a parser of HTML reacts to inside a script, and in JSON it stands only
    inside strings, where it may be written as an escape.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
