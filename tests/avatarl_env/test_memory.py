"""Tests of avatarl_env/memory.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from avatarl_env.memory import GIB, _control_groups, check_memory, memory_limit


def test_the_limit_is_at_most_the_memory_of_the_machine() -> None:
    assert 2**26 < memory_limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_of_the_process_counts() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 28,) * 2);"
        "from avatarl_env.memory import memory_limit; print(memory_limit())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) == 3 << 28


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "root"
    for place, name, content in (
        ("user/job", "memory.max", "max\n"),
        ("user", "memory.max", "1000\n"),
        ("memory/box", "memory.limit_in_bytes", "2000\n"),
        ("cpu/box", "memory.limit_in_bytes", "1\n"),
    ):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / name).write_text(content, encoding="ascii")
    own.write_text("0::/user/job\n4:memory:/box\n5:cpu:/box\nnonsense\n", encoding="ascii")
    found = _control_groups(own, root)
    assert [limit for limit in found if limit is not None] == [1000, 2000]
    assert _control_groups(tmp_path / "nothing", root) == []


@pytest.mark.parametrize("needed", [3 * GIB, 10**30, 10**3000])
def test_a_need_beyond_the_limit_is_refused_with_both_numbers(needed: int) -> None:
    check_memory("lm", 2 * GIB, 2 * GIB)
    with pytest.raises(ValueError, match=r"^lm must fit the memory, 2\.0 GiB, got a need of at "):
        check_memory("lm", needed, 2 * GIB)
