"""Operations on models and tokenizers of transformers and on a user's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm.hub import HubLM, HubTokenizer
from avatarl_env.patient import Patient
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.fakes import fingerprint
from tests.foreign import TOKENIZERS, Homemade, Pairs, hub_model
from tests.patients import actions, tiny_corpus, tiny_text

SIZES: dict[str, Any] = {"n_prompts": 6, "prompt_length": 8, "n_new": 6, "episode_length": 2}


def foreign(kind: str, name: str) -> tuple[nn.Module, Any]:
    tokenizer = TOKENIZERS[name]()
    return hub_model(kind, len(tokenizer)), tokenizer


def operation(env: AttentionSurgeryEnv, seed: int = 0) -> list[Any]:
    """Perform one operation; return all that was seen."""
    observation, info = env.reset(seed=seed)
    seen: list[Any] = [observation.tolist(), info["score_terms"]]
    for action in 0.3 * actions(2, len(env.operator.labels)):
        observation, reward, _, _, info = env.step(action)
        assert observation in env.observation_space
        assert all(math.isfinite(value) for value in info["score_terms"].values())
        seen += [observation.tolist(), reward, info["score_terms"]]
    assert info["flatline"] == ""
    return seen


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "bpe"), ("llama", "characters"), ("llama", "bytes")]
)
def test_an_operation_and_a_commit(kind: str, name: str) -> None:
    model, tokenizer = foreign(kind, name)
    env = AttentionSurgeryEnv.from_model(model, tokenizer, tiny_corpus(), **SIZES)
    assert isinstance(env.patient.model, HubLM)
    assert isinstance(env.patient.tokenizer, HubTokenizer)
    assert env.patient.width == 16
    before = fingerprint(model)
    first = operation(env)
    assert any(abs(reward) > 1e-4 for reward in (first[3], first[6]))
    assert operation(env) == first
    assert fingerprint(model) == before
    env.commit()
    assert fingerprint(model) != before
    with pytest.raises(RuntimeError):
        env.step(actions(1, len(env.operator.labels))[0])
    committed = env.reset(seed=0)[1]["score_terms"]
    assert committed["kl_ref"] == pytest.approx(first[-1]["kl_ref"], abs=1e-3)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "bpe"), ("llama", "characters")])
def test_vector_and_single_environments_agree(kind: str, name: str) -> None:
    patient = Patient(*foreign(kind, name), tiny_corpus())
    env = AttentionSurgeryVectorEnv(3, patient, **SIZES)
    observations, _ = env.reset(seed=0)
    moves = 0.3 * actions(3, len(env.operator.labels))
    after, rewards, *_ = env.step(moves)
    for row in range(3):
        single = AttentionSurgeryEnv(patient, **SIZES)
        expected, _ = single.reset(seed=row)
        assert observations[row] == pytest.approx(expected, abs=1e-3)
        expected, reward, *_ = single.step(moves[row])
        assert after[row] == pytest.approx(expected, abs=1e-3)
        assert rewards[row] == pytest.approx(reward, abs=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "bpe"), ("llama", "characters")])
def test_a_saved_model_is_loaded_from_its_folder(kind: str, name: str, tmp_path: Path) -> None:
    model, tokenizer = foreign(kind, name)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_text(), encoding="utf-8")
    env = gymnasium.make(
        "AttentionSurgery-v0",
        lm=str(tmp_path / "model"),
        corpus=str(tmp_path / "text.txt"),
        **SIZES,
    ).unwrapped
    assert not env.patient.model.training
    live = AttentionSurgeryEnv.from_model(model, tokenizer, tiny_corpus(), **SIZES)
    assert operation(env) == operation(live)


def test_a_users_own_model_and_tokenizer_are_not_wrapped() -> None:
    tokenizer = Pairs()
    model = Homemade(tokenizer.vocab_size)
    env = AttentionSurgeryEnv.from_model(model, tokenizer, tiny_corpus(), **SIZES)
    assert env.patient.model is model
    assert env.patient.tokenizer is tokenizer
    assert env.patient.width == 32
    operation(env)


@pytest.mark.parametrize("whole", [True, False])
def test_nats_are_per_character(whole: bool) -> None:
    """With two characters per token every term is half of its value per token.

    Also for a vocabulary of more than 256 tokens, of which no whole distributions are kept.
    """
    tokenizer = Pairs(None if whole else tiny_text() + "BCDFGHI")
    patient = Patient(Homemade(tokenizer.vocab_size), tokenizer, tiny_corpus())
    prompts = patient.prompts("surgeon", 6, 8, 12, np.random.default_rng(0))
    generations, _, terms = patient.evaluate(prompts)
    with torch.no_grad():
        logits = patient.model(torch.from_numpy(generations.tokens))
    by_token = torch.log_softmax(logits, -1).double()
    drawn = by_token[:, :-1].gather(2, torch.from_numpy(generations.tokens)[:, 1:, None])[..., 0]
    assert terms["heldout_loss"] == pytest.approx(-float(drawn[:, :7].mean()) / 2, abs=1e-5)
    p = by_token[:, 7:-1]
    assert terms["entropy"] == pytest.approx(-float((p.exp() * p).sum(-1).mean()) / 2, abs=1e-5)
    log_q = patient.reference.ngram.target_log_probs(generations.tokens, 8)
    assert terms["ref_loglik"] == pytest.approx(log_q.mean() / 2, abs=1e-6)
    assert patient.keeps_distributions is whole
    if not whole:
        expected = float((torch.from_numpy(log_q) - drawn[:, 7:]).mean()) / 2
        assert generations.distributions is None
    else:
        q = torch.from_numpy(patient.reference.ngram.next_log_probs(generations.tokens, 8)).double()
        expected = float((p.exp() * (q - p)).sum(-1).mean()) / 2
    assert terms["kl_ref"] == pytest.approx(expected, abs=1e-5)
    windows = patient.windows("surgeon", 4, 9, np.random.default_rng(1)).reshape(2, 2, 9)
    with torch.no_grad():
        logits = patient.model(torch.from_numpy(windows.reshape(4, 9))[:, :-1]).mT
    loss = nn.functional.cross_entropy(
        logits, torch.from_numpy(windows.reshape(4, 9))[:, 1:], reduction="none"
    )
    assert patient.losses(windows) == pytest.approx(loss.mean(1).view(2, 2).numpy() / 2, abs=1e-5)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    hub_model("gpt2", 14).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^lm must have a tokenizer beside its weights .* none$"):
        Patient.load(str(tmp_path))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """Transformers would draw them at random."""
    model, tokenizer = foreign("llama", "characters")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^lm must hold all weights .* lacks: .*layers\.2\."):
        Patient.load(str(tmp_path))
