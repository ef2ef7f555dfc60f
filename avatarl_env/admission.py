"""Models that cannot be operated on, and what to do instead."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

REMEDIES = {
    "TorchScript": "be a plain module, not TorchScript: pass the module given to torch.jit",
    "compiled": "not be compiled: pass the module given to torch.compile (its _orig_mod)",
    "offloaded": "have its weights in memory on one device: load it without offloading and without "
    "device_map, and give parameters on the meta device their values",
    "quantised": "have plain floating-point weights: load it without quantisation "
    "(dtype='bfloat16' takes half the memory) and without sharding",
    "adapted": "have its adapters merged: pass what model.merge_and_unload() returns",
}


def check_model(model: object) -> None:
    """Raise a ValueError for a model that cannot be operated on as it is.

    Hooks would not run in a compiled or scripted one; weights come and go in an offloaded one, and
    are no plain numbers in a quantised or sharded one; an operation on a base weight would leave
    its adapters out.
    """
    if not isinstance(model, nn.Module):
        return  # refused elsewhere
    for name, module in model.named_modules():
        kind, found = _obstacle(module)
        if kind:
            at = name or "its root"
            raise ValueError(f"model must {REMEDIES[kind]}, got {found} at {at!r}")


def _obstacle(module: nn.Module) -> tuple[str, str]:
    """Return the first obstacle in a module itself, by kind and in words, or two times ""."""
    kind = type(module).__name__
    tensors = [
        t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
    ]
    hook = getattr(module, "_hf_hook", None)  # accelerate's
    is_offloaded = getattr(hook, "offload", False) or type(hook).__name__ == "CpuOffload"
    of_torch = type(module).__module__.startswith("torch.ao.nn.quantized")
    odd = [
        p
        for p in module._parameters.values()
        if p is not None and (not p.is_floating_point() or is_traceable_wrapper_subclass(p))
    ]
    obstacles = [
        ("TorchScript", "TorchScript", isinstance(module, torch.jit.ScriptModule)),
        ("compiled", f"a compiled {kind}", "_orig_mod" in module._modules),
        ("compiled", f"a compiled {kind}", module._compiled_call_impl is not None),
        ("offloaded", "offloaded weights", is_offloaded),
        ("offloaded", "weights on the meta device", any(t.is_meta for t in tensors)),
        ("quantised", f"a quantised {kind}", of_torch or "qweight" in module._buffers),
        ("quantised", ", ".join(f"a {type(p).__name__} of {p.dtype}" for p in odd), bool(odd)),
        (
            "adapted",
            f"an adapter ({kind})",
            "base_layer" in module._modules and hasattr(module, "merge"),
        ),
    ]
    return next(((name, found) for name, found, is_there in obstacles if is_there), ("", ""))
