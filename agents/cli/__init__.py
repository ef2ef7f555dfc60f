"""The commands of `avatarl`, one module each."""

from __future__ import annotations

COMMANDS = {
    "train": "train a model by RL, operate on it, and report what the surgeon was worth",
    "sample": "write text with a stored model, with or without an operation",
    "evaluate": "measure a stored model, and a saved surgeon, on validation text",
    "report": "write a run's report again, or several runs on one page",
    "export": "turn a stored model into a folder of transformers",
}
"""Command NAME is `agents.cli.NAME.main(words, prog)`, which returns the text to print."""


class Refusal(Exception):
    """A command cannot do what was asked; the message says why."""

    code = 2
    """The exit code."""


class Failure(Refusal):
    """A command failed after it had begun."""

    code = 1
