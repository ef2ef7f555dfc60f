"""Sampling as one CUDA graph.

With a small model, decoding token by token leaves the GPU waiting for the host. With fixed shapes,
a generation is always the same sequence of kernels, which can be captured once and replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from avatarl_env.lm.generation import Generation, LanguageModel, generate

_WARM_UP = 2  # runs before the capture, in which libraries allocate and choose their kernels


class _Capture(NamedTuple):
    key: tuple[object, ...]
    graph: torch.cuda.CUDAGraph
    prompts: Tensor
    uniforms: Tensor
    generation: Generation


class GraphedGeneration:
    """`generate`, on a CUDA device through a graph.

    The graph reads the weights in place, so it sees the updates of an optimizer or a theater. It is
    captured again if a weight has moved, or shapes or temperature differ; only the latest capture
    is kept. Hooks run on the host and would not be replayed: with hooks, and on the CPU, this is
    plain `generate`.
    """

    def __init__(self) -> None:
        """Start without a capture."""
        self._capture: _Capture | None = None

    def __call__(
        self, model: LanguageModel, prompts: Tensor, uniforms: Tensor, *, temperature: float = 1.0
    ) -> Generation:
        """Continue every prompt; arguments and result are those of `generate`."""
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
            self._capture = None  # frees its memory before the next one is allocated
            self._capture = _capture(key, model, prompts, uniforms, temperature)
        _, graph, own_prompts, own_uniforms, generation = self._capture
        own_prompts.copy_(prompts)
        own_uniforms.copy_(uniforms)
        graph.replay()
        return Generation(generation.tokens.clone(), generation.log_probs.clone(), None)


def _can_be_captured(model: object) -> bool:
    """Return whether a forward consists of kernels only: no hooks, no autocast (caches weights)."""
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
        generation = generate(model, prompts, uniforms, temperature=temperature)
    return _Capture(key, graph, prompts, uniforms, generation)
