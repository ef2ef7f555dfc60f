"""Nothing of ours draws from Python's, numpy's or torch's global generators, or seeds them.

Add a row to `CONSUMERS` for whatever else draws random numbers.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import stable_baselines3  # noqa: F401 - its own import draws from Python's generator
import torch

import avatarl_env  # noqa: F401 - registers the environments
from agents.evaluation.language_model import evaluate_text
from agents.evaluation.surgeon_effect import measure_effect
from agents.surgeons.registry import SURGEONS, make_surgeon, save_surgeon
from agents.training.loop import train
from avatarl_env.lm.export import export_model
from avatarl_env.lm.generation import generate
from avatarl_env.lm.storage import load_model
from avatarl_env.surgery import OPERATORS
from tests.agents.surgeons.test_contract import options_of
from tests.patients import global_random_states, store_tiny_patient, tiny_env, tiny_patient
from tests.training_runs import (
    CE,
    ScriptedSurgeon,
    fresh_model,
    make_learner,
    small_config,
    small_env,
    small_eval_env,
    write_text,
)

TOKENS = np.random.default_rng(0).integers(0, 16, 300)


def single_env(folder: Path, operator: str = "head_gain") -> None:
    env = tiny_env(operator=operator, render_mode="rgb_array")
    env.reset(seed=0)
    env.step(np.full(env.action_space.shape or (), 0.1, np.float32))
    env.render()
    env.reset()


def made_env(folder: Path, *, many: bool) -> None:
    options = {"lm": store_tiny_patient(folder / "model"), "n_prompts": 4, "n_new": 4}
    make = functools.partial(gymnasium.make_vec, num_envs=2) if many else gymnasium.make
    env = make("AttentionSurgery-v0", prompt_length=8, **options)
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape or (), np.float32))
    env.reset()


def surgeon(folder: Path, name: str) -> None:
    env = small_env()
    made = make_surgeon(name, env, 0, options_of(name))
    made.operate(1)
    made.act(env.reset()[0], np.ones(2, np.bool_))
    save_surgeon(made, folder, name, 0)


def learner(folder: Path, **recipe: str) -> None:
    made = make_learner(fresh_model(), TOKENS, **recipe)
    made.update()


def measurement(folder: Path) -> None:
    env = small_eval_env()
    evaluate_text(env.patient.model, env.patient.splits["validation"][:100])
    rng = np.random.default_rng(0)
    measure_effect(ScriptedSurgeon(env, 0.3), env, "joint", rng, n_prompts=4)


def generation(folder: Path) -> None:
    generate(tiny_patient().model, torch.zeros(2, 4, dtype=torch.long), torch.full((2, 5), 0.5))


def export(folder: Path) -> None:
    patient = tiny_patient()
    export_model(folder / "exported", patient.model, patient.tokenizer)
    load_model(str(folder / "exported"))


def run(folder: Path) -> None:
    train(small_config(write_text(folder), folder / "run"), quiet=True)


CONSUMERS: dict[str, Callable[[Path], None]] = {
    "make": functools.partial(made_env, many=False),
    "make_vec": functools.partial(made_env, many=True),
    "generate": generation,
    "evaluation": measurement,
    "export": export,
    "train": run,
    "GRPO update": learner,
    "supervised update": functools.partial(learner, **CE),
    **{f"operator {name}": functools.partial(single_env, operator=name) for name in OPERATORS},
    **{f"surgeon {name}": functools.partial(surgeon, name=name) for name in SURGEONS},
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_global_generators_are_left_alone(consumer: str, tmp_path: Path) -> None:
    before = global_random_states()
    CONSUMERS[consumer](tmp_path)
    assert global_random_states() == before


@pytest.mark.slow
def test_importing_leaves_them_alone() -> None:
    code = (
        "import stable_baselines3; from tests.patients import global_random_states as states;"
        "before = states(); import agents.cli.main, agents.training.loop, agents.report;"
        "assert states() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
