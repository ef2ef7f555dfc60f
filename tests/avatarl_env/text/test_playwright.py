"""Tests of avatarl_env/text/playwright: the entropy of a grammar, and the play."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest

from avatarl_env.lm.tokenizer import CharTokenizer
from avatarl_env.text.ngram import NGramReference
from avatarl_env.text.playwright import Play, lexicon, write_play
from avatarl_env.text.playwright.grammar import Grammar, Voice, read_rules

TWENTY = " ".join(chr(ord("a") + i) * 2 for i in range(20))
CAST = {row[0]: row for row in (entry.split("/") for entry in lexicon.CAST.split())}
TITLES = "|".join(sorted({row[1] for row in CAST.values() if row[1] != "-"}))
PERSON = rf"(?:(?:{TITLES}) )?([A-Z][a-z]+)"
FAMILIAR = {"thou", "thee", "thy", "thine", "hast", "dost", "know'st"}
FORMAL = {"you", "your", "yours", "yourself"}


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


class Speech(NamedTuple):
    scene: int
    speaker: str
    stage: frozenset[str]
    text: str

    @property
    def words(self) -> list[str]:
        return re.findall(r"[a-z']+", self.text.lower())


@pytest.fixture(scope="module")
def play() -> Play:
    return write_play()


@pytest.fixture(scope="module")
def speeches(play: Play) -> list[Speech]:
    return list(parse(play.text))


def parse(text: str) -> Iterator[Speech]:
    """Follow the stage directions; fail where they make no sense."""
    scene = 0
    stage: set[str] = set()
    for block in text.removesuffix("\n\n").split("\n\n"):
        direction = re.fullmatch(r"\[(Enter|Exit|Exeunt)(?: (.*))?\.\]", block)
        if direction:
            names = re.split(r", | And ", direction[2].title()) if direction[2] else []
            if direction[1] == "Enter":
                assert stage.isdisjoint(names)
                stage |= set(names)
            elif direction[1] == "Exit":
                assert stage.issuperset(names)
                stage -= set(names)
            else:
                assert stage
                stage.clear()
        elif re.fullmatch(r"(PART|ACT|SCENE) .*", block):
            assert not stage
            scene += block.startswith("SCENE")
        else:
            label, speech = block.split("\n", 1)
            assert re.fullmatch(r"[A-Z]+:", label)
            yield Speech(scene, label[:-1].title(), frozenset(stage), speech)


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


def test_only_persons_on_stage_speak_and_nobody_twice_in_a_row(speeches: list[Speech]) -> None:
    assert len({word for speech in speeches for word in speech.words}) > 1000
    assert {speech.speaker for speech in speeches} == set(CAST)
    assert all(speech.speaker in speech.stage for speech in speeches)
    for before, after in pairwise(speeches):
        assert (before.scene, before.speaker) != (after.scene, after.speaker)


def test_who_is_addressed_is_present_and_who_is_mentioned_is_absent(
    play: Play, speeches: list[Speech]
) -> None:
    called = re.compile(rf"(?:Hear me|Come|And (?:thou|you)|Speak|Why), {PERSON}[,:?]")
    asked = re.compile(rf"Where is {PERSON}\? (He|She) ")
    letter = re.compile(rf"from {PERSON}[.:]")
    seen = Counter[str]()
    for speech in speeches:
        for name in set(called.findall(speech.text)) & CAST.keys():
            seen["called"] += 1
            assert name in speech.stage - {speech.speaker}
        for name, pronoun in asked.findall(speech.text):
            seen["asked"] += 1
            assert name not in speech.stage
            assert pronoun == {"m": "He", "f": "She"}[CAST[name][3]]
        before, reads, after = speech.text.partition("[Reads]")
        if reads:
            seen["letter"] += 1
            writer = letter.findall(before.replace("\n", " "))[-1]
            assert re.search(rf"\b{writer}\.(\n|$)", after)
    assert min(seen["called"], seen["asked"], seen["letter"]) > 50
    announced = re.findall(rf"here comes {PERSON}, .*\n\n(.*)", play.text)
    assert len(announced) > 20
    assert all(direction == f"[Enter {name.upper()}.]" for name, direction in announced)


def test_forms_of_address_agree_with_rank_and_sex(speeches: list[Speech]) -> None:
    seen = Counter[str]()
    for speech in speeches:
        words = set(speech.words)
        assert not (FAMILIAR & words and FORMAL & words)
        seen.update(["thou"] * bool(FAMILIAR & words) + ["you"] * bool(FORMAL & words))
        others = [CAST[name] for name in speech.stage - {speech.speaker}]
        for title, low, high, sex in (
            ("my liege", 3, 3, "m"),
            ("madam", 2, 3, "f"),
            ("sirrah", 0, 0, "m"),
        ):
            if re.search(rf"\b{title}\b", speech.text, re.IGNORECASE):
                seen[title] += 1
                assert any(low <= int(row[2]) <= high and row[3] == sex for row in others)
    assert min(seen["thou"], seen["you"]) > 500
    assert min(seen["my liege"], seen["madam"], seen["sirrah"]) > 30


def test_replies_repeat_the_noun_of_the_speech_before(speeches: list[Speech]) -> None:
    echo = re.compile(r"^(?:By that same|Call it not|Is it (?:thy|your)) ([a-z]+)[,: ]")
    aloud = [speech for speech in speeches if not speech.text.startswith("[Aside]")]
    pairs = [(b, echo.match(after.text)) for b, after in pairwise(aloud)]
    repeated = [found[1] in before.words for before, found in pairs if found]
    assert len(repeated) > 100
    assert sum(repeated) / len(repeated) > 0.9  # a speech without a noun passes on an older one


def test_lines_are_well_formed_and_hardly_ever_repeat(play: Play, speeches: list[Speech]) -> None:
    assert not re.findall(
        r"\ba (?!use)[aeiou]\w*|\ban (?![aeiou]|honest)\w+", play.text, re.IGNORECASE
    )
    assert not re.findall(r" [,.;:!?\n]|[,.;:!?]{2}|  |[{}|/]", play.text)
    counts = Counter[str]()
    for speech in speeches:
        lines = speech.text.split("\n")
        counts.update(lines)
        assert lines[0][0].isupper() or lines[0][0] == "["
        assert lines[-1][-1] in ".!?"
        if CAST[speech.speaker][4] == "comic":
            assert max(map(len, lines)) <= 64
        else:
            assert all(line[0].isupper() or line[0] == "[" for line in lines)
    assert sum(n for n in counts.values() if n > 1) / counts.total() < 0.03


def test_scenes_end_in_a_rhyme(play: Play) -> None:
    rhymes = [set(words.split()) for words in lexicon.RHYMES.replace("\n", "").split("/")]
    couplets = re.findall(r"\b([a-z]+)[,;:]\n.*\b([a-z]+)\.\n\n\[Exeunt", play.text)
    assert len(couplets) == play.text.count("[Exeunt.]")
    assert all(any({a, b} <= words for words in rhymes) and a != b for a, b in couplets)
