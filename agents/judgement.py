"""What an operation is worth on text it has never seen, measured in pairs.

Two quantities, because one can be fooled: sharpening raises ``kl_ref`` and worsens the held-out
loss. Both are positive when the operation is good.

Shapes: n prompts or windows, A coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from avatarl_env.episode import OperationConfig
from avatarl_env.patient import Patient, eval_mode
from avatarl_env.scoring import Interval, interval, kl_ref
from avatarl_env.surgery import Operator, SurgicalTheater

Array = NDArray[np.float64]
_ROWS_PER_BATCH = 64


class Gains(NamedTuple):
    """Paired differences, operated minus unoperated, one number per prompt or window."""

    kl_ref_gain: Array
    """(n,) rise of ``kl_ref`` on the model's own texts, nats per character."""
    heldout_loss_fall: Array
    """(n,) fall of the teacher-forced loss on real windows, nats per character."""


class Judgement(NamedTuple):
    """Means with their intervals."""

    kl_ref_gain: Interval
    heldout_loss_fall: Interval

    @property
    def is_improvement(self) -> bool:
        """Whether both one-sided 95 % lower bounds are above zero."""
        return self.kl_ref_gain.lower_bound > 0 and self.heldout_loss_fall.lower_bound > 0


def measure_gains(
    patient: Patient,
    operator: Operator,
    operations: list[NDArray[np.float64]],
    config: OperationConfig,
    *,
    split: str,
    n_each: int,
    rng: np.random.Generator,
) -> list[Gains]:
    """Measure operations on the same fresh prompts and windows of a split.

    Args:
        patient: the model as it stands; unoperated again afterwards.
        operator: turns coefficients into edits.
        operations: coefficients, each (A,).
        config: lengths of prompts and texts.
        split: where prompts and windows come from.
        n_each: n, prompts and as many windows.
        rng: draws them.

    Returns:
        One :class:`Gains` per operation, all on the same draws.
    """
    prompts = patient.prompts(split, n_each, config.prompt_length, config.n_new, rng)
    windows = patient.windows(split, n_each, patient.model.context + 1, rng)
    written = kl_ref(patient.evaluate(prompts).writing, patient.reference)
    loss = _window_loss(patient, windows)
    gains = []
    for coefficients in operations:
        if not coefficients.any():  # the exact identity: nothing would differ by a bit
            gains.append(Gains(np.zeros_like(written), np.zeros_like(loss)))
            continue
        with SurgicalTheater(patient.model, patient.targets) as theater:
            operator.apply(theater, coefficients)
            operated = kl_ref(patient.evaluate(prompts).writing, patient.reference)
            operated_loss = _window_loss(patient, windows)
        gains.append(Gains(operated - written, loss - operated_loss))
    return gains


def judge(
    patient: Patient,
    operator: Operator,
    coefficients: NDArray[np.float64],
    config: OperationConfig,
    *,
    n_prompts: int,
    rng: np.random.Generator,
) -> Judgement:
    """Judge one operation on fresh prompts of the ``surgeon`` split.

    Args:
        patient: the model as it stands.
        operator: turns coefficients into edits.
        coefficients: (A,) to be judged.
        config: lengths of prompts and texts.
        n_prompts: prompts, and as many teacher-forced windows.
        rng: draws them.
    """
    (gains,) = measure_gains(
        patient, operator, [coefficients], config, split="surgeon", n_each=n_prompts, rng=rng
    )
    return Judgement(interval(gains.kl_ref_gain), interval(gains.heldout_loss_fall))


@torch.inference_mode()
def _window_loss(patient: Patient, windows: NDArray[np.int64]) -> Array:
    """Return the mean teacher-forced loss of each window (n, context + 1): (n,), nats/token."""
    losses = []
    device = patient.model.embed.weight.device
    with eval_mode(patient.model):
        for rows in np.array_split(windows, -(-len(windows) // _ROWS_PER_BATCH)):
            tokens = torch.from_numpy(rows).to(device)
            log_probs = torch.log_softmax(patient.model(tokens[:, :-1]).float(), dim=-1)
            picked = log_probs.gather(2, tokens[:, 1:, None])[:, :, 0]  # (n, context)
            losses.append(-picked.double().mean(1).cpu().numpy())
    patient.forward_tokens += windows[:, :-1].size
    return np.concatenate(losses)
