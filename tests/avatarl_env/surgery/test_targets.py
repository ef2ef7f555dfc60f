"""Tests of avatarl_env/surgery/targets.py and layouts.py, checked on the models' own attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarl_env.lm import gpt
from avatarl_env.lm.gpt import GPT
from avatarl_env.surgery import (
    LAYOUTS,
    Layout,
    Projection,
    Targets,
    find_targets,
)
from tests.fakes import tiny_gpt
from tests.zoo import N_HEADS, N_LAYERS, ZOO, plain, shared, tokens

KV_HEADS = {"gpt": 4, "gpt2": 4, "neox": 4}
HEAD_DIM = {"gpt": 4, "qwen3": 8}


class Tap:
    """Wrap a model's attention: record queries, keys and values, mute one head on request."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.mute: tuple[int, int] | None = None
        """(layer, head) whose attention output is replaced by zeros."""

    def before(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.calls.append((q.clone(), k.clone(), v.clone()))

    def after(self, y: Tensor, head_axis: int) -> Tensor:
        if self.mute is not None and self.mute[0] == len(self.calls) - 1:
            y = y.clone()
            y.select(head_axis, self.mute[1]).zero_()
        return y

    def run(self, model: nn.Module) -> Tensor:
        self.calls.clear()
        with torch.no_grad():
            return model(tokens(2, 6))  # type: ignore[no-any-return]


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN

    tap = Tap()
    ours, theirs = gpt.attention, KNOWN["sdpa"]

    def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tap.before(q, k, v)
        return tap.after(ours(q, k, v), 1)

    def their_attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, None]:
        tap.before(q, k, v)
        return tap.after(theirs(module, q, k, v, *args, **options)[0], 2), None

    monkeypatch.setattr(gpt, "attention", our_attention)
    monkeypatch.setitem(KNOWN, "sdpa", their_attention)
    return tap


@contextmanager
def silenced(projection: Projection, head: int) -> Iterator[None]:
    """Set the projection's output for one head to zero."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> Tensor:
        made = made.clone()
        projection.heads(made)[..., head, :] = 0
        return made

    handle = projection.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edited(weight: Tensor, edit: Callable[[Tensor], object]) -> Iterator[None]:
    saved = weight.detach().clone()
    with torch.no_grad():
        edit(weight)
    try:
        yield
    finally:
        weight.data.copy_(saved)


# --- the right channels --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_heads_are_counted_and_sized(name: str) -> None:
    targets = find_targets(shared(name))
    assert [target.layer for target in targets] == list(range(N_LAYERS))
    for target in targets:
        assert target.n_heads == target.query.n_heads == target.output.n_heads == N_HEADS
        assert target.key.n_heads == target.value.n_heads == KV_HEADS.get(name, 2)
        parts = (target.query, target.key, target.value, target.output)
        assert {part.head_dim for part in parts} == {HEAD_DIM.get(name, 4)}
        assert [part.reads_heads for part in parts] == [False, False, False, True]
        assert target.normalises_queries == (name == "qwen3")


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("name", ZOO)
def test_silencing_a_head_silences_that_head_of_that_part_alone(
    name: str, part: str, tap: Tap
) -> None:
    model = shared(name)
    which = ("query", "key", "value").index(part)
    for target in find_targets(model):
        tap.run(model)
        plain_parts = tap.calls[target.layer]
        for head in range(getattr(target, part).n_heads):
            with silenced(getattr(target, part), head):
                tap.run(model)
            parts = tap.calls[target.layer]
            expected = [x.clone() for x in plain_parts]
            assert (expected[which][:, head] != 0).any()
            expected[which][:, head] = 0  # (B, H, T, D)
            for x, y in zip(parts, expected, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("name", ZOO)
def test_zeroed_columns_of_the_output_mute_their_head(name: str, tap: Tap) -> None:
    model = shared(name)
    unmuted = tap.run(model)
    for target in find_targets(model):
        weight = target.output.weight
        for head in range(N_HEADS):
            tap.mute = (target.layer, head)
            expected = tap.run(model)
            tap.mute = None
            with edited(weight, lambda w, t=target, h=head: t.output.by_head(w)[:, h].zero_()):
                found = tap.run(model)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
            assert (expected - unmuted).abs().max() > 0.01


# --- which layers --------------------------------------------------------------------------------

FOUR = tiny_gpt(n_layers=4, n_heads=2, width=8)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        (2, [2]),
        (-1, [3]),
        (-4, [0]),
        ([3, 1], [1, 3]),
        ([1, -3, "blocks.1.attn"], [1]),
        ("blocks.2.attn", [2]),
        ("*", [0, 1, 2, 3]),
        ("blocks.[0-1].*", [0, 1]),
        (["blocks.[!0]*", 0], [0, 1, 2, 3]),
        (("*.3.attn", 0), [0, 3]),
        (range(2), [0, 1]),
        (np.array([2, 0]), [0, 2]),
    ],
)
def test_layers_are_chosen_by_number_name_and_glob(layers: Any, expected: list[int]) -> None:
    """In the model's order, each once."""
    targets = find_targets(FOUR, layers)
    assert [target.layer for target in targets] == expected
    assert [target.name for target in targets] == [f"blocks.{i}.attn" for i in expected]
    for target in targets:
        assert target.query.module is FOUR.blocks[target.layer].attn.c_attn


