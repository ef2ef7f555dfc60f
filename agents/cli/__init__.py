"""The commands of `avatarl`, one module each: words in, the text to be printed out."""

from __future__ import annotations

COMMANDS = {
    "train": "train a model by RL, operate on it, and say what the surgeon was worth",
    "sample": "write text with a stored model, also under an operation",
    "evaluate": "measure a stored model, and a saved surgeon, on validation text",
    "report": "write a run's report again, or several runs on one page",
    "export": "turn a stored model into a folder of transformers",
}
"""What each is for; command NAME is `agents.cli.NAME.main(words, prog)`."""
