from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.grpo.config import GRPOConfig
from agents.surgeons.registry import SURGEONS, make_surgeon
from agents.surgeons.sb3 import ALGORITHMS
from agents.tracking.schema import AXES, CLOCK, METRICS, markdown_table, numbers
from agents.tracking.writer import Clock
from agents.training.loop import train
from avatarl_env.scoring import TERMS
from tests.training_runs import QUICK_SAC, small_config, small_env, write_text

README = Path(__file__).parents[3] / "README.md"
CLOCK_NUMBERS = {field.name for field in dataclasses.fields(Clock)} - {"phase"}
WITH_OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"clip_range_vf": 0.2},
    "recurrent_ppo": {"clip_range_vf": 0.2},
}
"""Options that bring a metric which there is not without."""


def of_kind(kind: str, surgeon: str) -> set[str]:
    """Return the names that the table has for a kind of row in a run with this surgeon."""
    return {
        name
        for metric in METRICS
        for name in metric.names
        if metric.kind == kind and (not metric.surgeons or surgeon in metric.surgeons)
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the rows of two whole runs, with everything on: one commits, one writes operated."""
    folder = tmp_path_factory.mktemp("run")
    sac = ALGORITHMS["sac"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALGORITHMS, "sac", sac._replace(options={**sac.options, **QUICK_SAC}))
        patch.setattr("agents.training.build.N_OPERATIONS", 2)
        patch.setattr("agents.evaluation.surgeon_effect.N_PROMPTS", 8)
        text = write_text(folder)
        commits = train(small_config(text, folder / "commits"), quiet=True)
        recipe = GRPOConfig(estimator="grpo", batch_size=4, group_size=4, horizon=4)
        plan = replace(small_config(text).curriculum, commit="rollout")
        patch.setattr("agents.training.build.N_OPERATIONS", 8)  # among so many one helps
        operated = small_config(text, folder / "operated", grpo=recipe, curriculum=plan)
        runs = [commits, train(operated, quiet=True)]
    return [
        json.loads(line)
        for run in runs
        for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("kind", AXES)
def test_a_run_writes_the_numbers_of_the_table_and_no_others(
    rows: list[dict[str, Any]], kind: str
) -> None:
    mine = [dict(numbers(row)) for row in rows if row["kind"] == kind]
    assert mine
    assert set().union(*mine) == of_kind(kind, "sac") | CLOCK_NUMBERS


def test_the_clock_is_in_the_table() -> None:
    assert of_kind(CLOCK, "sac") == CLOCK_NUMBERS


@pytest.mark.parametrize("name", sorted(set(SURGEONS) - {"replay"}))
@pytest.mark.usefixtures("quick_surgeons", "immortal")
def test_a_surgeon_says_of_its_learning_what_the_table_says(name: str) -> None:
    env = small_env(n_rows=4)
    surgeon = make_surgeon(name, env, 0, WITH_OPTIONS.get(name))
    surgeon.operate(2)
    assert set(surgeon.stats()) == of_kind("surgeon", name)


def test_the_surgeons_of_the_table_are_surgeons() -> None:
    assert {name for metric in METRICS for name in metric.surgeons} <= set(SURGEONS)


def test_every_term_of_the_score_is_in_the_table() -> None:
    names = {f"{of}/{term}" for of in ("score", "baseline") for term in TERMS}
    assert names <= of_kind("operation", "sac")


def test_no_name_has_two_meanings() -> None:
    names = [name for metric in METRICS for name in metric.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.names[0])
def test_every_metric_has_a_kind_a_unit_and_a_formula(metric: Any) -> None:
    assert metric.kind in {*AXES, CLOCK}
    assert metric.unit
    assert metric.formula
    assert "|" not in metric.unit + metric.formula  # would end a cell of the table


def test_the_table_of_the_readme_is_this_one() -> None:
    assert f"\n{markdown_table()}\n" in README.read_text(encoding="utf-8")


def test_a_row_of_the_table_gives_its_names_in_short() -> None:
    table = markdown_table().splitlines()
    assert table[0] == "| metric | rows | unit | formula |"
    assert len(table) == 2 + len(METRICS)
    row = next(line for line in table if "kl_ref_gain/mean" in line)
    assert row.startswith(
        "| `commit/kl_ref_gain/mean`, `low`, `high`, `lower_bound` | commit | nats/char | "
    )
    assert "| `surgeon/generations` | surgeon (cma_es, es) | generations | " in table[-1]


def test_the_numbers_of_a_row_are_flat_and_finite() -> None:
    row = {
        "kind": "commit",
        "update": 7,
        "commit/kept": True,
        "commit/gain": {"mean": 0.5, "low": None, "by": {"n": 3}},
        "commit/coefficients": [0.5],
    }
    assert dict(numbers(row)) == {
        "update": 7,
        "commit/kept": True,
        "commit/gain/mean": 0.5,
        "commit/gain/by/n": 3,
    }
