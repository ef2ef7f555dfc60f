"""The commands of `avatarl`, one module each."""

from __future__ import annotations

COMMANDS = {
    "train": "train a model by RL, operate on it, and report the surgeon's effect",
    "sample": "write text with a stored model, with or without an operation",
    "evaluate": "measure a stored model, and a saved surgeon, on validation text",
    "report": "write the reports of runs again, and a page that compares them",
    "export": "convert a stored model to the format of transformers",
}
"""Commands; `agents.cli.NAME.main(words, prog)` runs one and returns the text to print."""


class Refusal(Exception):
    """A command cannot do what was asked; the message gives the reason."""

    code = 2
    """The exit code."""


class Failure(Refusal):
    """A command failed after it had started."""

    code = 1
