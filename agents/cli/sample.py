"""`avatarl sample`: text written by a stored model, with or without an operation."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from agents.cli import Refusal
from agents.cli.operation import DEFAULT_OPERATOR, Operation, read_operation
from agents.cli.parsing import Run, read_json, read_words, refusing, run_settings
from agents.training.checkpoint import checkpoints, read, read_about
from avatarl_env.files import is_utf8
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPTConfig
from avatarl_env.lm.hub import HubTokenizer
from avatarl_env.lm.protocols import Tokenizer
from avatarl_env.lm.storage import (
    StoredModel,
    build_stored,
    is_unfinished,
    load_model,
    move_model,
)
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.memory import check_memory
from avatarl_env.text.corpus import load_corpus

MOST_PROMPT = 2**24
"""Largest size of a prompt file in bytes; a device file could be endless."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Write text with a stored model, without and with an operation on the same noise."""

    run: Run
    """Run folder, model folder, or: bundled."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Beginning of the text; default a line break."""
    prompt_file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """UTF-8 file with the prompt, used in full; - for standard input."""
    length: int = 300
    """New tokens (characters for a model of this package); may exceed the context."""
    temperature: float = 1.0
    """Divisor of the logits: below 1, probable tokens become more probable."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Sample from the K most probable tokens; default all."""
    seed: int = 0
    """Seed of the sampling noise."""
    n: int = 1
    """Number of texts, each with its own noise."""
    operation: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON with coefficients, operator, operator_options; or a run's summary.json, metrics.jsonl"""
    coefficients: tuple[float, ...] = ()
    """The operation's coefficients, instead of a file."""
    operator: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Operator of the coefficients; default that of the run, else head_gain."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """float32, bfloat16 or float16; default the precision of the stored model."""

    def __post_init__(self) -> None:
        for name in ("length", "n", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.prompt == "":
            raise ValueError("prompt must not be empty, got ''")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt must not be given with prompt_file, got both")
        if self.operation is not None and self.coefficients:
            raise ValueError("operation must not be given with coefficients, got both")


def main(words: Sequence[str], prog: str) -> str:
    """Return the texts, each with its prompt; the stored model is not changed.

    Raises:
        Refusal: if there is no such model or operation, or the model does not know the prompt.
        SystemExit: after `--help`.
    """
    request = read_words(Sample, words, prog)
    prompt = _prompt(request)
    stored = _load(request.run)
    with refusing(ValueError, lm="run"):
        move_model(stored.model, request.device, request.dtype)
    operation, operated = _operation(request), []
    if operation is not None:
        with operation.on(stored.model):
            operated = _write(request, prompt, stored)
    texts = _write(request, prompt, stored)
    if operated:
        texts = [
            f"--- text\n{text}\n--- text of the operated model\n{other}"
            for text, other in zip(texts, operated, strict=True)
        ]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"=== {number}\n{text}" for number, text in enumerate(texts, start=1))


def _load(run: str) -> StoredModel:
    """Load a stored model; of an unfinished run, that of the newest checkpoint."""
    if not is_unfinished(Path(run)):
        with refusing(ValueError, lm="run"):
            return load_model(run)
    known = checkpoints(Path(run) / "checkpoints")
    if not known:
        raise Refusal(f"run must have a checkpoint, {run!r} has not finished and has none yet")
    try:
        stored = _load_checkpoint(Path(run), known[-1])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Refusal(
            f"run must have a valid checkpoint, {run!r} has not finished and "
            f"{os.fspath(known[-1])!r} cannot be read: {error}"
        ) from error
    warnings.warn(
        f"{run} has not finished: this is the model of its last checkpoint, {known[-1].name}",
        stacklevel=2,
    )
    return stored


def _load_checkpoint(run: Path, checkpoint: Path) -> StoredModel:
    """Load the model of a checkpoint; its vocabulary is computed from the run's corpus."""
    settings = read_json(run / "config.json")
    read_about(checkpoint)
    corpus = load_corpus(settings["corpus"])
    if corpus.sha256 != settings["corpus_sha256"]:
        raise Refusal(
            f"corpus {corpus.name!r} must be the text of {str(run)!r}, with sha256 "
            f"{settings['corpus_sha256']}, got {corpus.sha256}"
        )
    tokenizer = CharTokenizer.from_text(corpus.split("train"))
    sizes = GPTConfig(vocab_size=tokenizer.vocab_size, **settings["lm"])
    with refusing(ValueError, lm="run"):
        model = build_stored(checkpoint, sizes, read(checkpoint)["model"], "config.json")
    return StoredModel(model, tokenizer, {})


def _prompt(request: Sample) -> str:
    name = request.prompt_file
    if name is None:
        return "\n" if request.prompt is None else request.prompt
    try:
        with contextlib.ExitStack() as stack:
            stdin = sys.stdin.buffer
            file = stdin if name == "-" else stack.enter_context(Path(name).open("rb"))
            content = file.read(MOST_PROMPT + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise Refusal(f"prompt_file {name!r} must be readable: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"prompt_file {name!r} must be UTF-8 text: {error}") from error
    if not 0 < len(content) <= MOST_PROMPT:
        size = "more" if content else 0
        raise Refusal(f"prompt_file {name!r} must have 1 to {MOST_PROMPT:,} bytes, got {size}")
    return text


def _operation(request: Sample) -> Operation | None:
    if request.operation is not None:
        return read_operation(Path(request.operation), request.operator)
    if request.coefficients:
        settings = run_settings(Path(request.run)) or {}
        return Operation(
            operator=request.operator or settings.get("operator") or DEFAULT_OPERATOR,
            coefficients=request.coefficients,
            layers=settings.get("layers"),
        )
    if request.operator is not None:
        raise Refusal("operator must come with coefficients or an operation, got neither")
    return None


def _write(request: Sample, text: str, stored: StoredModel) -> list[str]:
    """Return the texts; their noise depends on the request alone."""
    prompt, n, length = _encode(stored.tokenizer, text), request.n, request.length
    with refusing(ValueError):  # bytes: a token has 8, its noise 4 and its probability 8
        check_memory("n times length", n * (8 * len(prompt) + 20 * length))
    device = next(stored.model.parameters()).device
    prompts = torch.tensor(prompt, device=device).repeat(n, 1)
    noise = np.random.default_rng(request.seed).random((n, length), np.float32)
    generation = generate(
        stored.model,
        prompts,
        torch.from_numpy(noise).to(device),
        temperature=request.temperature,
        top_k=request.top_k,
    )
    return [stored.tokenizer.decode(row) for row in generation.tokens.cpu().numpy()]


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if isinstance(tokenizer, HubTokenizer) and not is_utf8(prompt):
        raise Refusal(f"prompt must be text that UTF-8 can hold, got {prompt!r}")
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    unknown = ""
    if isinstance(tokenizer, CharTokenizer):
        unknown = "".join(sorted({c for c in prompt if c not in tokenizer.characters}))
    elif isinstance(tokenizer, HubTokenizer) and tokenizer.tokenizer.unk_token_id in tokens:
        unknown = prompt
    if unknown or not tokens:
        raise Refusal(
            f"prompt must be of characters that the model knows, got {unknown!r} "
            "(without --prompt it is a line break)"
        )
    return tokens
