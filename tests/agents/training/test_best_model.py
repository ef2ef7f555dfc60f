"""Tests of agents/training/best_model.py."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from agents.training.best_model import BestModel
from agents.training.config import TrainConfig
from agents.training.loop import train
from avatarl_env.lm.gpt import GPT, GPTConfig
from avatarl_env.lm.storage import load_model, save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.agents.training.broken_runs import break_off, config

TOKENIZER = CharTokenizer.from_text("ab")


def model() -> GPT:
    sizes = {"context": 8, "n_layers": 1, "n_heads": 1, "width": 8}
    return GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, **sizes))


def test_what_a_killed_run_left_goes_and_no_link_is_followed(tmp_path: Path) -> None:
    root, mine = tmp_path / "checkpoints", tmp_path / "mine"
    (root / ".abc.partial" / "new").mkdir(parents=True)
    save_model(mine, model(), TOKENIZER, {"whose": "mine"})
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    for name in (".best.partial", ".abc.partial/new/model.json"):
        (root / name).symlink_to(mine)
    best = BestModel(root / "best", model(), TOKENIZER, {"whose": "the run's"})
    for n, loss in enumerate((2.0, 1.0)):
        best.consider(loss, n)
        assert load_model(str(root / "best")).about["update"] == n
        assert [path.name for path in root.iterdir()] == ["best"]
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    best.clear()
    assert list(root.iterdir()) == []


def test_the_lowest_loss_counts_the_first_of_equals_and_none_that_is_nan(tmp_path: Path) -> None:
    patient = model()
    best = BestModel(tmp_path / "best", patient, TOKENIZER, {})
    for update, loss in enumerate((float("nan"), 2.0, 2.0, 3.0)):
        with torch.no_grad():
            patient.embed.weight.fill_(update)
        best.consider(loss, update)
    assert best.found == {"update": 1, "loss": 2.0}
    stored = load_model(str(tmp_path / "best")).model
    assert bool((stored.get_parameter("embed.weight") == 1).all())


def find(patch: pytest.MonkeyPatch, losses: Mapping[int, float]) -> None:
    """Let the evaluations of a run find these losses, by update."""
    consider = BestModel.consider
    patch.setattr(BestModel, "consider", lambda self, _, n: consider(self, losses[n], n))


@pytest.mark.parametrize(
    ("after", "best"),
    [
        (5, 4),
        (3, 0),
    ],
)
def test_a_resumed_run_has_its_best_model_again(
    after: int, best: int, text: Path, tmp_path: Path
) -> None:
    # Evaluations come at updates 0, 4, 6 (the end of the bootstrap), 8 and 10.
    losses = {0: 2.0, 4: 1.0, 6: 2.5, 8: 2.5, 10: 2.5}
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        find(patch, losses)
        break_off(config(text, folder), after)
    known = folder / "checkpoints" / "best" / "model.safetensors"
    before = known.read_bytes()
    shutil.rmtree(known.parent)
    with pytest.MonkeyPatch.context() as patch:
        find(patch, {**losses, 4: 1.0 if best == 4 else 3.0})
        train(TrainConfig(resume=str(folder)), quiet=True)
    assert load_model(str(known.parent)).about["update"] == best
    assert known.read_bytes() == before
    assert not list((folder / "checkpoints").glob(".*"))
