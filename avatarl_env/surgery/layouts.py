"""Where architectures keep their attention projections: one row of `LAYOUTS` for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from avatarl_env.surgery.projections import AttentionTarget, Projection, is_transposed


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a class of attention modules keeps its projections: attribute names, dots allowed.

    Raises:
        ValueError: if only one of key and value has a name, or both the same, or an interleaved
            projection is not fused or has fewer keys than queries.
    """

    query: str
    """The module that makes the queries, and keys and values too if these have no names (fused)."""
    output: str
    """The module that mixes the heads' outputs."""
    key: str | None = None
    value: str | None = None
    n_heads: str | int
    """Query heads: the name of an attribute, or the number."""
    n_kv_heads: str | int | None = None
    """Key and value heads; default as many as query heads."""
    interleaved: bool = False
    """Whether a fused projection has q, k, v head by head, rather than all q, all k, all v."""
    query_norm: str | None = None
    """A normalisation of the queries after their projection; None if there is none."""
    unless: str | None = None
    """An attribute that is true where a module of the class is not self-attention."""

    def __post_init__(self) -> None:
        if (self.key is None) != (self.value is None):
            raise ValueError(
                "layout must name both key and value, or neither if the query's module makes "
                f"them, got key={self.key!r} and value={self.value!r}"
            )
        if self.key is not None and self.key == self.value:
            raise ValueError(f"layout must name a module each for key and value, got {self.key!r}")
        if self.interleaved and (self.key is not None or self.n_kv_heads is not None):
            raise ValueError(
                "layout can be interleaved only if one module makes as many keys as queries, "
                f"got key={self.key!r} and n_kv_heads={self.n_kv_heads!r}"
            )

    def target(self, name: str, layer: int, module: nn.Module) -> AttentionTarget:
        """Describe `module` as an attention layer.

        Raises:
            ValueError: if the module has no such attributes, or their sizes do not fit.
        """
        n_heads = n_kv = _count(module, name, self.n_heads)
        if self.n_kv_heads is not None:
            n_kv = _count(module, name, self.n_kv_heads)
        query, output = (_linear(module, name, path) for path in (self.query, self.output))
        # Heads in the channels of every module; the query's give the head dim.
        heads = {self.query: n_heads}
        if self.key is None or self.value is None:
            key = value = query
            heads[self.query] += 2 * n_kv
        else:
            key, value = (_linear(module, name, path) for path in (self.key, self.value))
            heads |= {self.key: n_kv, self.value: n_kv}
        head_dim = _n_channels(query) // heads[self.query]
        channels = {path: _n_channels(_linear(module, name, path)) for path in heads}
        channels[self.output] = _n_channels(output, reads_heads=True)
        heads[self.output] = n_heads
        fits = all(channels[path] == heads[path] * head_dim > 0 for path in heads)
        if not fits or n_heads % n_kv:
            raise ValueError(
                f"layout of {name} must fit {n_heads} query heads and {n_kv} key heads, "
                f"got channels {channels}"
            )
        starts, stride = (0, 0, 0), head_dim
        if self.interleaved:
            starts, stride = (0, head_dim, 2 * head_dim), 3 * head_dim
        elif self.key is None:
            starts = (0, n_heads * head_dim, (n_heads + n_kv) * head_dim)
        norm = None if self.query_norm is None else _attribute(module, name, self.query_norm)
        return AttentionTarget(
            name,
            layer,
            Projection(query, n_heads, head_dim, starts[0], stride),
            Projection(key, n_kv, head_dim, starts[1], stride),
            Projection(value, n_kv, head_dim, starts[2], stride),
            Projection(output, n_heads, head_dim, 0, head_dim, reads_heads=True),
            normalises_queries=norm is not None,
        )


_SEPARATE = Layout(
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="o_proj",
    n_heads="config.num_attention_heads",
    n_kv_heads="config.num_key_value_heads",
)

LAYOUTS: dict[str, Layout] = {
    "GPTAttention": Layout(query="c_attn", output="c_proj", n_heads="n_heads"),
    "GPT2Attention": Layout(
        query="c_attn", output="c_proj", n_heads="num_heads", unless="is_cross_attention"
    ),
    "GPTNeoXAttention": Layout(
        query="query_key_value",
        output="dense",
        n_heads="config.num_attention_heads",
        interleaved=True,
    ),
    "ArceeAttention": _SEPARATE,
    "LlamaAttention": _SEPARATE,
    "MistralAttention": _SEPARATE,
    "Qwen2Attention": _SEPARATE,
    "Qwen3Attention": replace(_SEPARATE, query_norm="q_norm"),
    "Phi3Attention": Layout(
        query="qkv_proj",
        output="o_proj",
        n_heads="config.num_attention_heads",
        n_kv_heads="config.num_key_value_heads",
    ),
}
"""Layouts by the class name of the attention module, or of a base class of it.

`LAYOUTS["MyAttention"] = Layout(query="qkv", output="proj", n_heads="heads")` adds one.
"""


def layout_of(name: str, module: nn.Module) -> Layout | None:
    """Return the layout of the module's class or nearest base class; None if not self-attention.

    Raises:
        ValueError: if the layout names an attribute that the module does not have.
    """
    known = (LAYOUTS[k.__name__] for k in type(module).__mro__ if k.__name__ in LAYOUTS)
    layout = next(known, None)
    if layout is None or (layout.unless and _attribute(module, name, layout.unless)):
        return None
    return layout


def _attribute(module: nn.Module, name: str, path: str) -> object:
    """Return the object at a dotted path."""
    value: object = module
    for part in path.split("."):
        if not hasattr(value, part):
            kind = type(module).__name__
            raise ValueError(f"layout of {name} must name attributes of {kind}, got {path!r}")
        value = getattr(value, part)
    return value


def _count(module: nn.Module, name: str, path: str | int) -> int:
    """Return a number of heads; a number stands for itself."""
    value = path if isinstance(path, int) else _attribute(module, name, path)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"layout of {name} must count heads from 1, got {value!r} as {path!r}")
    return value


def _linear(module: nn.Module, name: str, path: str) -> nn.Module:
    """Return a linear module, whose weight must be a parameter, not a computed tensor."""
    found = _attribute(module, name, path)
    weight = found._parameters.get("weight") if isinstance(found, nn.Module) else None
    if not isinstance(found, nn.Module) or weight is None or weight.dim() != 2:
        raise ValueError(
            f"layout of {name} must name linear modules whose weight is a parameter, "
            f"got {path!r}, a {type(found).__name__}"
        )
    return found


def _n_channels(module: nn.Module, *, reads_heads: bool = False) -> int:
    """Return how many channels a linear module makes, or reads."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return int(columns if is_transposed(module) != reads_heads else rows)
