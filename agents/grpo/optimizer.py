"""Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from avatarl_env.lm.gpt import GPT

MUON, ADAMW = "muon", "adamw"
OPTIMIZERS = (MUON, ADAMW)
ADAM_BETAS = (0.9, 0.95)


class Optimizer:
    """Steps all parameters of a model, each with the optimizer that suits it.

    Muon orthogonalises the momentum of a matrix (Jordan et al. 2024; torch's own, with its width
    correction `sqrt(max(1, rows / columns))`). It is for matrices between hidden states: the
    embedding, which is also the output head, and the norms are stepped by AdamW.
    """

    def __init__(
        self, model: GPT, name: str, *, rate: float, matrix_rate: float, weight_decay: float
    ) -> None:
        """Assign each parameter to an optimizer.

        Args:
            model: has the parameters.
            name: `"muon"` or `"adamw"`.
            rate: peak learning rate of AdamW.
            matrix_rate: peak learning rate of Muon.
            weight_decay: of matrices, multiplied by the learning rate.
        """
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        inner = [p for p in model.blocks.parameters() if p.dim() == 2 and name == MUON]
        chosen = set(inner)
        matrices = [p for p in model.parameters() if p.dim() > 1 and p not in chosen]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=rate,
            betas=ADAM_BETAS,
            fused=True,
        )
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(adamw, rate)]
        """Optimizers, each with its peak learning rate."""
        if inner:
            muon = torch.optim.Muon(inner, lr=matrix_rate, weight_decay=weight_decay)
            self.parts.append((muon, matrix_rate))

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for optimizer, _ in self.parts:
            optimizer.zero_grad()

    def step(self, factor: float) -> None:
        """Step along the gradients, at `factor` times the peak learning rates."""
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()

    def get_state(self) -> dict[str, dict[str, Any]]:
        """Return the moments of each parameter, by its name."""
        return {
            self._names[p]: dict(moments)
            for optimizer, _ in self.parts
            for p, moments in optimizer.state.items()
        }

    def set_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore exactly what `get_state` returned."""
        for optimizer, _ in self.parts:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    moments = state.get(self._names[p])
                    if moments is not None:
                        optimizer.state[p] = {key: x.to(p.device) for key, x in moments.items()}
