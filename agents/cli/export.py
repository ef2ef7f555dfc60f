"""`avatarl export`: convert a stored model to the format of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli import Refusal
from agents.cli.parsing import Run, read_words, refusing
from avatarl_env.lm.export import export_model
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer


@dataclass(frozen=True, kw_only=True)
class Export:
    """Convert a stored model to the format of transformers, which loads without this package."""

    run: Run
    """Run folder, model folder, or: bundled."""
    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """A new or empty folder."""


def main(words: Sequence[str], prog: str) -> str:
    """Export a model; return the code that loads it.

    Raises:
        Refusal: if there is no such model, or the folder is not empty.
        SystemExit: after `--help`.
    """
    request = read_words(Export, words, prog)
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of a single file
    with refusing(ValueError, lm="run"):
        stored = load_model(request.run)
        model, tokenizer = stored.model, stored.tokenizer
        if not isinstance(model, GPT) or not isinstance(tokenizer, CharTokenizer):
            raise Refusal(
                f"run must be a model of this package, {request.run!r} is one of transformers"
            )
        corpus = Path(str(stored.about.get("corpus", ""))).name
        export_model(request.out, model, tokenizer, corpus or None)
    return (
        f"exported to {request.out}: AutoModelForCausalLM.from_pretrained({request.out!r}), "
        f"AutoTokenizer.from_pretrained({request.out!r})"
    )
