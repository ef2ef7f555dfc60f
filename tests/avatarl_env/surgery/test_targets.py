"""Tests of avatarl_env/surgery/targets.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from avatarl_env.surgery import AttentionTarget, find_targets
from tests.fakes import tiny_gpt


def test_layers_are_found_from_first_to_last() -> None:
    model = tiny_gpt(n_layers=3)
    targets = find_targets(model)
    assert [target.name for target in targets] == [f"blocks.{i}.attn" for i in range(3)]
    assert [target.layer for target in targets] == [0, 1, 2]
    for target, block in zip(targets, model.blocks, strict=True):
        assert target.query is block.attn.c_attn
        assert target.output is block.attn.c_proj
        assert (target.n_heads, target.head_dim, target.query_rows) == (4, 8, 32)


def test_names_are_paths_inside_the_searched_model() -> None:
    model = tiny_gpt(n_layers=1)
    (target,) = find_targets(nn.ModuleDict({"policy": model}))
    assert target.name == "policy.blocks.0.attn"
    (same,) = find_targets(model.blocks[0].attn)
    assert same.query is target.query


def test_parameters_are_what_an_operation_may_edit() -> None:
    model = tiny_gpt(n_layers=1)
    (target,) = find_targets(model)
    attention = model.blocks[0].attn
    found = list(target.parameters())
    assert [id(p) for p in found] == [id(attention.c_attn.weight), id(attention.c_proj.weight)]
    biased = replace(target, query=nn.Linear(32, 96))
    found = list(biased.parameters())
    assert [tuple(p.shape) for p in found] == [(96, 32), (96,), (32, 32)]
    assert all(type(p) is nn.Parameter for p in found)


def test_finding_touches_nothing() -> None:
    model = tiny_gpt()
    versions = [p._version for p in model.parameters()]
    find_targets(model)
    assert [p._version for p in model.parameters()] == versions


def test_queries_are_the_first_channels_head_by_head() -> None:
    """Two heads of two channels in a fused projection: channels 0 to 3 of 12."""
    target = AttentionTarget("a", 0, 2, 2, nn.Linear(4, 12), nn.Linear(4, 4))
    projected = torch.arange(24).view(2, 1, 12)
    assert target.queries(projected).tolist() == [[[[0, 1], [2, 3]]], [[[12, 13], [14, 15]]]]
    plain = AttentionTarget("a", 0, 2, 2, nn.Linear(4, 4), nn.Linear(4, 4))
    assert plain.queries(torch.arange(4)).tolist() == [[0, 1], [2, 3]]


def test_output_by_head_is_a_view_of_the_columns_that_read_the_head() -> None:
    target = AttentionTarget("a", 0, 2, 2, nn.Linear(4, 12), nn.Linear(4, 3))
    by_head = target.output_by_head()
    weight = target.output.weight
    assert by_head.shape == (3, 2, 2)
    assert torch.equal(by_head[:, 1], weight[:, 2:])
    assert by_head.data_ptr() == weight.data_ptr()


def test_output_by_head_copes_with_a_transposed_weight() -> None:
    target = AttentionTarget("a", 0, 2, 2, nn.Linear(4, 12), nn.Linear(4, 3))
    target.output.weight.data = torch.arange(12.0).view(4, 3).T
    assert target.output_by_head()[:, 1].tolist() == [[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]]


def test_model_without_attention_is_refused_by_what_it_has() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    message = re.escape(
        "model must have attention layers of a known kind, got ['Linear', 'ReLU', 'Sequential']"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        find_targets(model)
