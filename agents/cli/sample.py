"""`avatarl sample`: what a stored model writes, also under an operation."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from agents.cli.parsing import Refusal, read_words, refusing, run_settings
from agents.cli.unfinished import load_unfinished

if TYPE_CHECKING:
    from agents.cli.operation import Operation
    from avatarl_env.lm.protocols import Tokenizer
    from avatarl_env.lm.storage import StoredModel


MOST_PROMPT = 2**24
"""Bytes of a prompt in a file: none is longer, and what never ends is not read for ever."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Write text with a stored model; given an operation, without and with it, on the same dice."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Run folder, model folder, or: bundled."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What the text begins with; default a line break."""
    prompt_file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """UTF-8 text to begin with instead, every character of it; - for standard input."""
    length: int = 300
    """New tokens: characters, for a model of ours; may be more than the context."""
    temperature: float = 1.0
    """Divides the logits: the lower, the more often the model writes what it is surest of."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Draw from so many of the most probable tokens only; default all."""
    seed: int = 0
    """Of the dice."""
    n: int = 1
    """Texts, each with dice of its own."""
    operation: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON with coefficients, operator, operator_options; or a run's summary.json, metrics.jsonl"""
    coefficients: tuple[float, ...] = ()
    """The operation, instead of a file."""
    operator: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What coefficients mean; default the run's own operator, else head_gain."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """float32, bfloat16 or float16; default the precision that the model is stored in."""

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
            raise ValueError("prompt must not be empty, the model continues something")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt must not be given beside prompt_file, it is the same")
        if self.operation is not None and self.coefficients:
            raise ValueError("operation must not be given beside coefficients, it has its own")


def main(words: Sequence[str], prog: str) -> str:
    """Write; return the texts.

    Raises:
        Refusal: if there is no such model or operation, or the model does not know the prompt.
    """
    request = read_words(Sample, words, prog)
    return "" if request is None else sample(request)


def sample(request: Sample) -> str:
    """Write what is asked for; the model as it was stored is not changed.

    Raises:
        Refusal: if there is no such model or operation, or the model does not know the prompt.
    """
    from avatarl_env.lm.storage import move_model

    prompt = _prompt(request)
    stored = _load(request.run)
    with refusing(ValueError, lm="run"):
        move_model(stored.model, request.device, request.dtype)
    operation = _operation(request)
    texts = _write(request, prompt, stored, None)
    if operation is not None:
        operated = _write(request, prompt, stored, operation)
        parts = [
            f"--- text\n{text}\n--- text of the operated model\n{other}"
            for text, other in zip(texts, operated, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
    elif len(texts) == 1:
        return texts[0]
    else:
        parts = texts
    return "\n\n".join(f"=== {number}\n{part}" for number, part in enumerate(parts, start=1))


def _load(run: str) -> StoredModel:
    """Load a stored model, or that of the newest checkpoint of a run that has not finished."""
    unfinished = load_unfinished(run)
    if unfinished is not None:
        stored, place = unfinished
        warnings.warn(
            f"{run} has not finished: this is the model of its last checkpoint, {place.name}",
            stacklevel=2,
        )
        return stored
    from avatarl_env.lm.storage import load_model

    with refusing(ValueError, lm="run"):
        return load_model(run)


def _prompt(request: Sample) -> str:
    """Return what the texts begin with.

    Raises:
        Refusal: if the file cannot be read, or is no text or too long a one.
    """
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
    from agents.cli.operation import DEFAULT_OPERATOR, Operation, read_operation

    settings = run_settings(Path(request.run)) or {}
    name = request.operator or settings.get("operator")
    if request.operation is not None:
        return read_operation(Path(request.operation), request.operator)
    if request.coefficients:
        layers = settings.get("layers")
        return Operation(name or DEFAULT_OPERATOR, {}, request.coefficients, layers)
    if request.operator is not None:
        raise Refusal("operator must come with coefficients or an operation, got neither")
    return None


def _write(
    request: Sample, text: str, stored: StoredModel, operation: Operation | None
) -> list[str]:
    """Return the texts, prompt and all; the dice depend on the request alone."""
    import numpy as np
    import torch

    from avatarl_env.lm.generation import generate
    from avatarl_env.memory import check_memory

    prompt, n, length = _encode(stored.tokenizer, text), request.n, request.length
    with refusing(ValueError):  # a token in 8 bytes, its dice in 4 and its probability in 8
        check_memory("n times length", n * (8 * len(prompt) + 20 * length))
    device = next(stored.model.parameters()).device
    prompts = torch.tensor(prompt, device=device).repeat(n, 1)
    dice = np.random.default_rng(request.seed).random((n, length), np.float32)
    uniforms = torch.from_numpy(dice).to(device)
    with contextlib.nullcontext() if operation is None else operation.on(stored.model):
        generation = generate(
            stored.model, prompts, uniforms, temperature=request.temperature, top_k=request.top_k
        )
    return [stored.tokenizer.decode(row) for row in generation.tokens.cpu().numpy()]


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the prompt's tokens.

    Raises:
        Refusal: if the model does not know all of it.
    """
    from avatarl_env.files import is_utf8
    from avatarl_env.lm.hub import HubTokenizer
    from avatarl_env.lm.tokenizer import CharTokenizer

    if isinstance(tokenizer, HubTokenizer) and not is_utf8(prompt):
        raise Refusal(f"prompt must be text that UTF-8 can hold, got {prompt!r}")
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    if isinstance(tokenizer, CharTokenizer):
        unknown = "".join(sorted({c for c in prompt if c not in tokenizer.characters}))
    elif isinstance(tokenizer, HubTokenizer) and tokenizer.tokenizer.unk_token_id in tokens:
        unknown = prompt
    else:
        unknown = ""
    if unknown or not tokens:
        raise Refusal(f"prompt must be of characters that the model knows, got {unknown!r}")
    return tokens
