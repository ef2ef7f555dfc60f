"""Tests of the bundled patient: its metadata, its stored trajectory, its quality.

After a change of the patient or of its text, store its trajectory again:
python -c "from tests.avatarl_env.test_bundled import store_trajectory; store_trajectory()"
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import tyro

import avatarl_env
from agents.training.config import TrainConfig, preset
from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.episode import Episode
from avatarl_env.lm.gpt import GPT, GPTConfig
from avatarl_env.lm.storage import load_model, model_folder
from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.patient import Evaluation, Patient
from avatarl_env.scoring import Score
from avatarl_env.text.corpus import load_corpus

TRAJECTORY = Path(__file__).parent / "bundled_trajectory.json"
DIGITS = 6
TOLERANCE = 1e-3
"""Differences of numbers between processors; the characters must be equal."""
SEED = 0
KEYWORDS = {"n_prompts": 4, "prompt_length": 16, "n_new": 24, "episode_length": 3, "injury": 0.25}
ACTIONS = [
    [0.5, -0.5, 0.25, 0.0, -0.25, 0.5, 0.0, 0.125],
    [-1.0, 0.5, 0.0, 0.75, 0.25, 0.25, -0.5, 0.0],
    [0.0, 0.25, -0.75, 0.5, 0.0, -1.0, 0.25, 0.5],
]


def make(**keywords: Any) -> AttentionSurgeryEnv:
    env = gymnasium.make("AttentionSurgery-v0", **keywords).unwrapped
    assert isinstance(env, AttentionSurgeryEnv)
    return env


def rounded(numbers: Any) -> list[float]:
    return [round(float(number), DIGITS) for number in numbers]


def margin(episode: Episode) -> float:
    """Return the distance of the nearest uniform from drawing another character."""
    cdf = np.exp(episode.present.generations.distributions).cumsum(-1)
    return float(np.abs(cdf - episode.prompts.uniforms[..., None]).min())


def trajectory() -> tuple[list[dict[str, Any]], float]:
    """Perform the stored operation; return its steps, and the smallest margin."""
    env = make(**KEYWORDS)
    decode = env.patient.tokenizer.decode
    observation, info = env.reset(seed=SEED)
    seen, reward, margins = [], 0.0, []
    for action in [*ACTIONS, None]:
        episode = env.get_state()["episode"]
        seen.append(
            {
                "reward": round(reward, DIGITS),
                "score_terms": dict(
                    zip(info["score_terms"], rounded(info["score_terms"].values()), strict=True)
                ),
                "observation": rounded(observation),
                "texts": [decode(row) for row in episode.present.generations.tokens],
            }
        )
        margins.append(margin(episode))
        if action is not None:
            observation, reward, *_, info = env.step(np.array(action, dtype=np.float32))
    return seen, min(margins)


def store_trajectory() -> None:
    """Write the trajectory that the tests compare with."""
    seen, _ = trajectory()
    lines = ",\n".join(json.dumps(step) for step in seen)
    TRAJECTORY.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def test_metadata_describe_the_model() -> None:
    """Its size, its text, and the command that trained it, which can still be given."""
    folder, stored = model_folder("bundled"), load_model("bundled")
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 1_000_000
    corpus = load_corpus(stored.about["corpus"])
    assert corpus.sha256 == stored.about["corpus_sha256"]
    assert stored.tokenizer == CharTokenizer.from_text(corpus.split("train"))
    python, script, *flags = shlex.split(stored.about["made_by"])
    assert (python, script) == ("python", "train.py")
    config = tyro.cli(TrainConfig, default=preset("laptop"), args=flags)
    assert config.corpus == stored.about["corpus"]
    sizes = {"vocab_size": stored.tokenizer.vocab_size, **dataclasses.asdict(config.lm)}
    assert stored.model.config == GPTConfig(**sizes)


@pytest.mark.slow
def test_it_needs_no_network_and_no_file_of_the_users(tmp_path: Path) -> None:
    """In a new process without the package agents, with warnings as errors."""
    package = Path(avatarl_env.__file__).parent
    program = """
import os, socket, sys
import gymnasium, safetensors.torch, torch
import avatarl_env

def refuse(*arguments, **keywords):
    raise AssertionError("the network was used")

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(os.getcwd()):
        raise AssertionError(f"{arguments[0]} was opened")
    if event.startswith("socket."):
        refuse()

sys.modules["agents"] = None
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
sys.addaudithook(watch)
env = gymnasium.make("AttentionSurgery-v0")
observation, _ = env.reset(seed=0)
env.close()
print(len(observation))
"""
    home = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "AVATARL_DATA_DIR")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **home, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "56"
    assert list(tmp_path.iterdir()) == []


def test_seeded_trajectory_is_the_stored_one() -> None:
    stored = json.loads(TRAJECTORY.read_text(encoding="utf-8"))
    seen, smallest_margin = trajectory()
    assert len(seen) == len(stored) == 4
    assert smallest_margin > 1e-5  # so that rounding cannot change a character
    for now, then in zip(seen, stored, strict=True):
        assert now["texts"] == then["texts"]
        assert now["reward"] == pytest.approx(then["reward"], abs=TOLERANCE)
        assert now["score_terms"] == pytest.approx(then["score_terms"], abs=TOLERANCE)
        assert now["observation"] == pytest.approx(then["observation"], abs=TOLERANCE)
    assert all(abs(step["reward"]) > 10 * TOLERANCE for step in stored[1:])


@pytest.fixture(scope="module")
def patient() -> Patient:
    return Patient.load("bundled")


@pytest.fixture(scope="module")
def written(patient: Patient) -> Evaluation:
    return continue_heldout_text(patient)


def continue_heldout_text(patient: Patient) -> Evaluation:
    prompts = patient.prompts("validation", 32, 32, 80, np.random.default_rng(0))
    return patient.evaluate(prompts)


def share_of_words(patient: Patient, evaluation: Evaluation) -> float:
    """Return the share of generated words (but the first and last) that the corpus has."""
    words = set(re.findall("[a-z]+", patient.corpus.text.lower()))
    found = [
        word
        for row in evaluation.generations.new_tokens
        for word in re.findall("[a-z]+", patient.tokenizer.decode(row).lower())[1:-1]
    ]
    assert len(found) > 100
    return float(np.mean([word in words for word in found]))


def test_it_is_better_than_an_untrained_model(patient: Patient, written: Evaluation) -> None:
    blank = Patient(GPT(patient.model.config).eval(), patient.tokenizer, patient.corpus)
    babble = continue_heldout_text(blank)
    score = Score()
    assert score(written.terms) > -2 > -5 > score(babble.terms)
    assert written.terms["heldout_loss"] < 1.8
    assert babble.terms["heldout_loss"] > 4
    assert share_of_words(patient, babble) < 0.2


def test_an_injury_costs_score_and_healing_regains_it(patient: Patient) -> None:
    rules = {"injury": 0.5, "episode_length": 1, "step_size": 1.0, "n_prompts": 16, "n_new": 12}
    env = AttentionSurgeryEnv(patient, **rules)
    lost = []
    for seed in range(6):
        env.reset(seed=seed)
        *_, info = env.step((-env.get_state()["episode"].injury).astype(np.float32))
        lost.append(info["lost_score"])
        assert info["improvement"] == pytest.approx(info["lost_score"], abs=TOLERANCE)
    assert np.mean(lost) > 0.1
