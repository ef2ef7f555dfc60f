"""Tests of avatarl_env/text/playwright: the entropy of a grammar, and the play."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import pytest

from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.text.ngram import NGramReference
from avatarl_env.text.playwright import Play, write_play
from avatarl_env.text.playwright.grammar import Grammar, Voice, read_rules

# --- the entropy ---------------------------------------------------------------------------------


def voice(rules: str, local: str = "war N = sword", seed: int = 0) -> Voice:
    return Voice(Grammar(read_rules(rules), read_rules(local)), seed)


@pytest.mark.parametrize("rules", ["W = 3 rain | snow", "W = rain rain snow rain"])
def test_surprisal_of_a_draw_is_the_logarithm_of_its_share(rules: str) -> None:
    speaker, total, counts = voice(rules), 0.0, Counter[str]()
    for _ in range(4000):
        word = speaker.write("W")
        counts[word] += 1
        total += math.log(4 / 3) if word == "rain" else math.log(4)
        assert math.isclose(speaker.nats, total)
    assert counts["rain"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_surprisals_of_nested_patterns_and_choices_add_up() -> None:
    speaker = voice("S = {A}{B} | {B}\nA = p q r\nB = x y")
    expected = math.log(2) + math.log(2) + (math.log(3) if len(speaker.write("S")) == 2 else 0.0)
    assert math.isclose(speaker.nats, expected)
    expected += math.log(3 / 2) if speaker.choose("aab") == "a" else math.log(3)
    assert math.isclose(speaker.nats, expected)


def test_defined_words_leave_no_choice_and_may_define_others() -> None:
    speaker = voice("S = {WHO}: {^HE}, {a:W}\nW = owl | owl")
    speaker.define_with("WHO", {"king": {"HE": "he"}, "queen": {"HE": "she"}})
    assert {speaker.write("S") for _ in range(50)} == {"king: He, an owl", "queen: She, an owl"}
    assert math.isclose(speaker.nats, 50 * math.log(2))
    assert speaker.last_word["WHO"] in ("king", "queen")
    speaker = voice("S = {^WHO} and {WHO}")
    speaker.define(WHO="she")
    assert (speaker.write("S"), speaker.nats) == ("She and she", 0.0)


# --- the play ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play() -> Play:
    return write_play()


def test_the_default_play_is_always_the_same(play: Play) -> None:
    assert hashlib.sha256(play.text.encode("ascii")).hexdigest() == (
        "e6c56ac85d50eec9082d51f6d6c7ded6868b85cbab73539e0c8e809ee953e515"
    )
    assert play.nats_per_char == pytest.approx(0.6121828111843702, rel=1e-12)
    assert 1_000_000 <= len(play.text) < 1_002_000
    assert len(set(play.text)) <= 70


@pytest.mark.parametrize("n_chars", [1, 1000, 30_000])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_shorter_play_is_a_prefix_in_whole_blocks(seed: int, n_chars: int) -> None:
    short, long = write_play(seed, n_chars).text, write_play(seed, 40_000).text
    assert long.startswith(short)
    assert short.endswith("\n\n")
    assert len(short[:-2].rpartition("\n\n")[0]) < n_chars <= len(short)


def test_seeds_give_different_plays() -> None:
    assert len({write_play(seed, 500).text for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("keywords", "message"), [({"n_chars": 0}, "n_chars .* 0"), ({"seed": -1}, "seed .* -1")]
)
def test_bad_arguments_are_refused(keywords: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_play(**keywords)


def test_the_entropy_is_moderate_and_no_five_gram_model_reaches_it(play: Play) -> None:
    short = write_play(1, 200_000)
    assert 0.6 <= play.nats_per_char <= 1.1
    assert math.isclose(short.nats_per_char, play.nats_per_char, rel_tol=0.03)
    tokenizer = CharTokenizer.from_text(short.text)
    tokens = tokenizer.encode(short.text)
    reference = NGramReference.fit(tokens[:180_000], tokenizer.vocab_size, order=5)
    assert reference.evaluate(tokens[180_000:]).loss >= short.nats_per_char + 0.15