@pytest.mark.parametrize("entry", [4, -5, "blocks.4.attn", "attn", "BLOCKS.*", ""])
def test_an_entry_that_matches_nothing_is_refused_with_the_layers(entry: int | str) -> None:
    for layers in (entry, [0, entry]):
        match = rf"^layers must match .*{re.escape(repr(entry))} .*0: blocks.0.attn, 1: blocks.1"
        with pytest.raises(ValueError, match=match):
            find_targets(FOUR, layers)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers must have 1 to .*, got \[\]"):
        find_targets(FOUR, [])
    with pytest.raises(ValueError, match="at least one attention layer, got none"):
        find_targets(FOUR)[4:]


def test_names_are_paths_inside_the_searched_model() -> None:
    assert find_targets(nn.ModuleDict({"policy": FOUR}))[0].name == "policy.blocks.0.attn"
    assert find_targets(FOUR.blocks[0].attn)[0].name == ""
    assert find_targets(shared("gpt2"), -1)[0].name == "model.transformer.h.1.attn"


# --- other architectures -------------------------------------------------------------------------


class Mine(nn.Module):
    """Attention of two heads of two channels, fused, with its own attribute names."""

    def __init__(self, n_made: int = 12, n_read: int = 4) -> None:
        super().__init__()
        self.heads = 2
        self.inner = nn.ModuleDict({"qkv": nn.Linear(4, n_made), "out": nn.Linear(n_read, 4)})
        self.norm: nn.Module | None = None
        self.cross = False


class Child(Mine):
    pass


FUSED = Layout(query="inner.qkv", output="inner.out", n_heads="heads")


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Layout]:
    """The table of layouts, restored after the test."""
    before = dict(LAYOUTS)
    for name, layout in before.items():
        monkeypatch.setitem(LAYOUTS, name, layout)
    monkeypatch.setitem(LAYOUTS, "Mine", FUSED)
    return LAYOUTS


@pytest.mark.parametrize("kind", [Mine, Child])
def test_one_table_entry_describes_another_architecture(
    kind: type[Mine], layouts: dict[str, Layout]
) -> None:
    layouts["Mine"] = Layout(query="inner.qkv", output="inner.out", n_heads="heads")
    (target,) = find_targets(nn.Sequential(nn.Linear(4, 4), kind()))
    assert target.name == "1"
    x = torch.arange(12)
    parts = (target.query, target.key, target.value)
    assert [part.heads(x).flatten().tolist() for part in parts] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_grouped_and_interleaved_fused_projections(layouts: dict[str, Layout]) -> None:
    """Grouped: q q k v of two channels each; interleaved: q k v q k v."""
    layouts["Mine"] = Layout(query="inner.qkv", output="inner.out", n_heads="heads", n_kv_heads=1)
    (target,) = find_targets(Mine(n_made=8))
    x = torch.arange(12)
    assert target.query.heads(x).tolist() == [[0, 1], [2, 3]]
    assert target.key.heads(x).tolist() == [[4, 5]]
    assert target.value.heads(x).tolist() == [[6, 7]]
    layouts["Mine"] = Layout(query="inner.qkv", output="inner.out", n_heads=2, interleaved=True)
    (target,) = find_targets(Mine())
    assert target.query.heads(x).tolist() == [[0, 1], [6, 7]]
    assert target.key.heads(x).tolist() == [[2, 3], [8, 9]]
    assert target.value.heads(x).tolist() == [[4, 5], [10, 11]]


