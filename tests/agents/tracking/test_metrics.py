"""Tests of docs/metrics.md: it has every number that a run writes, and no other."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agents.grpo.config import GRPOConfig
from agents.surgeons.registry import SURGEONS, make_surgeon
from agents.tracking.schema import AXES, numbers
from agents.tracking.writer import Clock
from agents.training.loop import RunSummary, train
from tests.agents.surgeons.test_contract import options_of
from tests.training_runs import small_config, small_env

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
CLOCK = {field.name for field in dataclasses.fields(Clock)} - {"phase"}
WITH_OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"clip_range_vf": 0.2},
    "recurrent_ppo": {"clip_range_vf": 0.2},
}
"""Options without which a metric of the table is not written."""


class Metric(NamedTuple):
    """A row of the table, for one of its names."""

    name: str
    kind: str
    surgeons: list[str]
    unit: str
    meaning: str


def table() -> list[Metric]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    found = []
    for line in lines:
        names, rows, unit, meaning = (cell.strip() for cell in line.strip("|").split(" | "))
        kind, _, surgeons = rows.partition(" (")
        known = surgeons.rstrip(")").split(", ") if surgeons else []
        for name in re.findall("`(.+?)`", names):
            found.append(Metric(name, kind, known, unit, meaning))
    return found


METRICS = table()


def of_kind(kind: str, surgeon: str) -> set[str]:
    """Return the names of a kind of row in a run with this surgeon."""
    return {m.name for m in METRICS if m.kind == kind and (not m.surgeons or surgeon in m.surgeons)}


@pytest.fixture(scope="module")
def rows(
    whole: RunSummary, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Return the rows of two runs: one commits, in the other the operated model samples."""
    config = small_config(text, tmp_path_factory.mktemp("operated") / "run", surgeon="random")
    recipe = GRPOConfig(estimator="grpo", batch_size=4, group_size=4, horizon=4)
    plan = dataclasses.replace(config.curriculum, commit="rollout", surgery_rounds=0)
    operated = train(dataclasses.replace(config, grpo=recipe, curriculum=plan), quiet=True)
    files = [run.folder / "metrics.jsonl" for run in (whole, operated)]
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", AXES)
def test_runs_write_the_numbers_of_the_table_and_no_others(
    rows: list[dict[str, Any]], kind: str
) -> None:
    found = [dict(numbers(row)) for row in rows if row["kind"] == kind]
    assert found
    assert set().union(*found) == of_kind(kind, "sac") | of_kind("all", "sac")


@pytest.mark.parametrize("name", sorted(set(SURGEONS) - {"replay"}))
def test_a_surgeon_writes_the_numbers_of_the_table(name: str) -> None:
    options = {**options_of(name), **WITH_OPTIONS.get(name, {})}
    surgeon = make_surgeon(name, small_env(n_rows=4), 0, options)
    surgeon.operate(2)
    assert set(surgeon.stats()) == of_kind("surgeon", name)


def test_the_table_is_complete_in_itself() -> None:
    assert of_kind("all", "sac") == CLOCK
    assert {metric.kind for metric in METRICS} == {*AXES, "all"} - {"sample"}
    assert {name for metric in METRICS for name in metric.surgeons} <= set(SURGEONS)
    assert all(metric.unit and metric.meaning for metric in METRICS)
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
