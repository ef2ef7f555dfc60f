from __future__ import annotations

import argparse

import pytest

from benchmarks import bench_grpo
from tests.benchmarks.conftest import Run

OPTIONS = argparse.Namespace(
    sizes=["tiny"], tokens=[128], optimizer="muon", precision="float32", device="cpu"
)


def test_useful_work_by_hand() -> None:
    learner = bench_grpo.make_learner("tiny", "sampled K = 16", OPTIONS)
    n_parameters = sum(p.numel() for p in learner.model.parameters())
    # Two a parameter and 4 L C for each of 16 positions attended to; thrice; 4 windows of 32.
    assert bench_grpo.useful_flops(learner) == 3 * (2 * n_parameters + 4 * 16 * 16) * 128
    assert learner.tokens_per_update == 128


@pytest.mark.slow
def test_every_kind_is_compared_with_the_control(run: Run) -> None:
    words = ["--sizes", "tiny", "--tokens", "128", "--repeats", "2", "--kinds", "all actions"]
    kinds = run(bench_grpo, *words)["results"]["tiny"]["kinds"]
    assert kinds.keys() == {"ce", "all actions"}
    assert kinds["ce"]["over_control"] == kinds["ce"]["memory_over_control"] == 1
    for row in kinds.values():
        assert row["peak_bytes"] > 0
        assert 0 < row["share_of_gemm_rate"] < 1
        assert row["tokens_per_second"] == pytest.approx(128 / row["median"])
