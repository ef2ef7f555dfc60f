"""A patient's texts: the corpus in its own tokens, and what it wrote in characters.

Shapes: N operations of M prompts each, B = N * M, P prompt tokens, T tokens.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avatarl_env.errors import shown
from avatarl_env.lm.generation import Generation
from avatarl_env.lm.protocols import Tokenizer, count_characters, encode
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.scoring import Generations
from avatarl_env.scoring.reference import TextReference
from avatarl_env.text.corpus import Corpus

Array = NDArray[np.float64]
Splits = dict[str, NDArray[np.int64]]


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Splits, TextReference]:
    """Return a corpus' splits as tokens, and the reference counted on `train`.

    The reference knows how many characters a token of `train` stands for.

    For our own tokenizer that is done once per process: nobody may write into the splits.

    Raises:
        ValueError: if there is no corpus, the tokenizer's ids are out of its range, or the text is
            of too few tokens.
    """
    if not isinstance(corpus, Corpus):
        raise ValueError(  # noqa: TRY004 - as for all that is wrong with an argument
            f"corpus must be one of load_corpus(), got {shown(corpus)}"
        )
    if type(tokenizer) is CharTokenizer:
        return _encode_once(corpus, tokenizer.characters)
    return _encode(corpus, tokenizer)


def pooled_characters(tokenizer: Tokenizer, tokens: NDArray[np.int64], n: int) -> Array:
    """Return how many characters rows of real text have, each operation's rows on average.

    Args:
        tokenizer: decodes.
        tokens: (B, T), the first M rows of the first operation, and so on.
        n: N, operations.

    Returns:
        (B,). At least one character for the M rows together, so that there is something to divide
        by.
    """
    characters = count_characters(tokenizer, tokens).reshape(n, -1)  # (N, M)
    n_rows = characters.shape[1]
    return np.repeat(characters.mean(1).clip(min=1 / n_rows), n_rows)


def as_generations(
    tokenizer: Tokenizer, generation: Generation, prompt_losses: Tensor, n: int = 1
) -> Generations:
    """Bring what a model wrote and how it read its prompts into the form that is scored.

    Args:
        tokenizer: decodes.
        generation: of B rows, with distributions or else with entropies.
        prompt_losses: (B, P - 1) teacher-forced loss of the prompts' tokens from the second on.
        n: N, operations that the rows belong to, with as many each.
    """
    tokens = generation.tokens.cpu().numpy()
    n_prompt = prompt_losses.size(1) + 1
    characters = pooled_characters(tokenizer, tokens[:, 1:n_prompt], n)
    is_whole = generation.distributions is not None
    return Generations(
        tokens,
        n_prompt,
        _numbers(generation.distributions),
        prompt_losses.double().sum(1).cpu().numpy() / characters,
        None if is_whole else _numbers(generation.log_probs),
        None if is_whole else _numbers(generation.entropies),
        characters,
    )


def _numbers(values: Tensor | None) -> Array | None:
    return None if values is None else np.asarray(values.double().cpu().numpy())


@functools.lru_cache(maxsize=4)
def _encode_once(corpus: Corpus, characters: str) -> tuple[Splits, TextReference]:
    return _encode(corpus, CharTokenizer(characters))


def _encode(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Splits, TextReference]:
    splits = {name: encode(tokenizer, text) for name, text in corpus.splits.items()}
    train = splits["train"]
    ratio = len(corpus.splits["train"]) / max(len(train), 1)
    return splits, TextReference(train, tokenizer.vocab_size, characters_per_token=ratio)
