"""Tests of benchmarks/measure.py."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys

import measure
import numpy as np
import pytest
import torch


class Clock:
    """A stopwatch that the timed functions turn on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_timings_are_of_the_calls_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds 9, 9 (warm-up), then 1, 2, 3, 4, 10: the quartiles are 2, 3 and 4."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    seconds = iter([9.0, 9.0, 3.0, 10.0, 1.0, 4.0, 2.0])

    def varying() -> None:
        clock.now += next(seconds)

    def constant() -> None:
        clock.now += 0.5

    functions = {"varying": varying, "constant": constant}
    timings = measure.interleaved(functions, repeats=5, warm_up=2)
    assert list(timings) == ["varying", "constant"]
    assert timings["varying"] == measure.Timing(3.0, 2.0, 4.0, 1.0, 10.0, 5)
    assert timings["constant"] == measure.Timing(0.5, 0.5, 0.5, 0.5, 0.5, 5)
    assert next(seconds, None) is None


def test_functions_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    measure.interleaved(functions, repeats=20, warm_up=0)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert set(rounds) == {"".join(order) for order in itertools.permutations("abc")}


def test_ceilings_count_bytes_and_operations_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes half a second: 2 x 4096 bytes, and 2 x 2 x 16^3 operations, a second."""
    timing = measure.Timing(0.5, 0.5, 0.5, 0.5, 0.5, 1)

    def half_a_second(functions: dict[str, object], **_: int) -> dict[str, measure.Timing]:
        for function in functions.values():
            function()
        return dict.fromkeys(functions, timing)

    monkeypatch.setattr(measure, "interleaved", half_a_second)
    assert measure.memcpy_bandwidth(4096) == 8192
    assert measure.gemm_rate(16) == 16384


def test_ceilings_of_this_machine_are_positive_and_draw_nothing() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert measure.memcpy_bandwidth(4096) > 0
    assert measure.gemm_rate(16) > 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_environment_is_json_and_names_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench.py", "--threads", "1"])
    found = measure.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "python benchmarks/bench.py --threads 1"
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu_count"] == os.cpu_count()
    assert found["device"] == "cpu"
    assert found["commit"]


def test_environment_outside_a_checkout_knows_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", os.devnull)
    assert measure.environment()["commit"] == "unknown"


def test_waiting_threads_sleep_by_default() -> None:
    assert "OMP_WAIT_POLICY" in os.environ
