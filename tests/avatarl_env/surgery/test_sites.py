"""Tests of avatarl_env/surgery/sites.py; what is refused is in test_theater.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from avatarl_env.surgery import SurgicalTheater
from avatarl_env.surgery.sites import choose
from tests.avatarl_env.surgery.edits import small


def tied() -> nn.Sequential:
    """Two layers with one weight; the first layer comes a second time, deeper."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    return nn.Sequential(one, nn.Sequential(two, one))


def test_targets_come_once_each_in_the_order_given() -> None:
    model = small()
    choice = choose(model, ["1.weight", model[0], model[1].weight])
    assert choice.names == ["1.weight", "0.weight", "0.bias"]
    assert [id(p) for p in choice.parameters] == [
        id(p) for p in (model[1].weight, model[0].weight, model[0].bias)
    ]


def test_a_tied_target_has_its_first_name_and_all_its_sites() -> None:
    model = tied()
    for target in (model[1][0].weight, "1.0.weight", "1.1.weight"):
        choice = choose(model, [target])
        assert choice.names == ["0.weight"]
        assert [(site.module, site.name) for site in choice.sites] == [
            (model[0], "weight"),
            (model[1][0], "weight"),
        ]


def test_names_and_reach_are_those_of_torch() -> None:
    model = tied()
    choice = choose(model, [model])
    assert choice.names == [name for name, _ in model.named_parameters()]
    assert choice.reach > {*model.parameters(), *model.modules()}


def test_a_site_that_holds_its_target_is_left_alone() -> None:
    model = small()
    (site,) = choose(model, ["0.weight"]).sites
    before = dict(model[0]._parameters)
    assert site.holds()
    site.put_back()
    assert list(model[0]._parameters.items()) == list(before.items())


def test_a_site_gets_its_target_back_in_its_old_place() -> None:
    model = small()
    weight = model[0].weight
    (site,) = choose(model, [weight]).sites
    model[0].extra = nn.Parameter(weight.detach().clone())
    del model[0].weight
    model[0].weight = nn.Linear(1, 1)
    assert not site.holds()
    site.put_back()
    assert site.holds()
    assert list(model[0]._parameters) == ["weight", "bias", "extra"]
    assert model[0].weight is weight


def test_an_attribute_in_front_of_the_target_is_noticed_and_removed() -> None:
    model = small()
    (site,) = choose(model, ["0.bias"]).sites
    vars(model[0])["bias"] = None
    assert not site.holds()
    site.put_back()
    assert site.holds()
    assert model[0].bias is site.parameter


# --- modules that keep a second list of their parameters -----------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_compute_with_their_own_weights_again(kind: type[nn.RNNBase]) -> None:
    model = kind(4, 4)
    x = torch.linspace(-1, 1, 24).view(2, 3, 4)
    before = model(x)[0].detach()
    with SurgicalTheater(model, [model]):
        model.weight_ih_l0 = nn.Parameter(torch.zeros_like(model.weight_ih_l0))
        assert not torch.equal(model(x)[0], before)
        model.half()  # which makes the list anew
    assert torch.equal(model(x)[0], before)


def test_a_dictionary_of_parameters_knows_its_keys_again() -> None:
    model = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1)})
    before = dict(model.items())
    with SurgicalTheater(model, [model]):
        del model["a"]
        model.pop("c")
        model["added"] = torch.ones(1)
        assert list(model.keys()) == ["b", "added"]
    assert list(model.keys()) == list(model.state_dict()) == ["a", "b", "c", "added"]
    assert all(model[name] is p for name, p in before.items())


# --- models that cannot be operated on -----------------------------------------------------------


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 3))])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused(make: Any) -> None:
    inner = make(nn.Linear(3, 3))
    for model in (inner, nn.Sequential(inner)):
        with pytest.raises(TypeError, match=r"^model must be a plain nn.Module, got TorchScript"):
            SurgicalTheater(model, [model])


def test_a_model_sharded_by_fsdp_is_refused_also_while_it_is_gathered(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for _ in range(2):
            with pytest.raises(TypeError, match=r"^model must not be sharded, got FSDPSequential"):
                SurgicalTheater(model, [model])
            model.unshard()
    finally:
        destroy_process_group()


def test_second_lists_follow_what_the_body_replaced_for_good() -> None:
    """A Parameter that is no target stays as the body leaves it, in the second list too."""
    model = nn.LSTM(2, 2)
    with SurgicalTheater(model, [model.weight_ih_l0]):
        model.bias_hh_l0 = nn.Parameter(torch.ones(8))
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    named = nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)})
    with SurgicalTheater(named, ["a"]):
        del named["b"]
        del named["a"]
    assert [name for name, _ in named.items()] == ["a"]
