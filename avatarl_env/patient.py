"""The patient: a language model on the table, with the text it is held against.

Shapes: B prompts, P prompt tokens, N new tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from avatarl_env.choices import check_choice
from avatarl_env.lm.generation import generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_model
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.observation import Vitals, VitalSigns
from avatarl_env.scoring import TextReference, Writing, measure_terms
from avatarl_env.surgery import Operator, SurgicalTheater, find_targets
from avatarl_env.text.corpus import Corpus, load_corpus

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Prompts(NamedTuple):
    """What the model is asked to continue, and the dice it continues with."""

    tokens: NDArray[np.int64]
    """(B, P)."""
    uniforms: NDArray[np.float32]
    """(B, N) in [0, 1)."""


class Evaluation(NamedTuple):
    """One reading of the model, operated on or not."""

    writing: Writing
    vitals: Vitals
    terms: dict[str, float]


class Patient:
    """A model, its tokenizer, the splits of its corpus and the reference counted on ``train``."""

    def __init__(self, model: GPT, tokenizer: CharTokenizer, corpus: Corpus) -> None:
        """Put a live model on the table; it is shared, not copied.

        Raises:
            ValueError: if the tokenizer and the model disagree about the vocabulary.
        """
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"tokenizer must have the model's {model.config.vocab_size} tokens, "
                f"got {tokenizer.vocab_size}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.targets = find_targets(model)
        self.splits, self.reference = _encode(corpus, tokenizer.characters)
        self.forward_tokens = 0
        """Compute spent on evaluations so far: tokens that went through a forward."""
        self.n_changes = 0
        """How often the model's parameters are known to have changed."""

    @classmethod
    def load(
        cls, lm: str, corpus: str | None = None, device: str = "cpu", dtype: str = "float32"
    ) -> Patient:
        """Load a stored model.

        Args:
            lm: ``"bundled"``, a run folder or a model folder.
            corpus: a corpus name or path; default the one the model learned.
            device: ``"cpu"``, ``"cuda"``, ...
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

        Raises:
            ValueError: if there is no such model, corpus or dtype, or the device is not there.
        """
        check_choice("dtype", dtype, DTYPES)
        stored = load_model(lm)
        try:
            model = stored.model.to(device=device, dtype=DTYPES[dtype])
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device must be one of torch's, got {device!r}: {reason}") from error
        learned = corpus or stored.about.get("corpus")
        if not learned:
            raise ValueError(f"corpus must be given, {lm!r} does not say what it learned")
        text = load_corpus(learned)
        expected = stored.about.get("corpus_sha256", text.sha256)
        if corpus is None and text.sha256 != expected:
            raise ValueError(
                f"corpus {learned!r} must be the text that {lm!r} learned, with sha256 {expected}, "
                f"got {text.sha256}; to hold it against this one all the same, name the corpus"
            )
        return cls(model, stored.tokenizer, text)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave evaluations in the body out of ``forward_tokens``: they are for a reader."""
        spent = self.forward_tokens
        try:
            yield
        finally:
            self.forward_tokens = spent

    def prompts(
        self, split: str, n_prompts: int, prompt_length: int, n_new: int, rng: np.random.Generator
    ) -> Prompts:
        """Draw prompts from a split, and the dice for what follows them."""
        tokens = self.windows(split, n_prompts, prompt_length, rng)
        return Prompts(tokens, rng.random((n_prompts, n_new), dtype=np.float32))

    def windows(
        self, split: str, n_windows: int, length: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Draw windows (n_windows, length) of a split, uniformly, with replacement.

        Raises:
            ValueError: if the split is unknown or shorter than the window.
        """
        check_choice("split", split, self.splits)
        tokens = self.splits[split]
        if len(tokens) < length:
            raise ValueError(f"length must be at most {len(tokens)} ({split}), got {length}")
        starts = rng.integers(0, len(tokens) - length + 1, size=n_windows)
        return np.asarray(tokens[starts[:, None] + np.arange(length)])

    @torch.inference_mode()
    def evaluate(self, prompts: Prompts) -> Evaluation:
        """Let the model, as it stands, continue the prompts, and measure what it wrote."""
        device = self.model.embed.weight.device
        tokens = torch.from_numpy(prompts.tokens).to(device)
        uniforms = torch.from_numpy(prompts.uniforms).to(device)
        with eval_mode(self.model), VitalSigns(self.model, self.targets) as signs:
            generation = generate(self.model, tokens, uniforms, return_distributions=True)
        assert generation.distributions is not None
        read = torch.log_softmax(signs.prompt_logits[:, :-1].float(), dim=-1)  # (B, P - 1, V)
        targets = tokens[:, 1:, None]
        writing = Writing(
            tokens=generation.tokens.cpu().numpy(),
            n_prompt=prompts.tokens.shape[1],
            distributions=generation.distributions.double().cpu().numpy(),
            prompt_loss=-read.gather(2, targets).double().mean((1, 2)).cpu().numpy(),
        )
        self.forward_tokens += tokens.numel() + uniforms[:, 1:].numel()  # the last is not read
        return Evaluation(writing, signs.read(), measure_terms(writing, self.reference))

    def evaluate_operated(
        self, operator: Operator, coefficients: ArrayLike, prompts: Prompts
    ) -> Evaluation:
        """Do the same under an operation, which is undone before this returns."""
        with SurgicalTheater(self.model, self.targets) as theater:
            operator.apply(theater, coefficients)
            return self.evaluate(prompts)

    def commit(self, operator: Operator, coefficients: ArrayLike) -> None:
        """Operate for good: same parameters, new values."""
        with SurgicalTheater(self.model, self.targets) as theater:
            operator.apply(theater, coefficients)
            theater.commit()
        self.n_changes += 1


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode, and each back to what it was."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@functools.lru_cache(maxsize=4)
def _encode(corpus: Corpus, characters: str) -> tuple[dict[str, NDArray[np.int64]], TextReference]:
    """Encode a corpus and count its reference, once per process."""
    tokenizer = CharTokenizer(characters)
    splits = {name: tokenizer.encode(text) for name, text in corpus.splits.items()}
    return splits, TextReference(splits["train"], tokenizer.vocab_size)
