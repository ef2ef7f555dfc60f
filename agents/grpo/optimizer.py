"""Muon for the matrices inside the blocks, AdamW for all else; or AdamW for everything."""

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
    """Steps all parameters of a model, each by the optimizer that suits it.

    Muon orthogonalises the momentum of a matrix (Jordan et al. 2024; torch's own, with its width
    correction `sqrt(max(1, rows / columns))`). It is for matrices between hidden states: the
    embedding, which is the output head too, and the norms are AdamW's.
    """

    def __init__(
        self, model: GPT, name: str, *, rate: float, matrix_rate: float, weight_decay: float
    ) -> None:
        """Sort the parameters.

        Args:
            model: whose parameters are stepped.
            name: `"muon"` or `"adamw"`.
            rate: AdamW's peak learning rate.
            matrix_rate: Muon's.
            weight_decay: on matrices, times the learning rate.
        """
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

    def schedule(self, factor: float) -> None:
        """Set every learning rate to so much of its peak."""
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer, _ in self.parts:
            optimizer.zero_grad()

    def step(self) -> None:
        """Step along the present gradients."""
        for optimizer, _ in self.parts:
            optimizer.step()

    def get_state(self, names: Mapping[Tensor, str]) -> dict[str, dict[str, Any]]:
        """Return what is known of each parameter, by the parameters' names."""
        return {
            names[p]: dict(moments)
            for optimizer, _ in self.parts
            for p, moments in optimizer.state.items()
        }

    def set_state(
        self, state: Mapping[str, Mapping[str, Any]], names: Mapping[Tensor, str]
    ) -> None:
        """Go on exactly from what `get_state` returned."""
        for optimizer, _ in self.parts:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if names[p] in state:
                        moments = state[names[p]].items()
                        optimizer.state[p] = {key: x.to(p.device) for key, x in moments}
