"""Tests of avatarl_env/surgery/sites.py; what is refused is in test_theater.py."""

from __future__ import annotations

from torch import nn

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
    assert choice.reach == {*model.parameters(), *model.modules()}


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
