from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import long_texts
from tests.benchmarks.conftest import Run
from tests.training_runs import write_text


@pytest.mark.slow
def test_every_way_spends_its_compute_and_is_compared(tmp_path: Path, run: Run) -> None:
    words = ["--size", "tiny", "--updates", "3", "--compute", "120000", "--horizon", "8"]
    words += ["--texts", "2", "--rows", "2", "--round", "2", "--prompts", "8"]
    rows = run(long_texts, *words, "--corpus", str(write_text(tmp_path, 20_000)))["rows"]
    assert [*rows] == ["the beginning", "horizon 1", "horizon 8", "horizon 8, operated"]
    for name, row in rows.items():
        assert all(math.isfinite(row[key]) for key in (*long_texts.TERMS, "heldout_loss"))
        if name != "the beginning":
            # Whole rounds, and not one more would have fitted.
            assert 60_000 < row["update_tokens"] + row["surgeon_tokens"] < 130_000
            assert (row["surgeon_tokens"] > 0) == ("operated" in name)
    assert rows["horizon 8, operated"]["n_rounds"] > 0
