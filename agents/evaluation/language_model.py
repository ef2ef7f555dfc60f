"""Measure how well a language model predicts held-out text.

Shapes: B windows, T characters, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from avatarl_env.lm.gpt import GPT
from avatarl_env.patient import Patient, eval_mode
from avatarl_env.text.ngram import NGramReference

PROGRESS_CHARACTERS = 16_384  # of the validation text, for measurements during training
REFERENCE_NAMES = ("bigram", "trigram", "4-gram", "5-gram")
CALIBRATION_BINS = 15
_TOKENS_PER_BATCH = 8_192


class TextMetrics(NamedTuple):
    """Means over the predicted characters."""

    loss: float
    """Cross-entropy, nats per character."""
    bits_per_char: float
    """The same in bits."""
    accuracy: float
    """Share of characters to which the model gave the largest probability, in [0, 1]."""
    entropy: float
    """Mean entropy of the predictions, nats per character."""
    calibration_error: float
    """Expected calibration error (ECE) of the most probable character, in [0, 1]:
    `sum_m n_m / n abs(accuracy_m - confidence_m)` over 15 bins of equal width, bin m of the
    positions whose largest probability is in ((m - 1) / 15, m / 15] (Guo et al.,
    arXiv 1706.04599)."""


@torch.inference_mode()
def evaluate_text(model: GPT, tokens: NDArray[np.int64]) -> TextMetrics:
    """Score the prediction of every character of a text but the first, each once.

    Windows overlap by half a context, so that after the first window each character has at least
    half a context of history.

    Args:
        model: the language model.
        tokens: (T,) the text, at least two characters.

    Raises:
        ValueError: if there are fewer than two characters.
    """
    n_targets = len(tokens) - 1
    if n_targets < 1:
        raise ValueError(f"tokens must be at least two, got {len(tokens)}")
    length = min(model.context, n_targets)
    stride = max(1, length // 2)
    starts = np.arange(0, n_targets - length + 1, stride)
    if starts[-1] + length < n_targets:
        starts = np.append(starts, n_targets - length)
    done = np.concatenate([[0], starts[:-1] + length])  # targets counted by earlier windows
    sums = np.zeros(3 + 2 * CALIBRATION_BINS)
    rows = max(1, _TOKENS_PER_BATCH // length)
    with eval_mode(model):
        for begin in range(0, len(starts), rows):
            some = starts[begin : begin + rows]
            windows = torch.from_numpy(tokens[some[:, None] + np.arange(length + 1)])
            windows = windows.to(model.embed.weight.device)
            counted = some[:, None] + np.arange(length) >= done[begin : begin + rows, None]
            sums += _sums(model, windows, torch.from_numpy(counted).to(windows.device))
    loss, hits, entropy, *bins = (sums / n_targets).tolist()
    n_binned, gaps = bins[:CALIBRATION_BINS], bins[CALIBRATION_BINS:]
    # A NaN confidence is in no bin, and the error is then undefined.
    error = float(np.abs(gaps).sum()) if round(sum(n_binned) * n_targets) == n_targets else math.nan
    return TextMetrics(loss, loss / math.log(2), hits, entropy, error)


def _sums(model: GPT, windows: torch.Tensor, counted: torch.Tensor) -> NDArray[np.float64]:
    """Return sums (3 + 2 M,) over the counted positions (B, T).

    Loss, hits and entropy; the positions in each of M confidence bins; hits minus confidence in
    each bin.
    """
    log_probs = torch.log_softmax(model(windows[:, :-1]).float(), dim=-1)  # (B, T, V)
    targets = windows[:, 1:]
    loss = -log_probs.gather(2, targets[:, :, None])[:, :, 0]
    chosen = log_probs.argmax(-1)
    hits = (chosen == targets).float()
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    stacked = torch.stack([loss, hits, entropy]).double() * counted
    confidence = log_probs.gather(2, chosen[:, :, None]).double().exp()  # (B, T, 1)
    number = (confidence * CALIBRATION_BINS).ceil().clamp(1, CALIBRATION_BINS)
    bins = torch.arange(1, CALIBRATION_BINS + 1, device=number.device)
    within = (number == bins) & counted[:, :, None]  # (B, T, M)
    gaps = torch.where(within, hits[:, :, None] - confidence, 0.0)
    sums = [stacked.sum((1, 2)), within.double().sum((0, 1)), gaps.sum((0, 1))]
    return np.asarray(torch.cat(sums).cpu().numpy())


def evaluate_references(patient: Patient) -> list[dict[str, Any]]:
    """Score n-gram models, fitted to the training text, on the validation text.

    Returns:
        For each its name and the loss, bits_per_char, accuracy and entropy of `TextMetrics`.
    """
    rows = []
    for order, name in enumerate(REFERENCE_NAMES, start=2):
        ngram = NGramReference.fit(patient.splits["train"], patient.tokenizer.vocab_size, order)
        metrics = ngram.evaluate(patient.splits["validation"])
        rows.append(
            {
                "name": name,
                "loss": metrics.loss,
                "bits_per_char": metrics.bits_per_token,
                "accuracy": metrics.accuracy,
                "entropy": metrics.entropy,
            }
        )
    return rows
