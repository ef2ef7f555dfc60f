"""`avatarl --help`: the list of commands."""

from __future__ import annotations

from collections.abc import Sequence

from agents.cli import COMMANDS
from agents.cli.parsing import refusing
from avatarl_env.errors import check_choice


def main(words: Sequence[str], prog: str) -> str:
    """Return the list of commands.

    Raises:
        Refusal: if the words begin with an unknown command.
    """
    if words and words[0] not in ("-h", "--help"):
        with refusing(ValueError):
            check_choice("command", words[0], COMMANDS)
    lines = [f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items()]
    end = f"{prog} COMMAND --help lists its arguments"
    return "\n".join([f"usage: {prog} COMMAND ...", "", *lines, "", end])
