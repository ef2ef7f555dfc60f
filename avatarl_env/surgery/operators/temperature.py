"""One coefficient: the temperature of the whole output."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from avatarl_env.errors import check_text, closest
from avatarl_env.surgery.operators.base import as_coefficients, check_scale
from avatarl_env.surgery.overlay import RowEdit, scale_output
from avatarl_env.surgery.parameters import check_weight
from avatarl_env.surgery.targets import Targets
from avatarl_env.surgery.theater import SurgicalTheater

FINAL_NORMS = ("norm", "transformer.ln_f", "model.norm", "gpt_neox.final_layer_norm")
"""Paths of the normalisation that the output head reads, in known models."""


class OutputTemperature:
    """Multiplies all logits by `exp(scale * c)`: positive is sharper. A = 1.

    A control: it equals another decoding temperature, so only gains beyond it show that surgery
    does more. In place it scales the output head or, if that is tied to the embedding, the
    normalisation before it.
    """

    labels = ("log-sharpness of the output",)

    def __init__(
        self, targets: Targets, *, scale: float = 1.0, final_norm: str | None = None
    ) -> None:
        """Find the parameters to scale.

        Args:
            targets: of the model, which must have `get_output_embeddings()`.
            scale: nats of gain at c = 1, > 0.
            final_norm: path of the normalisation that a tied head reads; default one of
                `FINAL_NORMS`. A head that is not tied needs none.

        Raises:
            TypeError: if the model has no output head.
            ValueError: if the scale is not positive and finite, the head's weight is quantised, or
                the head is tied and the normalisation is missing, or its output is not proportional
                to its parameters.
        """
        check_scale(scale)
        if final_norm is not None:
            final_norm = check_text("final_norm", final_norm)
        self.scale = scale
        model = targets.model
        self._head = _output_head(model)
        weight = self._head.weight
        others = (module for module in model.modules() if module is not self._head)
        tied = any(p is weight for m in others for p in m._parameters.values())
        self._norm = _final_norm(model, final_norm) if tied else None
        self._scaled = tuple(self._head.parameters(recurse=False))
        if self._norm is not None:
            biases = (p for p in self._scaled if p is not weight)
            self._scaled = (*self._norm.parameters(), *biases)

    def parameters(self) -> Iterator[Tensor]:
        """Yield the parameters of the head, or of the normalisation before a tied one."""
        yield from self._scaled

    def apply(self, theater: SurgicalTheater, coefficients: ArrayLike) -> None:
        """Write the weights that `coefficients` (1,) stand for."""
        (gain,) = (self.scale * as_coefficients(coefficients, 1)).exp()
        for parameter in self._scaled:
            original = theater.original(parameter)
            theater.write(parameter, original if gain == 1 else original * gain.to(original))

    def row_edits(self, coefficients: ArrayLike) -> list[RowEdit]:
        """Return the edits that `coefficients` (N, 1) stand for, on the rows of a batch."""
        gains = (self.scale * as_coefficients(coefficients, 1, rows=True)).exp()
        if self._norm is None:
            return [scale_output(self._head, gains[:, 0])]
        # Scale the norm, as `apply` does, so that activations are the same.
        edits = [scale_output(self._norm, gains[:, 0])]
        bias = self._head._parameters.get("bias")
        if bias is not None:
            shift = (gains.to(bias) - 1)[:, :, None] * bias  # (N, 1, V)
            edits.append(RowEdit(self._head, after=lambda x, y: y.add_(shift)))
        return edits


def _output_head(model: nn.Module) -> nn.Module:
    head: nn.Module | None = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or "weight" not in head._parameters:
        raise TypeError(
            "targets must be of a model whose get_output_embeddings() is a linear module, "
            f"got {type(head).__name__} from {type(model).__name__}"
        )
    check_weight(head)
    return head


def _final_norm(model: nn.Module, path: str | None) -> nn.Module:
    modules = dict(model.named_modules())
    # Inside a wrapper such as `HubLM`, paths begin with the wrapper's name for the model.
    paths = FINAL_NORMS if path is None else (path,)
    found = [name for p in paths for name in (p, f"model.{p}") if name in modules]
    if not found:
        hint = closest(path, modules) if path else f", and none of {[*FINAL_NORMS]} is there"
        raise ValueError(
            "final_norm must name the normalisation that the model's tied output head reads, "
            f"got {path!r}{hint}"
        )
    norm: nn.Module = modules[found[0]]
    if not _is_proportional(norm):
        raise ValueError(
            f"final_norm must have an output proportional to its parameters, got {found[0]!r}, a "
            f"{type(norm).__name__}"
        )
    return norm


@torch.no_grad()
def _is_proportional(norm: nn.Module) -> bool:
    """Return whether doubling the parameters doubles the output, tried on one input."""
    parameters = dict(norm.named_parameters())
    sizes = {p.shape for p in parameters.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        return False  # a gain per channel, and perhaps a shift, are expected
    like = next(iter(parameters.values()))
    probe = torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device)[None]
    twice = {name: 2 * p for name, p in parameters.items()}
    return torch.equal(torch.func.functional_call(norm, twice, (probe,)), 2 * norm(probe))
