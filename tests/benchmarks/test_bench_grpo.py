from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_grpo

OPTIONS = argparse.Namespace(
    sizes=["tiny"], tokens=[128], optimizer="muon", precision="float32", device="cpu"
)


def test_useful_work_by_hand() -> None:
    learner = bench_grpo.make_learner("tiny", "sampled K = 16", OPTIONS)
    n_parameters = sum(p.numel() for p in learner.model.parameters())
    # Two a parameter and 4 L C for each of 16 positions attended to; thrice; 4 windows of 32.
    assert bench_grpo.useful_flops(learner) == 3 * (2 * n_parameters + 4 * 16 * 16) * 128
    assert learner.tokens_per_update == 128


def test_every_kind_is_measured_and_compared_with_the_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--sizes", "tiny", "--tokens", "128", "--repeats", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_grpo.py", *arguments])
    monkeypatch.setattr(bench_grpo, "KINDS", dict([*bench_grpo.KINDS.items()][:2]))
    bench_grpo.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    kinds = result["results"]["tiny"]["kinds"]
    assert kinds.keys() == bench_grpo.KINDS.keys()
    assert kinds["ce"]["over_control"] == kinds["ce"]["memory_over_control"] == 1
    for row in kinds.values():
        assert row["peak_bytes"] > 0
        assert 0 < row["share_of_gemm_rate"] < 1
        assert row["tokens_per_second"] == pytest.approx(128 / row["median"])


def test_the_peak_is_this_processs_own_and_not_its_parents() -> None:
    parents = np.ones(50_000_000)  # 400 MB, then gone
    assert bench_grpo.resident("VmHWM") > parents.nbytes
    del parents
    script = (
        "import sys; sys.path[:0] = ['benchmarks', '.']; import numpy as np, bench_grpo as b;"
        "before = b.resident('VmHWM'); more = np.ones(25_000_000);"
        "print(b.resident('VmHWM') - before)"
    )
    root = Path(bench_grpo.__file__).parents[1]
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True
    )
    assert 180e6 < int(made.stdout) < 300e6
    with pytest.raises(ValueError, match="got 'VmNone'"):
        bench_grpo.resident("VmNone")


def test_sizes_and_tokens_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_grpo.py", "--sizes", "tiny"])
    with pytest.raises(SystemExit):
        bench_grpo.main()
    assert "tokens must be one for each of 1 sizes" in capsys.readouterr().err
