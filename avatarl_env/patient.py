"""The patient: a language model under operation, with its text and its reference.

Losses and scores are in nats per character, see `avatarl_env.scoring`.

Shapes: N operations of M prompts each, B = N * M, P prompt tokens, T tokens, V vocabulary,
A coefficients.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from avatarl_env.errors import check_choice, check_text
from avatarl_env.lm.generation import generate
from avatarl_env.lm.head_reader import WHOLE_UP_TO, HeadReader, eval_mode, hidden_width
from avatarl_env.lm.protocols import Tokenizer, as_causal_lm, as_tokenizer
from avatarl_env.lm.storage import DTYPES, load_model, move_model
from avatarl_env.observation import Vitals, VitalSigns
from avatarl_env.scoring import Generations, Term, measure_many
from avatarl_env.scoring.generations import as_generations, pooled_characters
from avatarl_env.scoring.reference import encode_corpus
from avatarl_env.surgery import Operator, Overlay, Overlayable, SurgicalTheater, find_targets
from avatarl_env.text.corpus import Corpus, load_corpus

__all__ = ["Evaluation", "Patient", "Prompts", "eval_mode"]

T = TypeVar("T")
Terms = Mapping[str, Term] | None
logger = logging.getLogger(__name__)


class Prompts(NamedTuple):
    """Texts that the model continues, and the noise that it samples with."""

    tokens: NDArray[np.int64]
    """(M, P)."""
    uniforms: NDArray[np.float32]
    """(M, new tokens) in [0, 1)."""


class Evaluation(NamedTuple):
    """Result of a forward and a generation on an operation's prompts."""

    generations: Generations
    vitals: Vitals
    terms: dict[str, float]


