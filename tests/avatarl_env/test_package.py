"""Tests of avatarl_env/__init__.py: registration, lazy names, cheap imports."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

import avatarl_env
from tests.patients import SIZES

PACKAGE = Path(avatarl_env.__file__).parent


def run_python(program: str, path: tuple[Path, ...] = ()) -> str:
    """Run a program in a fresh interpreter in which every warning is an error."""
    folders = os.pathsep.join(map(str, [*path, PACKAGE.parent]))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        cwd=path[0] if path else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- registration --------------------------------------------------------------------------------


def test_importing_registers_the_environment_once() -> None:
    spec = gymnasium.registry["AttentionSurgery-v0"]
    importlib.reload(avatarl_env)  # registering again would warn
    assert gymnasium.registry["AttentionSurgery-v0"] is spec
    assert avatarl_env.ENV_ID == "AttentionSurgery-v0"
    assert (spec.max_episode_steps, spec.nondeterministic, spec.kwargs) == (None, False, {})


# --- names ---------------------------------------------------------------------------------------


def test_public_names_are_the_objects_of_their_home() -> None:
    for name in avatarl_env.__all__:
        assert getattr(avatarl_env, name) is not None
    assert dir(avatarl_env) == sorted(avatarl_env.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'avatarl_env' has no attribute 'Surgeon'"):
        _ = avatarl_env.Surgeon
    assert not hasattr(avatarl_env, "__path_to_nowhere__")


# --- imports -------------------------------------------------------------------------------------


def test_no_module_of_the_package_imports_agents() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert all(name.split(".")[0] != "agents" for name in names), path


def test_import_alone_loads_nothing_heavy() -> None:
    program = """
import sys, avatarl_env
heavy = {"torch", "transformers", "stable_baselines3", "wandb", "plotly", "scipy", "requests"}
heavy.add("matplotlib")
print(sorted(heavy & set(sys.modules)))
"""
    assert run_python(program) == "[]"


@pytest.mark.slow
def test_an_operation_imports_nothing_it_does_not_need(folder: str, tmp_path: Path) -> None:
    """In a fresh process, in which some other package called agents comes first."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("raise ImportError('the wrong agents')")
    program = f"""
import importlib.util, sys
import gymnasium

assert importlib.util.find_spec("agents").origin.startswith({str(tmp_path)!r})
env = gymnasium.make("avatarl_env:AttentionSurgery-v0", lm={folder!r}, **{SIZES})
observation, _ = env.reset(seed=0)
*_, info = env.step(env.action_space.high)
from avatarl_env import *
assert type(env.unwrapped) is AttentionSurgeryEnv
heavy = {{"transformers", "stable_baselines3", "wandb", "plotly", "scipy", "requests", "agents"}}
heavy.add("matplotlib")
print(len(observation), len(info["score_terms"]), sorted(heavy & set(sys.modules)))
"""
    assert run_python(program, path=(tmp_path,)) == "36 6 []"
