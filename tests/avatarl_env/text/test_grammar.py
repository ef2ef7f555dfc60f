"""Tests of avatarl_env/text/grammar.py."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from avatarl_env.text.playwright.grammar import Grammar, Pattern, Voice, read_rules, with_article

TWENTY = " ".join(chr(ord("a") + i) * 2 for i in range(20))


def voice(rules: str, local: str = "war N = sword", seed: int = 0) -> Voice:
    return Voice(Grammar(read_rules(rules), read_rules(local)), seed)


def test_rules_are_read_with_weights_symbols_and_line_breaks() -> None:
    rules = read_rules("S = 2 {A} b/{^C}! | d e |\n  f\nA = x y")
    pattern = Pattern("", (("A", " b\n"), ("^C", "!")))
    assert rules == {"S": [pattern, pattern, "d e", "f"], "A": ["x", "y"]}


def test_surprisal_of_a_draw_is_the_logarithm_of_its_share() -> None:
    surprisals = {"rain": math.log(4 / 3), "snow": math.log(4)}
    speaker = voice("W = 3 rain | snow")
    total = 0.0
    counts: Counter[str] = Counter()
    for _ in range(4000):
        word = speaker.write("W")
        counts[word] += 1
        total += surprisals[word]
        assert math.isclose(speaker.nats, total)
    assert counts["rain"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_word_listed_twice_is_counted_once_with_the_sum_of_its_shares() -> None:
    speaker = voice("W = rain rain snow rain")
    while speaker.write("W") != "rain":
        speaker.nats = 0.0
    assert math.isclose(speaker.nats, math.log(4 / 3))


def test_surprisals_of_nested_patterns_add_up() -> None:
    speaker = voice("S = {A}{B} | {B}\nA = p q r\nB = x y")
    text = speaker.write("S")
    expected = math.log(2) + math.log(2) + (math.log(3) if len(text) == 2 else 0.0)
    assert math.isclose(speaker.nats, expected)


def test_open_class_avoids_its_last_two_words_and_knows_what_that_is_worth() -> None:
    speaker = voice(f"S = {{W}} {{W}} {{W}} {{W}}\nW = {TWENTY}")
    for _ in range(300):
        speaker.nats = 0.0
        words = speaker.write("S").split()
        assert all(len(set(words[i : i + 3])) == 3 for i in range(2))
        assert math.isclose(speaker.nats, math.log(20 * 19 * 18 * 18))


def test_small_class_may_repeat_its_words() -> None:
    speaker = voice("S = {W} {W}\nW = x y")
    assert {speaker.write("S") for _ in range(100)} == {"x x", "x y", "y x", "y y"}


def test_context_adds_its_words_with_a_greater_weight() -> None:
    speaker = voice("N = heart")
    assert speaker.write("N") == "heart"
    speaker.enter("war")
    counts = Counter(speaker.write("N") for _ in range(2000))
    assert set(counts) == {"heart", "sword"}
    assert counts["sword"] / 2000 == pytest.approx(0.8, abs=0.04)


def test_context_may_define_a_symbol_that_has_no_other_rule() -> None:
    speaker = voice("N = heart", "war P = field\nsea P = ship")
    speaker.enter("war", "sea")
    assert speaker.write("P") == "ship"
    assert speaker.nats == 0.0


def test_prefixes_give_capital_and_article() -> None:
    speaker = voice("S = {^W}, {a:W}\nW = owl | owl")
    assert speaker.write("S") == "Owl, an owl"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("ash", "an ash"),
        ("brook", "a brook"),
        ("useful", "a useful"),
        ("usher", "an usher"),
        ("honest", "an honest"),
    ],
)
def test_article_is_chosen_by_sound(word: str, expected: str) -> None:
    assert with_article(word) == expected


def test_defined_words_leave_no_choice() -> None:
    speaker = voice("S = {^WHO} and {WHO}")
    speaker.define(WHO="she")
    assert speaker.write("S") == "She and she"
    assert speaker.nats == 0.0


def test_word_may_decide_what_other_symbols_mean() -> None:
    speaker = voice("S = {WHO}: {^HE}")
    speaker.define_with("WHO", {"king": {"HE": "he"}, "queen": {"HE": "she"}})
    assert {speaker.write("S") for _ in range(50)} == {"king: He", "queen: She"}
    assert math.isclose(speaker.nats, 50 * math.log(2))


def test_choice_counts_what_is_listed_twice() -> None:
    speaker = voice("S = x")
    while speaker.choose("aab") != "a":
        speaker.nats = 0.0
    assert math.isclose(speaker.nats, math.log(3 / 2))


def test_last_word_of_a_symbol_is_remembered() -> None:
    speaker = voice("S = {N} {N} {M}\nN = 1 heart | heart\nM = sea | sea")
    speaker.write("S")
    assert (speaker.last_word["N"], speaker.last_word["M"]) == ("heart", "sea")


def test_same_seed_draws_the_same_texts() -> None:
    texts = [[voice(f"W = {TWENTY}", seed=seed).write("W") for _ in range(3)] for seed in (1, 1)]
    assert texts[0] == texts[1]
    assert len({voice(f"W = {TWENTY}", seed=seed).write("W") for seed in range(20)}) > 5
