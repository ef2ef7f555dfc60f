"""Tests of avatarl_env/lm/head_reader.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatarl_env.lm.head_reader import HeadReader, eval_mode, hidden_width
from tests.fakes import tiny_gpt
from tests.foreign import Homemade
from tests.patients import count_hooks
from tests.zoo import ZOO, build, fill, shared, tokens

MANY = 300
"""Tokens of a vocabulary whose logits are not kept for all positions."""


def with_many_tokens(name: str) -> nn.Module:
    if name != "gpt":
        return build(name, vocab_size=MANY)
    model = tiny_gpt(vocab_size=MANY, context=24, width=16)
    fill(model)
    return model


def naive_losses(logits: Tensor, targets: Tensor) -> Tensor:
    log_probs = torch.log_softmax(logits[:, : targets.size(1)].double(), dim=-1)
    return -log_probs.gather(2, targets[:, :, None])[:, :, 0].float()


@pytest.mark.parametrize("n_read", [12, 11])
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("is_large", [False, True])
def test_losses_are_those_of_all_logits(name: str, n_read: int, is_large: bool) -> None:
    """The targets may also end one token beyond what is read."""
    model, text = with_many_tokens(name) if is_large else shared(name), tokens(3, 12)
    read, targets = text[:, :n_read], text[:, 1:]
    with torch.no_grad():
        logits = model(read)
        with HeadReader(model, targets) as head:
            returned = model(read)
            again = model(read)  # only the first forward is read
        with HeadReader(model) as plain:
            model(read)
    assert torch.equal(again, logits)
    assert torch.equal(plain.logits, logits)
    torch.testing.assert_close(returned, logits[:, -1:] if is_large else logits)
    torch.testing.assert_close(head.logits, returned)
    torch.testing.assert_close(head.hidden, plain.hidden)
    assert head.hidden.shape == (3, 16)
    assert head.losses().shape == (3, 11)
    torch.testing.assert_close(head.losses(), naive_losses(logits, targets), atol=1e-5, rtol=1e-5)
    assert count_hooks(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_exception(error: type[BaseException]) -> None:
    model = build("gpt")
    with pytest.raises(error, match="stop"), HeadReader(model, tokens(1, 3)):
        raise error("stop")
    assert count_hooks(model) == 0


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_eval_mode_restores_every_modules_mode(error: type[BaseException] | None) -> None:
    model = tiny_gpt().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert [module.training for module in model.modules()] == before


# --- hidden_width --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_width_is_that_of_the_final_hidden_state(name: str) -> None:
    assert hidden_width(shared(name)) == 16


def changed(change: Any, vocab_size: int = 14, *, is_blank: bool = False) -> nn.Module:
    """Return a model that changes the output of its head (all zeros if `is_blank`)."""

    class Changed(Homemade):
        def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
            logits: Tensor = change(super().forward(tokens, cache), tokens)
            return logits

    model = Changed(vocab_size)
    if is_blank:
        with torch.no_grad():
            model.get_output_embeddings().weight.zero_()
    return model


@pytest.mark.parametrize(
    ("change", "is_blank", "found"),
    [
        (lambda logits, _: 3 * torch.tanh(logits / 3), False, "changed ones"),
        (lambda logits, _: logits / 8, True, "changed ones"),
        (lambda logits, _: logits.tanh_(), False, "changed ones"),
        (lambda logits, _: logits.mean(1), False, r"\(8, 14\)"),
        (lambda _, tokens: nn.functional.one_hot(tokens, 14).float(), False, "changed ones"),
    ],
    ids=["capped", "scaled", "in place", "pooled", "replaced"],
)
def test_a_model_that_changes_the_output_of_its_head_is_refused(
    change: Any, is_blank: bool, found: str
) -> None:
    with pytest.raises(ValueError, match=rf"must return .*\(8, 2, 14\).* got {found} of Changed"):
        hidden_width(changed(change, is_blank=is_blank))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda logits, tokens: logits[:, torch.arange(tokens.size(1))], "raised: index 1 is out"),
        (lambda logits, tokens: logits.expand(-1, tokens.size(1), -1), "returned 2 positions"),
    ],
    ids=["picky", "repeating"],
)
def test_a_model_that_needs_all_positions_is_refused_if_its_vocabulary_is_large(
    change: Any, found: str
) -> None:
    assert hidden_width(changed(change)) == 32
    assert hidden_width(Homemade(MANY)) == 32
    with pytest.raises(ValueError, match=f"large vocabularies, Changed {found}"):
        hidden_width(changed(change, MANY))
