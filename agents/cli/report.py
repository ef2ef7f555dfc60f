"""`avatarl report`: the report of each run, and a comparison of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.parsing import read_words, refusing


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of each run again and, of several runs, a page that compares them."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR ...")]]
    """Run folders."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The page that compares several runs; default comparison.html."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("folders must name at least one run, got none")


def main(words: Sequence[str], prog: str) -> str:
    """Write the pages; return their paths.

    Raises:
        Refusal: if a folder is not a run's, or a page cannot be written.
        SystemExit: after `--help`.
    """
    request = read_words(Report, words, prog)
    from agents.report import write_reports

    folders = [Path(folder) for folder in request.folders]
    with refusing(ValueError, OSError):
        pages = write_reports(folders, None if request.out is None else Path(request.out))
    return "\n".join(str(page) for page in pages)
