"""The model of a run that has not finished, as its newest checkpoint has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from agents.cli.parsing import Refusal, read_json, refusing

if TYPE_CHECKING:
    from avatarl_env.lm.storage import StoredModel


def load_unfinished(run: str) -> tuple[StoredModel, Path] | None:
    """Load the model of a run's newest checkpoint, on the CPU and in eval mode.

    A checkpoint has no vocabulary: it is that of the training text, which has to be there.

    Args:
        run: a folder.

    Returns:
        The model and the checkpoint's folder; None if the folder is not that of a run, or of one
        that has finished.

    Raises:
        Refusal: if there is no checkpoint yet, it is damaged, or the text is not the same.
    """
    from avatarl_env.lm.storage import is_unfinished

    folder = Path(run)
    if not is_unfinished(folder):
        return None
    from agents.training.checkpoint import checkpoints, read, read_about
    from avatarl_env.lm.gpt import GPTConfig
    from avatarl_env.lm.storage import StoredModel, build_stored
    from avatarl_env.lm.tokenizer import CharTokenizer
    from avatarl_env.text.corpus import load_corpus

    known = checkpoints(folder / "checkpoints")
    if not known:
        raise Refusal(f"run must have a checkpoint, {run!r} has not finished and has none yet")
    settings, newest = read_json(folder / "config.json"), known[-1]
    try:
        read_about(newest)
        corpus = load_corpus(settings["corpus"])
        if corpus.sha256 != settings["corpus_sha256"]:
            raise Refusal(
                f"corpus {corpus.name!r} must be the text that {run!r} learns, with sha256 "
                f"{settings['corpus_sha256']}, got {corpus.sha256}"
            )
        tokenizer = CharTokenizer.from_text(corpus.split("train"))
        sizes = GPTConfig(vocab_size=tokenizer.vocab_size, **settings["lm"])
        with refusing(ValueError, lm="run"):
            model = build_stored(newest, sizes, read(newest)["model"], "config.json")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Refusal(
            f"run must have a whole checkpoint, {run!r} has not finished and {os.fspath(newest)!r} "
            f"cannot be read: {error}"
        ) from error
    return StoredModel(model, tokenizer, {}), newest
