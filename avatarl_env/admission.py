"""Which models cannot go on the table, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def check_model(model: object) -> None:
    """Raise a ValueError for a model that cannot be operated on as it is.

    That is one that is compiled or scripted (hooks would not run), offloaded (its weights come and
    go), quantised or sharded (its weights are no plain numbers), or has adapters (an operation on a
    base weight would leave them out).
    """
    if not isinstance(model, nn.Module):
        return  # for others to refuse
    for name, module in model.named_modules():
        for find, remedy in _OBSTACLES:
            found = find(module)
            if found:
                raise ValueError(f"model must {remedy}, got {found} at {name or 'its root'!r}")


def _compiled(module: nn.Module) -> str:
    is_compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
    return f"a compiled {type(module).__name__}" if is_compiled else ""


def _scripted(module: nn.Module) -> str:
    return "TorchScript" if isinstance(module, torch.jit.ScriptModule) else ""


def _offloaded(module: nn.Module) -> str:
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    if getattr(hook, "offload", False) or type(hook).__name__ == "CpuOffload":
        return "offloaded weights"
    tensors: Iterable[torch.Tensor | None] = [
        *module._parameters.values(),
        *module._buffers.values(),
    ]
    return "weights on the meta device" if any(t is not None and t.is_meta for t in tensors) else ""


def _quantized(module: nn.Module) -> str:
    if type(module).__module__.startswith("torch.ao.nn.quantized") or "qweight" in module._buffers:
        return f"a quantised {type(module).__name__}"
    for p in module._parameters.values():
        if p is None:
            continue
        if not p.is_floating_point() or is_traceable_wrapper_subclass(p):
            return f"a {type(p).__name__} of {p.dtype}"
    return ""


def _adapted(module: nn.Module) -> str:
    has_adapter = "base_layer" in module._modules and hasattr(module, "merge")
    return f"an adapter ({type(module).__name__})" if has_adapter else ""


_OBSTACLES: tuple[tuple[Callable[[nn.Module], str], str], ...] = (
    (_scripted, "be a plain module, not TorchScript: pass the module that was given to torch.jit"),
    (_compiled, "not be compiled: pass the module that was given to torch.compile (its _orig_mod)"),
    (
        _offloaded,
        "have its weights in memory on one device: load it without offloading and without "
        "device_map, and give parameters on the meta device their values",
    ),
    (
        _quantized,
        "have plain floating-point weights: load it without quantisation (dtype='bfloat16' takes "
        "half the memory) and without sharding",
    ),
    (_adapted, "have its adapters merged: pass what model.merge_and_unload() returns"),
)
