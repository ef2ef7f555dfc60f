"""Writes a play with a seeded grammar.

`write_play` needs no file and no network, and returns the same text on every machine. The play
imitates early modern English: acts and scenes, verse of about ten syllables, prose for the clowns,
a rhyme at the end of a scene. Some rules span hundreds or thousands of characters, so there is more
to learn than spelling:

- only characters on stage speak or are addressed; they come with `Enter` and leave with `Exit`;
- characters who are mentioned are not on stage, and their pronoun is right; a letter is signed by
  its sender;
- "thou" is used towards a lower rank, and among commoners, "you" otherwise; forms of address follow
  rank and sex;
- the place sets the topic of a scene: its nouns prevail, and one of them recurs;
- a reply often repeats the last noun of the speech before it;
- each character has a temperament with its own adjectives, oaths and sentences.

Every choice is drawn from a finite table with known probabilities, so the entropy of the text is
known too; see `Play.nats_per_char`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import count
from typing import Final, NamedTuple

from avatarl_env.text.playwright import lexicon, phrases
from avatarl_env.text.playwright.grammar import (
    Grammar,
    Item,
    Voice,
    capitalised,
    read_rules,
    with_article,
)

_LINE_WIDTH: Final = 64
"""Longest line of prose, characters."""
_MIN_BEATS: Final = 8
"""Least number of speeches and entrances before a scene may end."""

_MAX_ON_STAGE: Final = 5
_TURNS: Final = (True, False, False, False, False, False)
"""Whether the speaker addresses someone other than the last speaker."""
_NUMERALS: Final = ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


@dataclass(frozen=True)
class Play:
    """A text and its entropy."""

    text: str = field(repr=False)
    """The play, in ASCII; it ends with a whole speech, direction or heading."""
    nats_per_char: float
    """Sum of `-log p(choice)` over all random choices, divided by the length of `text`.

    This is `-log p` of the derivation of the text, nats per character, and over a long text an
    estimate of the grammar's entropy rate, which no predictor can beat in the long run. It is an
    upper bound where several derivations give the same text; the grammar is nearly unambiguous, so
    the bound is tight."""


class _Role(NamedTuple):
    """A character of the play; the fields are those of `lexicon.CAST`."""

    name: str
    title: str
    rank: int
    sex: str
    humour: str

    @property
    def mention(self) -> str:
        """The name, preceded by the title if there is one."""
        return f"{self.title} {self.name}".strip()


@lru_cache(maxsize=2)  # every environment in a process reads the same play
def write_play(seed: int = 0, n_chars: int = 1_000_000) -> Play:
    """Write a play.

    The text is a sequence of blocks (headings, stage directions, speeches) and ends with the block
    that reaches `n_chars`. It is a prefix of every longer play with the same seed.

    Args:
        seed: selects the play, at least 0.
        n_chars: least length, characters, at least 1; exceeded by less than one block.

    Raises:
        ValueError: if an argument is out of range.
    """
    if n_chars < 1:
        raise ValueError(f"n_chars must be at least 1, got {n_chars}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    writer = _Writer(Voice(_grammar(), seed))
    blocks: list[str] = []
    length = 0
    for block in writer.blocks():
        blocks.append(block)
        length += len(block)
        if length >= n_chars:
            break
    return Play("".join(blocks), writer.voice.nats / length)


class _Writer:
    """Keeps track of who is on stage; `voice` makes all random choices."""

    def __init__(self, voice: Voice) -> None:
        self.voice: Voice = voice
        self._cast: tuple[_Role, ...] = _roles()
        self._stage: list[_Role] = []
        self._last: _Role | None = None  # who spoke last
        self._heard: _Role | None = None  # who spoke last so that others heard it
        self._called: _Role | None = None  # who is expected to speak next
        self._noun: str = ""  # the last noun heard, which a reply may take up

    def blocks(self) -> Iterator[str]:
        """Yield headings, stage directions and speeches without end."""
        for part in count(1):
            yield f"PART {_roman(part)}. {self.voice.write('TITLE').upper()}\n\n"
            for act in range(1, 6):
                yield f"ACT {_roman(act)}\n\n"
                for scene in range(1, self.voice.choose((3, 4, 5, 6)) + 1):
                    yield from self._scene(scene)

    def _scene(self, number: int) -> Iterator[str]:
        """Yield the blocks of a scene, from its heading until all have left."""
        voice = self.voice
        voice.enter(voice.choose(_field_names()))
        yield f"SCENE {_roman(number)}. {capitalised(with_article(voice.write('PLACE')))}.\n\n"
        self._noun = voice.write("N1")
        voice.define(THEME=self._noun)
        self._stage.clear()
        self._last = self._heard = self._called = None
        entering = [self._admit(voice.choose(self._cast))]
        for _ in range(voice.choose((0, 1, 1, 1, 2, 2, 3))):
            entering.append(self._admit(voice.choose(self._absent())))
        yield _direction("Enter", entering)
        for n_beats in count():
            beat = voice.choose(self._possible_beats(n_beats))
            yield from self._play(beat)
            if beat == "end":
                return

    def _possible_beats(self, n_beats: int) -> tuple[str, ...]:
        """List what may happen next, each repeated by its weight."""
        if n_beats == 0:
            return ("speak",)
        present = len(self._stage)
        if present == 1 and self._last in self._stage:
            return ("enter",)
        if self._heard not in self._stage:
            return ("speak",)
        return _beats(present, n_beats >= _MIN_BEATS)

    def _play(self, beat: str) -> Iterator[str]:
        """Yield a speech, an entrance, or both."""
        if beat == "enter":
            newcomer = self.voice.choose(self._absent())
            self._called = self._admit(newcomer)
            yield _direction("Enter", [newcomer])
            return
        if beat == "announce":
            newcomer = self.voice.choose(self._absent())
            self.voice.define(NEW=newcomer.mention)
        speaker = self._pick_speaker()
        yield self._speech(speaker, beat)
        if beat == "announce":
            self._called = self._admit(newcomer)
            yield _direction("Enter", [newcomer])
        elif beat == "leave":
            self._stage.remove(speaker)
            self._offer_absent()
            yield _direction("Exit", [speaker])
        elif beat == "end":
            yield "[Exeunt.]\n\n"

    def _absent(self) -> list[_Role]:
        return [role for role in self._cast if role not in self._stage]

    def _admit(self, role: _Role) -> _Role:
        """Add a character to the stage."""
        self._stage.append(role)
        self._offer_absent()
        return role

    def _offer_absent(self) -> None:
        """Allow the speakers to mention those who are not on stage."""
        absent = {role.mention: _signs(role) for role in self._absent()}
        self.voice.define_with("ABSENT", absent)

    def _pick_speaker(self) -> _Role:
        """Draw the next speaker: most often the character who was addressed."""
        able = [role for role in self._stage if role != self._last]
        if self._called in able:
            able += [self._called] * len(able)
        return self.voice.choose(able)

    def _speech(self, speaker: _Role, beat: str) -> str:
        """Write a speech."""
        voice = self.voice
        occasion, hearer = self._occasion(speaker, beat)
        if hearer is None:
            contexts = ("self", "thou")
        else:
            contexts = _manners(speaker, hearer)
            name = hearer.mention if speaker.rank < hearer.rank else hearer.name
            voice.define(NAMED=name)
        voice.enter(speaker.humour, *contexts)
        voice.define(ECHO=self._noun)
        if beat in ("end", "song"):
            self._draw_rhyme()
        if speaker.humour == "comic":
            text = _wrapped(voice.write(f"prose-{occasion}"))
        else:
            text = voice.write(f"verse-{occasion}")
        self._last = speaker
        if beat != "aside":
            self._heard, self._called = speaker, hearer
            self._noun = voice.last_word["N1"]
        return f"{speaker.name.upper()}:\n{text}\n\n"

    def _occasion(self, speaker: _Role, beat: str) -> tuple[str, _Role | None]:
        """Draw the occasion of a speech and whom it addresses."""
        others = [role for role in self._stage if role != speaker]
        if not others:
            return "alone", None
        heard = self._heard if self._heard in others else None
        if beat != "speak":
            return beat, heard or self.voice.choose(others)
        if self._heard is None:
            return "open", self.voice.choose(others)
        if heard is None or (len(others) > 1 and self.voice.choose(_TURNS)):
            return "turn", self.voice.choose([role for role in others if role != heard])
        return "reply", heard

    def _draw_rhyme(self) -> None:
        words = self.voice.choose(_rhymes())
        first = self.voice.choose(words)
        self.voice.define(RH1=first, RH2=self.voice.choose([w for w in words if w != first]))


@cache
def _grammar() -> Grammar:
    """Assemble the rules."""
    rules: dict[str, list[Item]] = {}
    for text in (lexicon.WORDS, phrases.SENTENCES, phrases.SPEECHES):
        rules |= read_rules(text)
    verbs = [verb.split("/") for verb in lexicon.VERBS.split()]
    rules["V1"] = [base for base, _ in verbs]
    rules["V1s"] = [f"{base}s" for base, _ in verbs]
    rules["VP"] = [participle for _, participle in verbs]
    rules["I1s"] = [f"{base}s" for base in rules["I1"]]
    local: dict[str, list[Item]] = {}
    for text in (lexicon.ADDRESS, lexicon.FIELDS, lexicon.HUMOURS):
        local |= read_rules(text)
    for pair in lexicon.PRONOUNS.split():
        familiar, formal = pair.split("/")
        local |= {f"thou {familiar}": [familiar], f"you {familiar}": [formal]}
    return Grammar(rules, local)


@cache
def _roles() -> tuple[_Role, ...]:
    rows = (entry.split("/") for entry in lexicon.CAST.split())
    return tuple(_Role(n, t.strip("-"), int(r), s, h) for n, t, r, s, h in rows)


@cache
def _field_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.split(" ")[0] for key in read_rules(lexicon.FIELDS)))


@cache
def _rhymes() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split()) for line in "".join(lexicon.RHYMES.splitlines()).split("/"))


@cache
def _beats(present: int, can_end: bool) -> tuple[str, ...]:
    """List what may happen in company, each repeated by its weight."""
    weights = {
        "speak": 26,
        "aside": 2 * (present > 2),
        "song": 1,
        "letter": 1,
        "leave": 1 + (present > 2),
        "announce": 2 * (present < _MAX_ON_STAGE),
        "enter": 2 * (present < _MAX_ON_STAGE),
        "end": 2 * can_end,
    }
    return tuple(beat for beat, weight in weights.items() for _ in range(weight))


def _manners(speaker: _Role, hearer: _Role) -> tuple[str, str]:
    """Return the contexts for the form of address, and for thou or you."""
    above = speaker.rank > hearer.rank
    familiar = above or speaker.rank == hearer.rank == 0
    return f"{'down' if above else 'up'}{hearer.rank}{hearer.sex}", "thou" if familiar else "you"


@cache
def _signs(role: _Role) -> dict[str, str]:
    """Return the meaning of symbols after `role` was mentioned."""
    he, his = ("he", "his") if role.sex == "m" else ("she", "her")
    return {"HE": he, "HIS": his, "SIGNED": role.name}


def _direction(verb: str, roles: Sequence[_Role]) -> str:
    """Write a stage direction."""
    *names, last = (role.name.upper() for role in roles)
    return f"[{verb} {', '.join(names)}{' and ' if names else ''}{last}.]\n\n"


def _wrapped(text: str) -> str:
    """Break long lines at spaces."""
    lines = []
    for line in text.split("\n"):
        rest = line
        while len(rest) > _LINE_WIDTH:
            cut = rest.rindex(" ", 0, _LINE_WIDTH + 1)
            lines.append(rest[:cut])
            rest = rest[cut + 1 :]
        lines.append(rest)
    return "\n".join(lines)


def _roman(number: int) -> str:
    """Write a positive number in Roman numerals."""
    text = ""
    for value, numeral in _NUMERALS:
        text += numeral * (number // value)
        number %= value
    return text
