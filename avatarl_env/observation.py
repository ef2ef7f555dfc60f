"""Observations: readings of the operated model while it reads the prompts.

Shapes: N operations of M prompts each, B = N * M, P prompt tokens, C width, L attention layers,
H heads, D head dim, A coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avatarl_env.lm.head_reader import HeadReader
from avatarl_env.surgery.projections import AttentionTarget

N_PROJECTED = 16  # numbers that the hidden state is projected to
N_READ = 8  # positions at the prompts' end where each head's output is read
LIMIT = 10.0  # observations are clipped to [-LIMIT, LIMIT]
SCORE_SCALE = 10.0  # a tenth of a nat of improvement reads as 1
TERM_SCALES = {
    "kl_ref": 1.0,
    "heldout_loss": 1.0,
    "distinct": 1.0,
    "collision_l2": 0.1,
    "ref_loglik": 1.0,
    "entropy": 1.0,
}
"""Terms of the baseline that are observed, in order, and their scales."""


class Vitals(NamedTuple):
    """Readings of one forward over an operation's prompts."""

    hidden: NDArray[np.float32]
    """(C,) final hidden state at the prompts' last token, mean over prompts."""
    query_log_rms: NDArray[np.float32]
    """(L * H,) log root mean square of each head's queries."""
    output_log_rms: NDArray[np.float32]
    """(L * H,) log root mean square of what each head writes into the residual stream at the
    prompts' last positions."""


class VitalSigns:
    """Context manager that reads a model's vitals in the first forward of its body.

    It uses plain forward hooks, so it works with any attention kernel, with operated weights and
    with overlays. An overlay must be entered first, or queries are read before it changes them.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[AttentionTarget],
        n_operations: int = 1,
        prompts: Tensor | None = None,
    ) -> None:
        """Choose the model; its hooks are set on entry and removed on exit.

        Args:
            model: a `CausalLM`.
            targets: the layers to read.
            n_operations: N; the batch holds M rows of the first, then M of the second, ...
            prompts: (B, P) tokens of that forward, if `prompt_losses` is needed.
        """
        self._head = HeadReader(model, None if prompts is None else prompts[:, 1:])
        self._targets = targets
        self._n = n_operations
        self._handles: list[RemovableHandle] = []
        self._queries: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._is_probing = False

    def __enter__(self) -> Self:
        """Set the hooks."""
        try:
            self._head.__enter__()
            for index, target in enumerate(self._targets):
                hook = self._read_queries(index, target)
                self._handles.append(target.query.module.register_forward_hook(hook))
                hook = self._read_output(index, target)
                # Before an overlay's, which changes what the module reads.
                handle = target.output.module.register_forward_pre_hook(hook, prepend=True)
                self._handles.append(handle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self._head.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def prompt_losses(self) -> Tensor:
        """Return the loss of every prompt token but the first, (B, P - 1), nats."""
        return self._head.losses()

    def read(self) -> list[Vitals]:
        """Return the readings of each operation; the body must have run a forward."""
        last = self._head.hidden  # (B, C)
        assert len(self._queries) == len(self._outputs) == len(self._targets), "a hook never fired"
        order = range(len(self._targets))
        hidden = last.view(self._n, -1, last.size(-1)).mean(1).float().cpu().numpy()  # (N, C)
        queries = torch.cat([self._queries[i] for i in order], dim=1).cpu().numpy()
        outputs = torch.cat([self._outputs[i] for i in order], dim=1).cpu().numpy()
        return [Vitals(*rows) for rows in zip(hidden, queries, outputs, strict=True)]

    def _read_queries(self, index: int, target: AttentionTarget) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if index not in self._queries:
                self._queries[index] = self._log_rms(target.query.heads(output.detach()))

        return hook

    def _read_output(self, index: int, target: AttentionTarget) -> Any:
        n_heads, head_dim = target.output.n_heads, target.output.head_dim

        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            if self._is_probing or index in self._outputs:
                return
            # Run the module itself, with its hooks, on each head alone.
            read = inputs[0].detach()[:, -N_READ:]  # (B, R, H * D)
            n_rows, n_read, width = read.shape
            alone = read.new_zeros(n_rows, n_read, n_heads, n_heads, head_dim)
            alone.diagonal(dim1=2, dim2=3).copy_(read.view(n_rows, n_read, n_heads, -1).mT)
            self._is_probing = True
            try:
                with torch.no_grad():
                    written = module(alone.view(n_rows, n_read * n_heads, width))
            finally:
                self._is_probing = False
            if target.output.bias is not None:  # belongs to no head
                written = written - target.output.bias
            self._outputs[index] = self._log_rms(written.view(n_rows, n_read, n_heads, -1))

        return hook

    def _log_rms(self, x: Tensor) -> Tensor:
        """Return the log root mean square of each operation and head: (B, ..., H, D) to (N, H)."""
        squares = x.float().square().mean(-1)
        means = squares.reshape(self._n, -1, x.size(-2)).mean(1)  # (N, H)
        return means.clamp_min(1e-12).log().mul(0.5)


class Observation:
    """The observation's space and values, in the layout of `AttentionSurgeryEnv`'s docstring."""

    def __init__(self, targets: Sequence[AttentionTarget], width: int, n_coef: int) -> None:
        """Fix the sizes.

        Args:
            targets: attention layers to read.
            width: C.
            n_coef: A.
        """
        n_heads = sum(target.n_heads for target in targets)
        self.size = N_PROJECTED + 2 * n_heads + len(TERM_SCALES) + 1 + n_coef + 1
        # A constant seed, so that all runs and surgeons see the same projection.
        rng = np.random.default_rng(20_17)
        self._projection = rng.normal(0.0, width**-0.5, (N_PROJECTED, width))

    def space(self) -> Box[np.float32]:
        """Return the observation space, a new object."""
        return Box(-LIMIT, LIMIT, (self.size,), np.float32)

    def observe(
        self,
        vitals: Vitals,
        baseline_terms: dict[str, float],
        improvement: float,
        coefficients: NDArray[np.float64],
        time_left: float,
    ) -> NDArray[np.float32]:
        """Return the observation, (size,) float32, a fresh array, always finite.

        Args:
            vitals: of the operated model.
            baseline_terms: of the unoperated model.
            improvement: score so far minus the baseline's.
            coefficients: (A,).
            time_left: fraction of the steps left, in [0, 1].
        """
        terms = [scale * baseline_terms[name] for name, scale in TERM_SCALES.items()]
        flat = np.concatenate(
            [
                self._projection @ np.nan_to_num(vitals.hidden),
                0.5 * vitals.query_log_rms,
                0.5 * vitals.output_log_rms,
                np.array([*terms, SCORE_SCALE * improvement]),
                coefficients,
                np.array([time_left]),
            ]
        )
        flat = np.nan_to_num(flat, nan=0.0, posinf=LIMIT, neginf=-LIMIT)
        return np.asarray(np.clip(flat, -LIMIT, LIMIT), dtype=np.float32)
