"""Tests of avatarl_env/__init__.py: registration, lazy names, and what an import must not do."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import avatarl_env
from tests.patients import SIZES, store_tiny_patient

PACKAGE = Path(avatarl_env.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_tiny_patient(tmp_path_factory.mktemp("model"))


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


def test_spec_promises_determinism_and_no_time_limit() -> None:
    spec = gymnasium.spec("AttentionSurgery-v0")
    assert spec.entry_point == "avatarl_env.env:AttentionSurgeryEnv"
    assert spec.vector_entry_point == "avatarl_env.vector_env:AttentionSurgeryVectorEnv"
    assert spec.max_episode_steps is None
    assert spec.nondeterministic is False
    assert spec.kwargs == {}


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("head_gain", {"tied": False, "scale": 0.5}),
        ("spectral_bands", {"projections": ["query", "value"], "n_bands": 2}),
        ("low_rank_seed", {"n_directions": 3, "rank": 2, "seed": 5}),
        ("layer_truncation", {"tied": True}),
        ("seed_rank_one", {"projections": ["key"]}),
        ("output_temperature", {"final_norm": "norm"}),
    ],
)
def test_spec_survives_json(operator: str, options: dict[str, object], folder: str) -> None:
    keywords = {
        **SIZES,
        "lm": folder,
        "operator": operator,
        "operator_options": options,
        "layers": [-1, "blocks.0.*"],
        "score": {"kl_ref": 1.0, "distinct": 0.1},
        "injury": 0.5,
        "dtype": "float32",
    }
    env = gymnasium.make("AttentionSurgery-v0", render_mode="ansi", **keywords)
    assert env.spec is not None
    restored = EnvSpec.from_json(env.spec.to_json())
    assert restored == env.spec
    again = gymnasium.make(restored)
    assert again.unwrapped.render_mode == "ansi"
    observation, info = env.reset(seed=3)
    other_observation, other_info = again.reset(seed=3)
    assert observation.tolist() == other_observation.tolist()
    assert info["score_terms"] == other_info["score_terms"]
    assert env.action_space == again.action_space
    action = np.linspace(-0.3, 0.2, *env.action_space.shape, dtype=np.float32)
    assert env.step(action)[1] == again.step(action)[1] != 0


# --- names ---------------------------------------------------------------------------------------


def test_public_names_are_the_objects_of_their_home() -> None:
    for name, home in avatarl_env._HOMES.items():
        assert getattr(avatarl_env, name) is getattr(importlib.import_module(home), name)
    assert {*avatarl_env._HOMES, "ENV_ID"} == set(avatarl_env.__all__)
    assert dir(avatarl_env) == sorted(avatarl_env.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'avatarl_env' has no attribute 'Surgeon'"):
        _ = avatarl_env.Surgeon
    assert not hasattr(avatarl_env, "__path_to_nowhere__")


# --- what an import must not do ------------------------------------------------------------------


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


def test_an_operation_loads_and_draws_nothing_it_does_not_need(folder: str, tmp_path: Path) -> None:
    """In a fresh process, in which some other package called agents comes first."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("raise ImportError('the wrong agents')")
    program = f"""
import importlib.util, random, sys
import gymnasium, numpy, torch

def states():
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist()

assert importlib.util.find_spec("agents").origin.startswith({str(tmp_path)!r})
before = states()
env = gymnasium.make("avatarl_env:AttentionSurgery-v0", lm={folder!r}, **{SIZES})
observation, _ = env.reset(seed=0)
*_, info = env.step(env.action_space.high)
assert states() == before
from avatarl_env import *
assert type(env.unwrapped) is AttentionSurgeryEnv
heavy = {{"transformers", "stable_baselines3", "wandb", "plotly", "scipy", "requests", "agents"}}
heavy.add("matplotlib")
print(len(observation), len(info["score_terms"]), sorted(heavy & set(sys.modules)))
"""
    assert run_python(program, path=(tmp_path,)) == "36 6 []"
