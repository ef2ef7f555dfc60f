from __future__ import annotations

from benchmarks import bench_step
from tests.benchmarks.conftest import Run


def test_it_measures_and_reports(run: Run) -> None:
    result = run(bench_step, "--size", "tiny", "--rows", "2", "--prompts", "2", "--steps", "2")
    assert len(result["step_seconds"]) == 2
    assert 0 < result["share_outside_model"] < 1
    for step, outside in zip(result["step_seconds"], result["outside_model_seconds"], strict=True):
        assert 0 < outside < step
    names = [row["function"] for row in result["profile"]]
    assert not any("generation.py" in name for name in names)  # the model is not profiled
