"""Reads a model's losses and hidden states at its output head, during its first forward.

With a large vocabulary, the logits of a whole text would need by far the most memory. So above
`WHOLE_UP_TO` tokens, losses are computed for a few positions at a time, and the model returns the
logits of the last position only: memory is proportional to rows times vocabulary.

Shapes: B rows, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

WHOLE_UP_TO = 256
"""Largest vocabulary for which the logits of all positions are kept."""

_CELLS_AT_ONCE = 2**24  # most logits computed at once (64 MiB); at least those of one position
_RULE = (
    "model must return the output of its output head, even for the last position alone, as with "
    "large vocabularies"
)


class HeadReader:
    """Context manager that records the first forward in its body at the model's output head.

    It works by forward hooks, also under an overlay. With targets and a large vocabulary the model
    returns the logits of the last position only, (B, 1, V).
    """

    def __init__(self, model: nn.Module, targets: Tensor | None = None) -> None:
        """Choose the model; hooks are registered on entry and removed on exit.

        Args:
            model: a `CausalLM`.
            targets: (B, K) tokens that follow the first K positions, for `losses`; K <= T.
        """
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._targets = targets
        self._vocab_size = int(model.vocab_size)  # type: ignore[arg-type]
        self._handles: list[RemovableHandle] = []
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._losses: Tensor | None = None
        self._is_computing = False

    def __enter__(self) -> Self:
        """Register the hooks."""
        self._handles.append(self._head.register_forward_hook(self._read))
        if self._targets is not None and self._vocab_size > WHOLE_UP_TO:
            # Before the hooks of an overlay, which must act once on each position.
            self._handles.append(
                self._head.register_forward_pre_hook(self._compute_losses, prepend=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def hidden(self) -> Tensor:
        """(B, C) final hidden state at the last position."""
        assert self._hidden is not None, "the model's output head was never called"
        return self._hidden

    @property
    def logits(self) -> Tensor:
        """(B, T, V) logits; (B, 1, V) with targets and a large vocabulary."""
        assert self._logits is not None, "the model's output head was never called"
        return self._logits

    def losses(self) -> Tensor:
        """Return the loss of every target, (B, K), nats."""
        assert self._targets is not None, "the targets were not given"
        if self._losses is None:
            n_targets = self._targets.size(1)
            log_probs = torch.log_softmax(self.logits[:, :n_targets].float(), dim=-1)
            self._losses = -log_probs.gather(2, self._targets[:, :, None])[:, :, 0]
        return self._losses

    def _read(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._logits is None and not self._is_computing:
            self._hidden = inputs[0].detach()[:, -1]
            self._logits = output.detach()[..., : self._vocab_size]

    def _compute_losses(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """Compute the losses a few positions at a time; pass on the last position only."""
        if self._losses is not None or self._is_computing:
            return None
        assert self._targets is not None
        hidden, targets = inputs[0].detach(), self._targets
        n_rows, n_targets = targets.shape
        step = max(1, _CELLS_AT_ONCE // (n_rows * self._vocab_size))
        losses = targets.new_empty(n_rows, n_targets, dtype=torch.float32)
        self._is_computing = True
        try:
            with torch.no_grad():
                for start in range(0, n_targets, step):
                    part = slice(start, min(start + step, n_targets))
                    logits = module(hidden[:, part])[..., : self._vocab_size].float()
                    losses[:, part] = F.cross_entropy(logits.mT, targets[:, part], reduction="none")
        finally:
            self._is_computing = False
        self._losses = losses
        return (inputs[0][:, -1:], *inputs[1:])


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode, and back on exit."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def hidden_width(model: Any) -> int:
    """Return the width of a model's final hidden state, C, found by a short forward.

    Raises:
        ValueError: if the model does not return the output of its head unchanged; the losses are
            read at the head.
    """
    device = next(model.parameters()).device
    spread = torch.linspace(0, model.vocab_size - 1, 8, device=device).long()
    tokens = torch.stack([spread, spread.flip(0)], dim=1)  # (8, 2)
    _check_logits(model, tokens)
    with eval_mode(model), HeadReader(model, tokens[:, 1:]) as head:
        try:
            n_returned = model(tokens).size(1)
        except (IndexError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{_RULE}, {type(model).__name__} raised: {reason}") from error
    if n_returned != head.logits.size(1):
        raise ValueError(f"{_RULE}, {type(model).__name__} returned {n_returned} positions")
    return head.hidden.size(-1)


def _check_logits(model: Any, tokens: Tensor) -> None:
    """Replace the output of the head by marks, and check that the model returns them.

    Its own logits prove nothing: an untrained head may output zeros, which a cap or scale keeps.
    """
    marks: list[Tensor] = []

    def mark(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        values = torch.linspace(-40, 40, output.numel(), device=output.device)
        marks.append(values.view(output.shape).to(output.dtype))
        return marks[-1].clone()

    handle = model.get_output_embeddings().register_forward_hook(mark)
    try:
        with eval_mode(model):
            logits = model(tokens)
    finally:
        handle.remove()
    expected = (*tokens.shape, model.vocab_size)
    has_shape = len(marks) == 1 and logits.shape == expected
    if has_shape and torch.equal(logits.float(), marks[0][..., : model.vocab_size].float()):
        return
    found = "changed ones" if has_shape else tuple(logits.shape)
    raise ValueError(
        f"model must return the output of its output head, {expected} logits of eight texts of "
        f"two tokens, got {found} of {type(model).__name__}"
    )
