"""The parameters to operate on: where a model keeps them, and which ones are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from avatarl_env.errors import closest


class HasParameters(Protocol):
    """Anything that lists parameters: a module, an attention target, an operator."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters to operate on."""


TargetsLike = Iterable[HasParameters | Tensor | str]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Site(NamedTuple):
    """A place of a target: a module and a name in it."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    order: tuple[str, ...]
    """Names of the module's parameters in the order of state_dict() and of optimizers."""
    keys: tuple[str, ...]
    """Keys of a ParameterDict, which it stores separately."""

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Site:
        """Describe a place and the parameter there."""
        parameter = module._parameters[name]
        assert parameter is not None
        keys = tuple(module.keys()) if isinstance(module, nn.ParameterDict) else ()
        return cls(module, name, parameter, tuple(module._parameters), keys)

    def holds(self) -> bool:
        """Return whether the target is still in its place."""
        module, name = self.module, self.name
        return module._parameters.get(name) is self.parameter and name not in module.__dict__

    def put_back(self) -> None:
        """Put the target back in its place, and in its old order."""
        module, name = self.module, self.name
        if not self.holds():
            for others in (module.__dict__, module._buffers, module._modules):
                others.pop(name, None)
            module._parameters[name] = self.parameter
        _sort(module._parameters, self.order)
        if isinstance(module, nn.RNNBase):  # keeps a list of its parameters
            module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
        if isinstance(module, nn.ParameterDict):
            module._keys[name] = None
            _sort(module._keys, self.keys)


class Choice(NamedTuple):
    """The targets of an operation, and the parts of the model that they affect."""

    names: dict[nn.Parameter, str]
    """The targets, each once, and their names in the model (a tied one's first name)."""
    sites: list[Site]
    """All places of the targets; tied weights have several."""
    reach: frozenset[nn.Parameter | nn.Module | int]
    """Parameters and modules of the model, and addresses of the parameters' storage. Two choices
    that have any of these in common are of the same model."""
    aliases: list[Tensor]
    """Parameters and buffers that are not targets but share storage with one."""

    def require_places(self, action: str) -> None:
        """Raise a RuntimeError unless every target is in its places."""
        for site in self.sites:
            if not site.holds():
                raise RuntimeError(f"{action} needs every target in its place, {site.name} is not")

    def present(self) -> Choice:
        """Return this choice with the current places, and the parameters there added."""
        sites = [Site.of(site.module, site.name) for site in self.sites]
        names = dict(self.names)
        for old, new in zip(self.sites, sites, strict=True):
            names.setdefault(new.parameter, self.names[old.parameter])
        return self._replace(names=names, sites=sites)


def choose(model: nn.Module, targets: TargetsLike) -> Choice:
    """Find `targets` in `model`, in one walk through its modules.

    Raises:
        TypeError: if a target is not a plain dense Parameter, or the model is TorchScript or
            sharded by FSDP.
        ValueError: if there are no targets, or one does not belong to the model.
    """
    modules: dict[nn.Module, str] = {}
    _walk(model, "", modules)
    _check_modules(modules)
    held = [
        (prefix + name, module, name, p)
        for module, prefix in modules.items()
        for name, p in module._parameters.items()
        if p is not None
    ]
    by_name = {full_name: p for full_name, _, _, p in held}
    names = _collect(model, targets, by_name)
    sites = [Site.of(module, name) for _, module, name, p in held if p in names]
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    # Autograd counts changes by tensor, not by memory: after an edit, all tensors that share a
    # target's storage must be marked as changed.
    storages = {x: storage_address(x) for x in (*by_name.values(), *buffers)}
    operated = {storages[p] for p in names} - {0}
    aliases = [x for x, address in storages.items() if address in operated and x not in names]
    addresses = {storages[p] for p in by_name.values()} - {0}
    reach = frozenset[nn.Parameter | nn.Module | int]([*by_name.values(), *modules, *addresses])
    return Choice(names, sites, reach, aliases)


def check_weight(module: nn.Module) -> None:
    """Raise a ValueError unless the module's weight can be multiplied by a gain.

    The integers and 8-bit numbers of quantised layers cannot: 1.6 would be rounded to 1 or 2.
    """
    got = getattr(getattr(module, "weight", None), "dtype", None)
    if got not in _FLOATS:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
        raise ValueError(
            f"weights to operate on must be {kinds}, got {got} in a {type(module).__name__}; "
            "load the model without quantisation"
        )


