"""Which parameters of a model are to be operated on, and every place where modules hold them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from avatarl_env.errors import closest


class HasParameters(Protocol):
    """Anything that lists parameters: a module, an attention target."""

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters to operate on."""


TargetsLike = Iterable[HasParameters | Tensor | str]


class Site(NamedTuple):
    """A name under which a module holds a target."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    order: tuple[str, ...]
    """The module's parameters, which state_dict() and optimizers list in this order."""
    keys: tuple[str, ...] = ()
    """The keys of a ParameterDict, which has a list of them beside its parameters."""

    @property
    def place(self) -> tuple[nn.Module, str]:
        """Where it is."""
        return self.module, self.name

    def holds(self) -> bool:
        """Whether the module still finds the target under the name."""
        module, name = self.module, self.name
        return module._parameters.get(name) is self.parameter and name not in module.__dict__

    def put_back(self) -> None:
        """Give the module its target again, in its old place."""
        entries = self.module._parameters
        if not self.holds():
            for others in (self.module.__dict__, self.module._buffers, self.module._modules):
                others.pop(self.name, None)
            entries[self.name] = self.parameter
        if tuple(entries) != self.order:
            rank = {name: i for i, name in enumerate(self.order)}
            for name in sorted(entries, key=lambda name: rank.get(name, len(rank))):
                entries[name] = entries.pop(name)
        self._list_again()

    def _list_again(self) -> None:
        """Let modules that list their parameters a second time list them as they are."""
        module, name = self.module, self.name
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]
        if isinstance(module, nn.ParameterDict):
            present = {**module._keys, name: None}
            old = [key for key in self.keys if key in present]
            module._keys = dict.fromkeys([*old, *present])


class Choice(NamedTuple):
    """The targets of an operation, and what of the model has to do with them."""

    parameters: list[nn.Parameter]
    """The targets, each once."""
    names: list[str]
    """Their names in the model; a tied one's first."""
    sites: list[Site]
    """All places that hold a target, those of tied weights included."""
    reach: frozenset[nn.Parameter | nn.Module | int]
    """All parameters and modules of the model, and the addresses of the parameters' storage: two
    choices whose reach overlaps are of one."""
    aliases: list[Tensor]
    """Parameters and buffers that are no targets, but lie in the same storage as one."""


def choose(model: nn.Module, targets: TargetsLike) -> Choice:
    """Find `targets` in `model`, in one walk through its modules.

    Raises:
        TypeError: if a target is not a plain dense Parameter, or a module of the model is of a kind
            whose weights cannot be operated on (TorchScript, FSDP).
        ValueError: if there are no targets, or one does not belong to the model.
    """
    modules: dict[nn.Module, str] = {}
    _walk(model, "", modules)
    _check_kinds(modules)
    held = [
        (prefix + name, module, name, p)
        for module, prefix in modules.items()
        for name, p in module._parameters.items()
        if p is not None
    ]
    by_name = {full_name: p for full_name, _, _, p in held}
    chosen = _collect(model, targets, by_name)
    sites = [
        Site(module, name, p, tuple(module._parameters), _keys(module))
        for _, module, name, p in held
        if p in chosen
    ]
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    # Autograd counts the changes of each tensor, not those of its memory: all that lies in a
    # target's storage has to learn of edits.
    addresses = {x: _storage(x) for x in (*by_name.values(), *buffers)}
    operated = {addresses[p] for p in chosen} - {0}
    aliases = [x for x, address in addresses.items() if address in operated and x not in chosen]
    storages = {addresses[p] for p in by_name.values()} - {0}
    reach = frozenset[nn.Parameter | nn.Module | int]([*by_name.values(), *modules, *storages])
    return Choice(list(chosen), list(chosen.values()), sites, reach, aliases)


def _walk(module: nn.Module, prefix: str, found: dict[nn.Module, str]) -> None:
    """Note `module` and all below it with their names, as named_modules() but quicker."""
    found[module] = prefix
    for name, child in module._modules.items():
        if child is not None and child not in found:
            _walk(child, f"{prefix}{name}.", found)


def _check_kinds(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose weights an edit in place does not reach, or does not stay in."""
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


def _keys(module: nn.Module) -> tuple[str, ...]:
    return tuple(module.keys()) if isinstance(module, nn.ParameterDict) else ()


def n_bytes_spanned(tensor: Tensor) -> int:
    """Return the bytes from the first of a strided tensor's elements to the end of the last."""
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((n - 1) * step for n, step in steps) + 1) * tensor.element_size()


def address_range(tensor: Tensor) -> range:
    """Return the addresses of a tensor's memory; none if it has no memory of a plain kind."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return range(0)
    return range(tensor.data_ptr(), tensor.data_ptr() + n_bytes_spanned(tensor))


def _storage(tensor: Tensor) -> int:
    """Return the address of a plain tensor's storage; 0 if it has none."""
    if type(tensor) not in (nn.Parameter, Tensor):
        return 0
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return 0
    return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()


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
            if type(p) is not nn.Parameter or p.layout != torch.strided or p.is_meta:
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
    """Return the parameter of this name, which may lead through a module's second name."""
    if name not in by_name:
        by_name = dict(model.named_parameters(remove_duplicate=False))
    if name not in by_name:
        hint = closest(name, by_name)
        raise ValueError(f"targets must name parameters of the model, got {name!r}{hint}")
    return by_name[name]
