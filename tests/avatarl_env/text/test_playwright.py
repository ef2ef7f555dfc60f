"""Tests of avatarl_env/text/playwright.py, and of the rules in lexicon.py and phrases.py."""

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
from avatarl_env.text.playwright import SHA256, Play, lexicon, write_play

CAST = {row[0]: row for row in (entry.split("/") for entry in lexicon.CAST.split())}
TITLES = "|".join(sorted({row[1] for row in CAST.values() if row[1] != "-"}))
PERSON = rf"(?:(?:{TITLES}) )?([A-Z][a-z]+)"
FAMILIAR = {"thou", "thee", "thy", "thine", "hast", "dost", "know'st"}
FORMAL = {"you", "your", "yours", "yourself"}


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


def rank(name: str) -> int:
    return int(CAST[name][2])


def test_default_play_is_the_one_whose_checksum_is_known(play: Play) -> None:
    assert hashlib.sha256(play.text.encode("ascii")).hexdigest() == SHA256


def test_play_is_as_long_as_asked_and_ends_with_a_whole_block(play: Play) -> None:
    assert 1_000_000 <= len(play.text) < 1_002_000
    assert play.text.endswith("\n\n")


@pytest.mark.parametrize("n_chars", [1, 1000, 30_000])
@pytest.mark.parametrize("seed", [0, 7])
def test_shorter_play_is_a_prefix_without_its_last_block_too_short(seed: int, n_chars: int) -> None:
    short, long = write_play(seed, n_chars).text, write_play(seed, 40_000).text
    assert long.startswith(short)
    assert len(short) >= n_chars
    assert len(short[:-2].rpartition("\n\n")[0]) < n_chars


def test_seeds_give_different_plays() -> None:
    plays = {write_play(seed, 500).text for seed in range(20)}
    assert len(plays) == 20


def test_same_seed_gives_the_same_play_and_entropy() -> None:
    assert write_play(3, 20_000) == write_play(3, 20_000)


@pytest.mark.parametrize("n_chars", [0, -5])
def test_length_below_one_is_refused(n_chars: int) -> None:
    with pytest.raises(ValueError, match=rf"^n_chars must be at least 1, got {n_chars}$"):
        write_play(n_chars=n_chars)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^seed must be at least 0, got -1$"):
        write_play(-1)


def test_characters_are_few_and_printable_ascii(play: Play) -> None:
    characters = set(play.text)
    assert characters <= {"\n", *map(chr, range(32, 127))}
    assert len(characters) <= 70


def test_entropy_is_moderate_and_the_same_for_other_seeds(play: Play) -> None:
    assert 0.6 <= play.nats_per_char <= 1.1
    assert math.isclose(write_play(1, 300_000).nats_per_char, play.nats_per_char, rel_tol=0.03)


def test_five_gram_model_stays_well_above_the_entropy() -> None:
    play = write_play(0, 250_000)
    tokenizer = CharTokenizer.from_text(play.text)
    tokens = tokenizer.encode(play.text)
    cut = len(tokens) * 9 // 10
    reference = NGramReference.fit(tokens[:cut], tokenizer.vocab_size, order=5)
    assert reference.evaluate(tokens[cut:]).loss >= play.nats_per_char + 0.15


def test_vocabulary_is_rich_and_everybody_speaks(speeches: list[Speech]) -> None:
    assert len({word for speech in speeches for word in speech.words}) > 1000
    assert 20 <= len(CAST) <= 30
    assert {speech.speaker for speech in speeches} == set(CAST)


def test_only_persons_on_stage_speak_and_nobody_twice_in_a_row(speeches: list[Speech]) -> None:
    assert len(speeches) > 1000
    assert all(speech.speaker in speech.stage for speech in speeches)
    assert not [
        after
        for before, after in pairwise(speeches)
        if before.scene == after.scene and before.speaker == after.speaker
    ]


def test_only_persons_on_stage_are_spoken_to(speeches: list[Speech]) -> None:
    called = re.compile(rf"(?:Hear me|Come|And (?:thou|you)|Speak|Why), {PERSON}[,:?]")
    n_called = 0
    for speech in speeches:
        for name in called.findall(speech.text):
            if name in CAST:
                n_called += 1
                assert name in speech.stage - {speech.speaker}
    assert n_called > 200


