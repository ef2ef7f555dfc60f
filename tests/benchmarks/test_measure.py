"""Tests of benchmarks/measure.py."""

from __future__ import annotations

import itertools
import json
import os
import time

import measure
import pytest
import torch


def test_timings_are_of_the_calls_after_the_warm_up() -> None:
    seconds = iter([0.3, 0.02, 0.04, 0.06])
    timings = measure.interleaved(
        {"sleep": lambda: time.sleep(next(seconds)), "none": lambda: None}, repeats=3, warm_up=1
    )
    sleep, none = timings["sleep"], timings["none"]
    assert next(seconds, None) is None
    assert (sleep.n, none.n) == (3, 3)
    assert 0.02 <= sleep.fastest <= sleep.low <= sleep.median <= sleep.high <= sleep.slowest
    assert sleep.median >= 0.04 > none.median


def test_functions_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    measure.interleaved(functions, repeats=20, warm_up=0)
    rounds = {"".join(calls[i : i + 3]) for i in range(0, 60, 3)}
    assert rounds == {"".join(order) for order in itertools.permutations("abc")}


def test_the_environment_is_json_and_names_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/bench.py", "--threads", "1"])
    found = measure.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "python benchmarks/bench.py --threads 1"
    assert found["torch"] == torch.__version__
    assert found["cpu_count"] == os.cpu_count()
    assert found["commit"] != "unknown"
    monkeypatch.setenv("GIT_DIR", os.devnull)
    assert measure.environment()["commit"] == "unknown"
