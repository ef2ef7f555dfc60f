"""Tests of avatarl_env/surgery/parameters.py: targets and models that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from avatarl_env.surgery import OutputTemperature, SurgicalTheater, find_targets
from tests.avatarl_env.surgery.edits import small
from tests.fakes import tiny_gpt


@pytest.mark.parametrize("targets", [[], [nn.ReLU()], [nn.Module(), nn.Sequential()]])
def test_no_parameters_are_refused(targets: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^targets must hold at least one"):
        SurgicalTheater(small(), targets)


@pytest.mark.parametrize(
    ("name", "hint"), [("0.wieght", ", did you mean '0.weight'"), ("nothing like it", "")]
)
def test_unknown_names_are_refused_with_the_closest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"^targets must name .*'{name}'{hint}"):
        SurgicalTheater(small(), ["0.weight", name])


def test_buffers_and_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^targets must name .*'running_mean'"):
        SurgicalTheater(nn.BatchNorm1d(2), ["running_mean"])
    with pytest.raises(ValueError, match=r"^targets must belong to the model.*\(3, 3\)"):
        SurgicalTheater(small(), [small()[0]])


class Renamed(nn.Parameter):
    """A subclass of Parameter."""


@pytest.mark.parametrize(
    ("parameter", "description"),
    [
        (Renamed(torch.ones(2)), r"Renamed \(torch.strided, cpu"),
        (nn.Parameter(torch.eye(2).to_sparse()), r"Parameter \(torch.sparse_coo"),
        (nn.Parameter(torch.ones(2, device="meta")), r"Parameter \(torch.strided, meta"),
        (nn.UninitializedParameter(), "UninitializedParameter"),
        (torch.ones(3), "got Tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unusual_parameters_are_refused(parameter: Any, description: str) -> None:
    model = small()
    targets = [parameter]
    if isinstance(parameter, nn.Parameter):
        model.register_parameter("odd", parameter)
        targets.append("odd")
    for target in targets:
        with pytest.raises(TypeError, match=rf"^targets must be plain .*{description}"):
            SurgicalTheater(model, ["0.weight", target])
    with SurgicalTheater(model, ["0.weight"]):  # but may be there
        pass


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("where", ["blocks.1.attn.c_attn", "blocks.1.attn.c_proj", "lm_head"])
def test_weights_that_cannot_hold_a_gain_are_refused(where: str, dtype: torch.dtype) -> None:
    model = tiny_gpt()
    layer = model.get_submodule(where)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"^weights to operate on must be float32, .*{dtype}"):
        OutputTemperature(find_targets(model))
