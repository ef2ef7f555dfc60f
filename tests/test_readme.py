"""Every Python block of the README runs as it stands (trainings shortened)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avatarl_env.scoring import TERMS
from avatarl_env.surgery import OPERATORS

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {n}" for n in range(len(BLOCKS))])
def test_a_block_of_the_readme_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    operators, terms = dict(OPERATORS), dict(TERMS)
    short = block.replace("=640", "=32").replace("range(3)", "range(1)")
    try:
        exec(compile(short, str(README), "exec"), {})
        if "value_gain" in OPERATORS:
            assert_it_operates()
        if "variety" in TERMS:
            assert_it_scores()
    finally:
        for registry, known in ((OPERATORS, operators), (TERMS, terms)):
            registry.clear()
            registry.update(known)  # type: ignore[arg-type]


def assert_it_operates() -> None:
    """Check that the README's own operator does something, and nothing at zero."""
    import gymnasium

    env = gymnasium.make("avatarl_env:AttentionSurgery-v0", operator="value_gain", n_prompts=2)
    env.reset(seed=0)
    for action, moved in ((0.0, False), (1.0, True)):
        _, reward, *_ = env.step([action] * 3)
        assert bool(reward) is moved


def assert_it_scores() -> None:
    """Check that the README's own score is part of what an operation is paid."""
    import gymnasium

    score = {"kl_ref": 1.0, "variety": 0.1}
    env = gymnasium.make("avatarl_env:AttentionSurgery-v0", score=score, n_prompts=2, n_new=8)
    _, info = env.reset(seed=0)
    terms = info["score_terms"]
    assert 0 < terms["variety"] <= 1
    assert info["score"] == pytest.approx(terms["kl_ref"] + 0.1 * terms["variety"], abs=1e-9)


def test_the_readme_has_its_examples_and_its_picture() -> None:
    assert len(BLOCKS) == 8
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(encoding="utf-8"))
    assert pictures
    assert all((README.parent / picture).is_file() for picture in pictures)