def test_a_query_norm_of_none_normalises_nothing(layouts: dict[str, Layout]) -> None:
    layouts["Mine"] = Layout(
        query="inner.qkv", output="inner.out", n_heads="heads", query_norm="norm"
    )
    module = Mine()
    assert not find_targets(module)[0].normalises_queries
    module.norm = nn.LayerNorm(2)
    assert find_targets(module)[0].normalises_queries


def test_cross_attention_of_gpt2_is_skipped() -> None:
    model = plain("gpt2", add_cross_attention=True)
    names = [target.name for target in find_targets(model)]
    assert names == ["transformer.h.0.attn", "transformer.h.1.attn"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": "inner.qkw"}, "must name attributes of Mine, got 'inner.qkw'"),
        ({"query_norm": "qnorm"}, "must name attributes of Mine, got 'qnorm'"),
        ({"unless": "is_cross"}, "must name attributes of Mine, got 'is_cross'"),
        ({"n_heads": 0}, "must count heads from 1, got 0"),
        ({"n_heads": "norm"}, "must count heads from 1, got None as 'norm'"),
        ({"output": "inner"}, "must name linear modules .*'inner', a ModuleDict"),
        ({"output": "heads"}, "must name linear modules .*'heads', a int"),
        ({"n_heads": 3}, "must fit 3 query heads and 3 key heads, .*'inner.qkv': 12"),
        ({"n_kv_heads": 1}, "must fit 2 query heads and 1 key heads"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, layouts: dict[str, Layout]
) -> None:
    layouts["Mine"] = Layout(**{**vars(FUSED), **changes})
    with pytest.raises(ValueError, match=rf"^layout of a {message}"):
        find_targets(nn.ModuleDict({"a": Mine()}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "kv", "value": "kv"}, "a module each for key and value, got 'kv'"),
        ({"key": "k"}, "both key and value, .*key='k' and value=None"),
        ({"key": "k", "value": "v", "interleaved": True}, "interleaved .*key='k'"),
        ({"n_kv_heads": 2, "interleaved": True}, "interleaved .*n_kv_heads=2"),
    ],
)
def test_an_inconsistent_layout_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^layout .*{message}"):
        Layout(query="q", output="o", n_heads=4, **options)


def test_a_parametrized_weight_is_refused(layouts: dict[str, Layout]) -> None:
    module = Mine()
    nn.utils.parametrizations.weight_norm(module.inner["qkv"])
    with pytest.raises(ValueError, match=r"whose weight is a parameter, got 'inner\.qkv'"):
        find_targets(module)


def test_a_model_without_attention_is_refused_with_its_classes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    message = re.escape("got ['Linear', 'ReLU', 'Sequential']; describe another with LAYOUTS[")
    with pytest.raises(ValueError, match=rf"^model must have attention of a known .*{message}"):
        find_targets(model)


# --- weights of two owners -----------------------------------------------------------------------


def by_parameter(model: GPT) -> None:
    model.blocks[2].attn.c_attn.weight = model.blocks[0].attn.c_attn.weight


def by_memory(model: GPT) -> None:
    model.blocks[2].attn.c_attn.weight.data = model.blocks[0].attn.c_attn.weight.data


def by_module(model: GPT) -> None:
    model.blocks[2].attn.c_proj = model.blocks[0].attn.c_proj


@pytest.mark.parametrize("share", [by_parameter, by_memory, by_module])
def test_layers_that_share_a_weight_are_refused(share: Callable[[GPT], None]) -> None:
    """In place an operation would edit both, in an overlay only one of them."""
    model = tiny_gpt(n_layers=3)
    share(model)
    message = r"^targets must have weights of their own, got blocks\.\d\.attn, whose \(\d+, 32\)"
    with pytest.raises(ValueError, match=message):
        find_targets(model)
    assert [target.layer for target in find_targets(model, 1)] == [1]


def test_a_target_cannot_be_listed_twice() -> None:
    targets = find_targets(FOUR)
    with pytest.raises(ValueError, match=r"got blocks.1.attn, whose \(24, 8\)"):
        Targets(FOUR, [targets[1], targets[1]])
