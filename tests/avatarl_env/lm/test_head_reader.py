"""Tests of avatarl_env/lm/reading.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from avatarl_env.lm import head_reader as reading
from avatarl_env.lm.head_reader import HeadReader, hidden_width
from avatarl_env.lm.hub import HubLM
from tests.avatarl_env.surgery.edits import refused
from tests.fakes import fingerprint, tiny_gpt
from tests.foreign import Homemade
from tests.patients import count_hooks, global_random_states
from tests.zoo import VOCAB, ZOO, build, shared, tokens


def naive_losses(model: nn.Module, read: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        log_probs = torch.log_softmax(model(read)[:, : targets.size(1)].double(), dim=-1)
    return -log_probs.gather(2, targets[:, :, None])[:, :, 0].float()


@pytest.mark.parametrize("cells", [1, 3 * VOCAB * 4, 10**6])
@pytest.mark.parametrize("name", ZOO)
def test_losses_a_few_positions_at_a_time_are_those_of_whole_logits(
    name: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position at a time, four, or all."""
    model, text = shared(name), tokens(3, 12)
    expected = naive_losses(model, text, text[:, 1:])
    with torch.no_grad():
        logits = model(text)
        with HeadReader(model, text[:, 1:]) as whole:
            assert torch.equal(model(text), logits)
        monkeypatch.setattr(reading, "WHOLE_UP_TO", VOCAB - 1)
        monkeypatch.setattr(reading, "_CELLS_AT_ONCE", cells)
        with HeadReader(model, text[:, 1:]) as frugal:
            last = model(text)
            again = model(text)  # only the first forward is read
    assert torch.equal(again, logits)
    torch.testing.assert_close(last, logits[:, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frugal.logits, last)
    torch.testing.assert_close(frugal.hidden, whole.hidden)
    for found in (whole.losses(), frugal.losses()):
        assert found.shape == (3, 11)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert count_hooks(model) == 0


def test_targets_may_reach_one_beyond_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a window do, whose last token is not read."""
    model, text = shared("gpt"), tokens(2, 9)
    expected = naive_losses(model, text[:, :-1], text[:, 1:])
    for most in (VOCAB, VOCAB - 1):
        monkeypatch.setattr(reading, "WHOLE_UP_TO", most)
        with torch.no_grad(), HeadReader(model, text[:, 1:]) as head:
            model(text[:, :-1])
        torch.testing.assert_close(head.losses(), expected, atol=1e-5, rtol=1e-5)


def test_the_frugal_way_never_makes_the_logits_of_all_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = build("gpt"), tokens(3, 12)
    sizes: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, made: sizes.append(made.numel()))
    monkeypatch.setattr(reading, "WHOLE_UP_TO", VOCAB - 1)
    monkeypatch.setattr(reading, "_CELLS_AT_ONCE", 2 * 3 * VOCAB)
    with torch.no_grad(), HeadReader(model, text[:, 1:]):
        model(text)
    assert sizes == [2 * 3 * VOCAB] * 5 + [3 * VOCAB] * 2  # eleven targets, then the last position


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_after_an_exception(error: type[BaseException]) -> None:
    model = build("gpt")
    with pytest.raises(error, match="stop"), HeadReader(model, tokens(1, 3)):
        raise error("stop")
    assert count_hooks(model) == 0


def test_what_was_not_read_cannot_be_told() -> None:
    with HeadReader(shared("gpt")) as head:
        pass
    for name in ("hidden", "logits"):
        with pytest.raises(AssertionError, match="never called"):
            getattr(head, name)
    with pytest.raises(AssertionError, match="targets were not given"):
        head.losses()


# --- hidden_width --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_width_is_that_of_the_final_hidden_state(name: str) -> None:
    assert hidden_width(shared(name)) == 16


def test_finding_the_width_leaves_everything_as_it_was() -> None:
    model = tiny_gpt().train()
    before, states = fingerprint(model), global_random_states()
    assert hidden_width(model) == 32
    assert fingerprint(model) == before
    assert global_random_states() == states
    assert model.training
    assert count_hooks(model) == 0


def test_weights_that_are_no_numbers_have_a_width_too() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    assert hidden_width(model) == 32


class Capped(Homemade):
    """A model that does something to its logits after its output head has made them."""

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return 3 * torch.tanh(super().forward(tokens, cache) / 3)


class Scaled(Homemade):
    """A model that scales its logits, and whose head makes nothing but zeros yet."""

    def __init__(self, vocab_size: int = 14) -> None:
        super().__init__(vocab_size)
        with torch.no_grad():
            self.get_output_embeddings().weight.zero_()

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return super().forward(tokens, cache) / 8


class InPlace(Homemade):
    """A model that caps its logits where they lie."""

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return super().forward(tokens, cache).tanh_()


class Pooled(Homemade):
    """A model that returns no logits for each position."""

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return super().forward(tokens, cache).mean(1)


class Headless(Homemade):
    """A model that goes round its output head."""

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return nn.functional.one_hot(tokens, self.vocab_size).float()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Capped, "changed ones"),
        (Scaled, "changed ones"),
        (InPlace, "changed ones"),
        (Pooled, (8, 14)),
        (Headless, (8, 2, 14)),
    ],
)
def test_logits_that_are_not_the_heads_are_refused(kind: type[Homemade], found: object) -> None:
    with refused(
        ValueError,
        "model must return what its output head makes, (8, 2, 14) logits of eight texts of two "
        f"tokens, got {found} of {kind.__name__}",
    ):
        hidden_width(kind())


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_models_of_transformers_that_change_their_logits_are_refused(name: str) -> None:
    """Also those whose token 0 is padding, of which zeros come, capped and scaled or not."""
    import transformers

    kind = {"gemma2": "Gemma2", "cohere": "Cohere", "granite": "Granite"}[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"logits_scaling": 8.0} if name == "granite" else {}),
    )
    model = HubLM(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    with pytest.raises(ValueError, match=r"^model must return what its output head makes, "):
        hidden_width(model)


class Picky(Homemade):
    """A model that picks positions of its logits."""

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return super().forward(tokens, cache)[:, torch.arange(tokens.size(1))]


class Repeating(Homemade):
    """A model that returns as many positions as there are tokens, whatever its head makes."""

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return super().forward(tokens, cache).expand(-1, tokens.size(1), -1)


@pytest.mark.parametrize(
    ("kind", "found"),
    [(Picky, "Picky raised: index 1 is out of bounds"), (Repeating, "Repeating returned 2 pos")],
)
def test_a_model_that_needs_all_positions_is_refused_if_its_vocabulary_is_large(
    kind: type[Homemade], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hidden_width(kind()) == 32
    monkeypatch.setattr(reading, "WHOLE_UP_TO", 13)
    assert hidden_width(Homemade()) == 32
    with pytest.raises(ValueError, match=f"^model must return .* large vocabularies, {found}"):
        hidden_width(kind())
