from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from avatarl_env.surgery import SurgicalTheater
from benchmarks import bench_theater
from tests.benchmarks.conftest import Run


def test_it_checks_times_and_reports(run: Run) -> None:
    """One layer of width 16 with (48, 16) and (16, 16) projections: 1024 floats saved."""
    result = run(bench_theater, "--quick")
    row = result["sizes"]["tiny"]
    assert row["saved_bytes"] == 1024 * 4
    assert row["model_bytes"] == 4 * row["n_parameters"] > row["saved_bytes"]
    ways = ["copies", "theater", "new theater", "deepcopy", "state dict"]
    assert list(row["seconds"]) == list(row["over_copies"]) == ways
    assert row["over_copies"]["copies"] == 1.0
    assert all(value > 0 for value in result["ceilings"].values())


class Forgetful(SurgicalTheater):
    """Does not restore edited weights."""

    def __exit__(self, *exc: Any) -> None:
        if self.is_open:
            self.commit()
        super().__exit__(*exc)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Forgetful, 0.0, "all weights must be restored, got others"),
        (SurgicalTheater, torch.inf, "all 1 targets must change in the theater, got 0"),
    ],
)
def test_a_theater_that_breaks_its_contract_is_not_timed(
    kind: type[SurgicalTheater], value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(3, 1)
    assert bench_theater.check(model, [model.weight]) == 12
    monkeypatch.setattr(bench_theater, "SurgicalTheater", kind)
    nn.init.constant_(model.weight, value)
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        bench_theater.check(model, [model.weight])
