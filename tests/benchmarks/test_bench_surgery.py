from __future__ import annotations

import pytest

from benchmarks import bench_surgery
from benchmarks.measure import untrained_model
from tests.benchmarks.conftest import Run


@pytest.mark.slow
def test_it_checks_times_and_reports(run: Run) -> None:
    words = ["--sizes", "tiny", "--n", "1", "2", "--others", "2", "--rows", "2", "--prompts", "2"]
    result = run(bench_surgery, *words, "--repeats", "1")
    kinds = [(row["operator"], row["n"]) for row in result["operations"]]
    others = [(name, 2) for name in bench_surgery.OPERATORS[1:]]
    assert kinds == [("head_gain", 1), ("head_gain", 2), *others]
    for row in result["operations"]:
        assert row["overlay_over_plain"] > 0
        assert ("loop_over_overlay" in row) == (row["operator"] == "head_gain")
        assert row["n"] == 1 or row["largest_error_nats"] < 1e-3
    (environment,) = result["environments"]
    assert environment["vector_over_single"] > 0
    assert result["ceilings"]["gemm_flops_per_second"] > 0


def test_texts_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = untrained_model("tiny", 65, seed=0, context=96)
    bench = bench_surgery.Bench(model, "head_gain", 4)
    assert bench.check()["same_rows"] > 0.9
    apart = bench.loop()
    monkeypatch.setattr(bench, "loop", lambda: apart[::-1])
    with pytest.raises(AssertionError, match=r"^overlay and loop"):
        bench.check()
