"""Tests of benchmarks/bench_surgery.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from avatarl_env.lm.gpt import GPT
from benchmarks import bench_surgery


def test_it_checks_times_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "result.json"
    sizes = ["--sizes", "tiny", "--n", "1", "32", "--rows", "2", "--prompts", "2"]
    arguments = [*sizes, "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_surgery.py", *arguments])
    bench_surgery.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    kinds = [(row["operator"], row["n"]) for row in result["operations"]]
    others = ["spectral_bands", "low_rank_seed", "output_temperature"]
    assert kinds == [("head_gain", 1), ("head_gain", 32), *((name, 32) for name in others)]
    for row in result["operations"]:
        assert row["overlay_over_plain"] > 0
        assert ("loop_over_overlay" in row) == (row["operator"] == "head_gain")
        assert row["n"] == 1 or row["largest_error_nats"] < 1e-3
    (environment,) = result["environments"]
    assert (environment["n_rows"], environment["n_prompts"]) == (2, 2)
    assert environment["vector_over_single"] > 0
    assert result["ceilings"]["gemm_flops_per_second"] > 0


def test_texts_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(bench_surgery.SIZES["tiny"])
    bench = bench_surgery.Bench(model, "head_gain", 4)
    assert bench.check()["same_rows"] > 0.9
    apart = bench.loop()
    monkeypatch.setattr(bench, "loop", lambda: apart[::-1])
    with pytest.raises(AssertionError, match=r"^overlay and loop"):
        bench.check()
