"""Every Python block of the README runs as it stands (trainings shortened)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avatarl_env.surgery import OPERATORS

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {n}" for n in range(len(BLOCKS))])
def test_a_block_of_the_readme_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = dict(OPERATORS)
    try:
        exec(compile(block.replace("=640", "=32"), str(README), "exec"), {})
        if "value_gain" in OPERATORS:
            assert_it_operates()
    finally:
        OPERATORS.clear()
        OPERATORS.update(known)


def assert_it_operates() -> None:
    """Check that the README's own operator does something, and nothing at zero."""
    import gymnasium

    env = gymnasium.make("avatarl_env:AttentionSurgery-v0", operator="value_gain", n_prompts=2)
    env.reset(seed=0)
    for action, moved in ((0.0, False), (1.0, True)):
        _, reward, *_ = env.step([action] * 3)
        assert bool(reward) is moved


def test_the_readme_has_its_examples_and_its_picture() -> None:
    assert len(BLOCKS) == 6
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(encoding="utf-8"))
    assert pictures
    assert all((README.parent / picture).is_file() for picture in pictures)