def test_who_is_spoken_of_is_absent_and_has_the_right_pronoun(speeches: list[Speech]) -> None:
    asked = re.compile(rf"Where is {PERSON}\? (He|She) ")
    letter = re.compile(rf"from {PERSON}[.:]")
    n_asked = n_letters = 0
    for speech in speeches:
        for name, pronoun in asked.findall(speech.text):
            n_asked += 1
            assert name not in speech.stage
            assert pronoun == {"m": "He", "f": "She"}[CAST[name][3]]
        if "[Reads]" in speech.text:
            n_letters += 1
            writers = letter.findall(speech.text.split("[Reads]")[0].replace("\n", " "))
            assert re.search(rf"\b{writers[-1]}\.(\n|$)", speech.text.split("[Reads]")[1])
    assert min(n_asked, n_letters) > 50


def test_announced_persons_enter(play: Play) -> None:
    announced = re.findall(rf"here comes {PERSON}, .*\n\n(.*)", play.text)
    assert len(announced) > 20
    assert all(direction == f"[Enter {name.upper()}.]" for name, direction in announced)


def test_nobody_mixes_thou_and_you_in_a_speech(speeches: list[Speech]) -> None:
    familiar = [speech for speech in speeches if FAMILIAR & set(speech.words)]
    formal = [speech for speech in speeches if FORMAL & set(speech.words)]
    assert min(len(familiar), len(formal)) > 500
    assert not [speech for speech in familiar if FORMAL & set(speech.words)]


def test_forms_of_address_agree_with_rank_and_sex(speeches: list[Speech]) -> None:
    seen = Counter(speech.speaker for speech in speeches)
    for speech in speeches:
        others = speech.stage - {speech.speaker}
        if re.search(r"\bmy liege\b", speech.text, re.IGNORECASE):
            seen["my liege"] += 1
            assert any(rank(name) == 3 and CAST[name][3] == "m" for name in others)
        if re.search(r"\bmadam\b", speech.text, re.IGNORECASE):
            seen["madam"] += 1
            assert any(rank(name) >= 2 and CAST[name][3] == "f" for name in others)
        if re.search(r"\bsirrah\b", speech.text, re.IGNORECASE):
            seen["sirrah"] += 1
            assert rank(speech.speaker) > 0
            assert any(rank(name) == 0 and CAST[name][3] == "m" for name in others)
    assert min(seen["my liege"], seen["madam"], seen["sirrah"]) > 30


def test_replies_take_up_the_noun_of_the_speech_before(speeches: list[Speech]) -> None:
    echo = re.compile(r"^(?:By that same|Call it not|Is it (?:thy|your)) ([a-z]+)[,: ]")
    aloud = [speech for speech in speeches if not speech.text.startswith("[Aside]")]
    taken_up = [
        found[1] in before.words
        for before, after in pairwise(aloud)
        if (found := echo.match(after.text))
    ]
    assert len(taken_up) > 100
    assert sum(taken_up) / len(taken_up) > 0.9  # a speech without a noun passes on an older one


def test_lines_hardly_ever_repeat(speeches: list[Speech]) -> None:
    lines = Counter(line for speech in speeches for line in speech.text.split("\n"))
    repeated = sum(n for n in lines.values() if n > 1)
    assert repeated / lines.total() < 0.03


def test_articles_punctuation_and_capitals_are_right(play: Play, speeches: list[Speech]) -> None:
    assert not re.findall(
        r"\ba (?!use)[aeiou]\w*|\ban (?![aeiou]|honest)\w+", play.text, re.IGNORECASE
    )
    assert not re.findall(r" [,.;:!?\n]|[,.;:!?]{2}|  |[{}|/]", play.text)
    for speech in speeches:
        lines = speech.text.split("\n")
        assert lines[0][0].isupper() or lines[0][0] == "["
        assert lines[-1][-1] in ".!?"
        if CAST[speech.speaker][4] == "comic":
            assert max(map(len, lines)) <= 64
        else:
            assert all(line[0].isupper() or line[0] == "[" for line in lines)


def test_scenes_end_in_a_rhyme(play: Play) -> None:
    classes = ["".join(lexicon.RHYMES.split("\n")).split("/")]
    rhymes = [set(words.split()) for words in classes[0]]
    couplets = re.findall(r"\b([a-z]+)[,;:]\n.*\b([a-z]+)\.\n\n\[Exeunt", play.text)
    assert len(couplets) == play.text.count("[Exeunt.]")
    assert all(any({a, b} <= words for words in rhymes) and a != b for a, b in couplets)
