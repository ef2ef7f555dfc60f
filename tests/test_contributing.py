"""What docs/CONTRIBUTING.md registers from outside the package works in a run and its report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.grpo.estimators import ESTIMATORS
from agents.grpo.learner import GRPOConfig
from agents.report.sections import SECTIONS
from agents.surgeons.registry import SURGEONS
from agents.training.curriculum import PHASES
from agents.training.loop import train
from avatarl_env.scoring import TERMS
from avatarl_env.surgery import OPERATORS
from avatarl_env.text.corpus import CORPORA
from tests.training_runs import small_config

PAGE = Path(__file__).parents[1] / "docs" / "CONTRIBUTING.md"
TABLES: tuple[dict[str, Any], ...] = (OPERATORS, ESTIMATORS, SURGEONS, TERMS, CORPORA, PHASES)


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """Run the page's code; forget afterwards what it registered."""
    tables, sections = [dict(table) for table in TABLES], list(SECTIONS)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 9
    names: dict[str, Any] = {"__name__": __name__}
    try:
        for block in blocks:
            exec(block, names)
        yield names
    finally:
        for table, before in zip(TABLES, tables, strict=True):
            table.clear()
            table.update(before)
        SECTIONS[:] = sections


def test_one_of_each_kind_can_be_added_from_outside(page: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(
        "counting",
        tmp_path / "run",
        operator="value_gain",
        surgeon="timid",
        surgeon_options={"amount": 0.25},
        score={"repetition": 1.0},
        grpo=GRPOConfig(estimator="best_of_group", batch_size=4, group_size=4, warmup_updates=2),
    )
    run = train(config, quiet=True)
    assert run.summary["corpus"] == "counting"
    assert [phase["name"] for phase in run.summary["phases"]][-1] == "cooldown"
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    operations = [row for row in map(json.loads, lines) if row["kind"] == "operation"]
    assert operations
    for row in operations:
        assert row["surgeon/coefficients"] == [pytest.approx(0.25)]  # two steps of half of 0.25
        assert row["surgeon/return"] == pytest.approx(
            row["baseline/repetition"] - row["score/repetition"]
        )
    assert "1 run, measured." in (run.folder / "report.html").read_text(encoding="utf-8")
    assert page["config"].greeting == "good morning"
    assert page["config"].seed == 3
