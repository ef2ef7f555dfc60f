"""Sampling as one CUDA graph: all kernels of a text launched at once.

Decoding a small model one token at a time leaves a GPU waiting for its host. With the shapes fixed,
prompt, sampling and all steps are the same kernels every time, and can be captured and replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from avatarl_env.lm.generation import Generation, LanguageModel, generate

_WARM_UP = 2  # runs before the capture: libraries allocate and choose their kernels in the first


class _Capture(NamedTuple):
    key: tuple[object, ...]
    graph: torch.cuda.CUDAGraph
    prompts: Tensor
    uniforms: Tensor
    generation: Generation


class GraphedGeneration:
    """Calls `generate`; on a CUDA device through a graph.

    The graph reads weights from where they lie, so it writes with what an optimizer or a theater
    has put there: both leave storage in place. Should a weight have moved, or shapes or temperature
    differ, it is captured anew; the latest capture is kept. Hooks run on the host and would not be
    replayed: a model that has any, and one on the CPU, is sampled from as usual.
    """

    def __init__(self) -> None:
        """Start without a capture."""
        self._capture: _Capture | None = None

    def __call__(
        self, model: LanguageModel, prompts: Tensor, uniforms: Tensor, *, temperature: float = 1.0
    ) -> Generation:
        """Let a model continue every prompt by one token per column of uniforms.

        Args:
            model: the writer.
            prompts: (B, P) int64.
            uniforms: (B, N) in [0, 1).
            temperature: divides the logits, > 0.

        Returns:
            What `generate` returns; the tensors are the caller's own.
        """
        if prompts.device.type != "cuda" or not _can_be_captured(model):
            return generate(model, prompts, uniforms, temperature=temperature)
        with torch.cuda.device(prompts.device):  # streams and graphs are the current device's
            return self._replayed(model, prompts, uniforms, temperature)

    def _replayed(
        self, model: LanguageModel, prompts: Tensor, uniforms: Tensor, temperature: float
    ) -> Generation:
        assert isinstance(model, nn.Module)
        places = tuple(p.data_ptr() for p in model.parameters())
        key = (id(model), places, prompts.shape, uniforms.shape, uniforms.dtype, temperature)
        if self._capture is None or self._capture.key != key:
            self._capture = None  # its memory goes before the next one's comes
            self._capture = _capture(key, model, prompts, uniforms, temperature)
        _, graph, own_prompts, own_uniforms, made = self._capture
        own_prompts.copy_(prompts)
        own_uniforms.copy_(uniforms)
        graph.replay()
        return Generation(made.tokens.clone(), made.log_probs.clone(), None)


def _can_be_captured(model: object) -> bool:
    """Whether a forward is kernels only: a module without hooks, no autocast that keeps weights."""
    if torch.is_autocast_enabled("cuda") or not isinstance(model, nn.Module):
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _capture(
    key: tuple[object, ...],
    model: LanguageModel,
    prompts: Tensor,
    uniforms: Tensor,
    temperature: float,
) -> _Capture:
    prompts, uniforms = prompts.clone(), uniforms.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            generate(model, prompts, uniforms, temperature=temperature)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = generate(model, prompts, uniforms, temperature=temperature)
    return _Capture(key, graph, prompts, uniforms, made)