class Patient:
    """A model, its tokenizer, the splits of its corpus and the reference counted on `train`."""

    def __init__(self, model: nn.Module, tokenizer: Any, corpus: Corpus | str) -> None:
        """Take a live model; it is shared, not copied.

        Args:
            model: a `GPT`, a causal language model from transformers, or a module that is a
                `CausalLM`, with attention that is in `avatarl_env.surgery.LAYOUTS`. One from
                transformers is wrapped: `self.model` is then the wrapper.
            tokenizer: the model's: a `CharTokenizer`, one from transformers, or anything that is a
                `Tokenizer`.
            corpus: a corpus, its name or a path.

        Raises:
            ValueError: if the model cannot be operated on (see `as_causal_lm`), its vocabulary is
                not the tokenizer's, or the text cannot be used.
        """
        self.tokenizer: Tokenizer = as_tokenizer(tokenizer)
        # Typed Any: Python's types cannot say "a module that is also a CausalLM".
        self.model: Any = as_causal_lm(model, self.tokenizer.vocab_size)
        self.corpus = load_corpus(corpus) if isinstance(corpus, str) else corpus
        self.targets = find_targets(self.model)
        self.width = hidden_width(self.model)
        """Channels of the final hidden state, C."""
        self.splits, self.reference = encode_corpus(self.corpus, self.tokenizer)
        self.forward_tokens = 0
        """Tokens passed through a forward by evaluations so far, a measure of compute."""
        self.n_changes = 0
        """Number of changes of the model's parameters that were reported or committed."""
        self.rows_per_forward = 256
        """Most texts written at once; more are hardly faster per row, and take more memory."""
        self.tokens_per_forward = 2**16
        """Most tokens for which losses are computed at once."""

    @classmethod
    def load(
        cls, lm: str, corpus: str | None = None, device: str = "cpu", dtype: str = "float32"
    ) -> Patient:
        """Load a stored model.

        Args:
            lm: `"bundled"`, a run folder, a folder that `save_model` wrote, or one that
                transformers' `save_pretrained` wrote, with a tokenizer.
            corpus: a corpus name or path; default the one the model was trained on.
            device: `"cpu"`, `"cuda"`, ...
            dtype: `"float32"`, `"bfloat16"` or `"float16"`.

        Raises:
            ValueError: if there is no such model, corpus, dtype or device.
        """
        check_choice("dtype", dtype, DTYPES)
        stored = load_model(check_text("lm", lm))
        move_model(stored.model, check_text("device", device), dtype)
        learned = stored.about.get("corpus") if corpus is None else check_text("corpus", corpus)
        if not learned:
            raise ValueError(f"corpus must be given: {lm!r} does not name its training text")
        text = load_corpus(learned)
        expected = stored.about.get("corpus_sha256", text.sha256)
        if corpus is None and text.sha256 != expected:
            raise ValueError(
                f"corpus {learned!r} must be the text that {lm!r} was trained on, with sha256 "
                f"{expected}, got {text.sha256}; pass corpus= to use this text anyway"
            )
        return cls(stored.model, stored.tokenizer, text)

    @property
    def keeps_distributions(self) -> bool:
        """Whether texts are scored by whole distributions, not only by the tokens drawn."""
        return self.tokenizer.vocab_size <= WHOLE_UP_TO

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave evaluations in the body out of `forward_tokens`."""
        spent = self.forward_tokens
        try:
            yield
        finally:
            self.forward_tokens = spent

    def prompts(
        self, split: str, n_prompts: int, prompt_length: int, n_new: int, rng: np.random.Generator
    ) -> Prompts:
        """Draw prompts from a split, and the sampling noise for their continuations."""
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

    def evaluate(self, prompts: Prompts, terms: Terms = None) -> Evaluation:
        """Sample continuations of the prompts from the unoperated model, and measure them.

        Args:
            prompts: texts to continue, and noise.
            terms: terms to measure, by name; default `TERMS`.
        """
        return self._evaluate([prompts], terms)[0]

    def evaluate_operated(
        self, operator: Operator, coefficients: ArrayLike, prompts: Prompts, terms: Terms = None
    ) -> Evaluation:
        """Evaluate under an operation, which is undone before this returns."""
        with self.operated(operator, coefficients):
            return self._evaluate([prompts], terms)[0]

    def evaluate_many(
        self,
        prompts: Sequence[Prompts],
        operator: Operator | None = None,
        coefficients: ArrayLike = (),
        terms: Terms = None,
    ) -> list[Evaluation]:
        """Evaluate many operations, with up to `rows_per_forward` rows in one forward.

        Args:
            prompts: N batches of one shape.
            operator: None for the unoperated model. One without `row_edits` operates N times, one
                after the other.
            coefficients: (N, A), one operation for each of the prompts.
            terms: as for `evaluate`.

        Raises:
            ValueError: if the batches differ in shape, or there are not N operations.
        """
        if not prompts:
            return []
        shapes = {(p.tokens.shape, p.uniforms.shape) for p in prompts}
        if len(shapes) > 1:
            raise ValueError(
                "prompts must be of one number and length in every operation, "
                f"got tokens and uniforms of shapes {sorted(shapes)}"
            )
        n, n_rows = len(prompts), len(prompts[0].tokens)
        return self._in_parts(
            lambda part: self._evaluate(prompts[part], terms), n, n_rows, operator, coefficients
        )

    def losses(
        self,
        windows: NDArray[np.int64],
        operator: Operator | None = None,
        coefficients: ArrayLike = (),
    ) -> NDArray[np.float64]:
        """Return the teacher-forced loss of each window, nats/char: (N, M).

        Args:
            windows: (N, M, T + 1), T at most the model's context.
            operator: None for the unoperated model.
            coefficients: (N, A), one operation for each M windows.

        Raises:
            ValueError: if there are not N operations.
        """
        n, n_rows = windows.shape[:2]
        if n_rows == 0:
            return np.zeros((n, 0))
        losses = self._in_parts(
            lambda part: self._losses(windows[part]), n, n_rows, operator, coefficients
        )
        return np.array(losses, dtype=np.float64).reshape(n, n_rows)

    def _in_parts(
        self,
        body: Callable[[slice], Iterable[T]],
        n: int,
        n_rows: int,
        operator: Operator | None,
        coefficients: ArrayLike,
    ) -> list[T]:
        """Run `body` on n operations of n_rows rows each, several at once where possible."""
        rows = np.asarray(coefficients, dtype=np.float64)
        if operator is not None and len(rows) != n:
            raise ValueError(f"coefficients must have {n} rows, got shape {rows.shape}")
        side_by_side = operator is None or isinstance(operator, Overlayable)
        if not side_by_side:
            _warn_once(type(operator).__name__)
        at_once = max(1, self.rows_per_forward // n_rows) if side_by_side else 1
        results: list[T] = []
        for start in range(0, n, at_once):
            part = slice(start, min(start + at_once, n))
            with self._surgery(operator, rows[part]):
                results.extend(body(part))
        return results

    @contextmanager
    def _surgery(self, operator: Operator | None, rows: NDArray[np.float64]) -> Iterator[None]:
        """Operate while the body runs: on rows of its batches, or one operation in place."""
        if operator is None:
            yield
        elif isinstance(operator, Overlayable):
            with Overlay(operator, rows):
                yield
        else:
            with self.operated(operator, rows[0]):
                yield

    @contextmanager
    def operated(self, operator: Operator, coefficients: ArrayLike) -> Iterator[SurgicalTheater]:
        """Operate in place on the shared model while the body runs."""
        with SurgicalTheater(self.model, [operator]) as theater:
            operator.apply(theater, coefficients)
            yield theater

    @torch.inference_mode()
    def _losses(self, windows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the losses (N, M) of windows (N, M, T + 1), a limited number in each forward."""
        n, n_rows, length = windows.shape
        device = next(self.model.parameters()).device
        step = max(1, self.tokens_per_forward // (n * length))
        nats = []
        for start in range(0, n_rows, step):
            part = windows[:, start : start + step].reshape(-1, length)
            tokens = torch.from_numpy(part).to(device)
            with eval_mode(self.model), HeadReader(self.model, tokens[:, 1:]) as head:
                self.model(tokens[:, :-1])
            nats.append(head.losses().double().sum(1).cpu().numpy().reshape(n, -1))
            self.forward_tokens += tokens[:, 1:].numel()
        characters = pooled_characters(self.tokenizer, windows.reshape(-1, length)[:, 1:], n)
        return np.concatenate(nats, axis=1) / characters.reshape(n, n_rows)

    @torch.inference_mode()
    def _evaluate(self, prompts: Sequence[Prompts], terms: Terms) -> list[Evaluation]:
        """Evaluate N batches of M prompts in one forward, the first M rows for the first, ..."""
        n = len(prompts)
        device = next(self.model.parameters()).device
        tokens = torch.from_numpy(np.concatenate([p.tokens for p in prompts])).to(device)
        uniforms = torch.from_numpy(np.concatenate([p.uniforms for p in prompts])).to(device)
        with eval_mode(self.model), VitalSigns(self.model, self.targets, n, tokens) as signs:
            generation = generate(
                self.model,
                tokens,
                uniforms,
                return_distributions=self.keeps_distributions,
                return_entropies=not self.keeps_distributions,
            )
        self.forward_tokens += tokens.numel() + uniforms[:, 1:].numel()  # the last is not read
        generations = as_generations(self.tokenizer, generation, signs.prompt_losses(), n)
        measured = measure_many(generations, self.reference, n, terms)
        return [
            Evaluation(part, vitals, values)
            for (part, values), vitals in zip(measured, signs.read(), strict=True)
        ]

    def commit(self, operator: Operator, coefficients: ArrayLike) -> None:
        """Write an operation to the weights, in place."""
        with self.operated(operator, coefficients) as theater:
            theater.commit()
        self.n_changes += 1


@functools.cache
def _warn_once(operator: str) -> None:
    logger.warning("%s has no row_edits, so its operations are performed one by one", operator)