def check_unfrozen() -> None:
    """Raise a RuntimeError if inductor is set to copy weights into the graphs that it compiles."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and config.freezing:
        raise RuntimeError(
            "torch._inductor.config.freezing must be False to operate on a model, got True: "
            "frozen graphs keep the weights they were compiled with"
        )


def check_value(name: str, parameter: Tensor, value: Any) -> None:
    """Refuse a value that cannot be written into a parameter without broadcasting or casting.

    Raises:
        RuntimeError: if the parameter's storage was freed or shrunk.
        TypeError: if `value` is not a tensor.
        ValueError: if it has another shape, or a kind of numbers that the parameter cannot hold.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"value must be a tensor, got {type(value).__name__}")
    both_float = value.is_floating_point() and parameter.is_floating_point()
    kept = both_float or torch.promote_types(value.dtype, parameter.dtype) == parameter.dtype
    if value.shape != parameter.shape or not kept:
        raise ValueError(
            f"value must fit {name}, which is {tuple(parameter.shape)} {parameter.dtype}, "
            f"got {tuple(value.shape)} {value.dtype}"
        )
    check_storage(name, parameter)


def check_storage(name: str, tensor: Tensor) -> None:
    """Raise a RuntimeError unless the storage of `tensor` reaches to its last element.

    Storage can be freed or shrunk (`untyped_storage().resize_`) while tensors refer to it. Reading
    or writing such a tensor accesses memory of something else.
    """
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = int(tensor.storage_offset()) + sum((n - 1) * step for n, step in steps)
        needed, got = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
        if got < needed:
            raise RuntimeError(
                f"the storage of {name} must have at least {needed} bytes, got {got}: it was freed "
                "or shrunk"
            )


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; 0 if it has no plain storage in memory."""
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) else 0


def _is_plain(tensor: Tensor) -> bool:
    is_tensor = type(tensor) in (nn.Parameter, Tensor)
    return is_tensor and tensor.layout == torch.strided and not tensor.is_meta


def _walk(module: nn.Module, prefix: str, found: dict[nn.Module, str]) -> None:
    """Collect `module` and its descendants with their names, faster than named_modules()."""
    found[module] = prefix
    for name, child in module._modules.items():
        if child is not None and child not in found:
            _walk(child, f"{prefix}{name}.", found)


def _check_modules(modules: Iterable[nn.Module]) -> None:
    """Refuse modules that in-place edits do not reach, or that replace their weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                "model must be a plain nn.Module, got TorchScript; operate on the module that was "
                "scripted or traced, and script it again"
            )
        if isinstance(module, sharded):
            raise TypeError(
                f"model must not be sharded, got {type(module).__name__} of FSDP, which replaces "
                "its weights when it gathers and shards them; operate on an unsharded copy"
            )


def _collect(
    model: nn.Module, targets: TargetsLike, by_name: dict[str, nn.Parameter]
) -> dict[nn.Parameter, str]:
    """Return the distinct parameters of `targets` and their names, all checked."""
    names = {p: name for name, p in reversed(by_name.items())}
    found: dict[nn.Parameter, str] = {}
    for target in targets:
        if isinstance(target, str):
            chosen: Iterable[Tensor] = [_named(model, target, by_name)]
        else:
            chosen = [target] if isinstance(target, Tensor) else target.parameters()
        for p in chosen:
            if type(p) is not nn.Parameter or not _is_plain(p):
                raise TypeError(
                    f"targets must be plain dense parameters, got {type(p).__name__} "
                    f"({p.layout}, {p.device})"
                )
            if p not in names:
                raise ValueError(f"targets must belong to the model, got one of {tuple(p.shape)}")
            found[p] = names[p]
    if not found:
        raise ValueError("targets must hold at least one parameter, got none")
    return found


def _named(model: nn.Module, name: str, by_name: dict[str, nn.Parameter]) -> nn.Parameter:
    """Return the parameter of a name; its module may have several."""
    if name not in by_name:
        by_name = dict(model.named_parameters(remove_duplicate=False))
    if name not in by_name:
        hint = closest(name, by_name)
        raise ValueError(f"targets must name parameters of the model, got {name!r}{hint}")
    return by_name[name]


def _sort(entries: dict[str, Any], order: tuple[str, ...]) -> None:
    """Sort a dict's entries into this order, others last."""
    if tuple(entries) != order:
        rank = {name: i for i, name in enumerate(order)}
        for name in sorted(entries, key=lambda name: rank.get(name, len(rank))):
            entries[name] = entries.pop(name)
