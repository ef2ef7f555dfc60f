"""Weighted grammars: text drawn rule by rule, and the surprisal of every draw.

A text of rules has one rule `symbol = alternatives` after the other; further lines of a rule are
indented. The alternatives are single words, or, where a `|` or a brace is among them, the
patterns between the bars: text with symbols in braces and `/` for a line break, after a number
that is its weight (1 if absent). Two prefixes change the word that a symbol gives: `{^X}` begins
with a capital, `{a:X}` has the indefinite article before it.

A rule `context symbol = ...` holds only after `Voice.enter` was called with the context. Where
the symbol has a rule of its own as well, the context adds to it, with a greater weight.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log, log1p
from typing import Final, NamedTuple, TypeAlias, TypeVar

_CONTEXT_WEIGHT = 4
"""How much more frequent a word of the context is than one that may come in every context."""

_OPEN_CLASS_SIZE = 20
"""A symbol of at least this many words does not give one of its last two words again."""


class Pattern(NamedTuple):
    """Text with symbols in it.

    Attributes:
        head: What precedes the first symbol.
        rest: Each symbol with the text that follows it.
    """

    head: str
    rest: tuple[tuple[str, str], ...]


Item: TypeAlias = str | Pattern
Table: TypeAlias = tuple[tuple[Item, float], ...]
"""Items with `-log p`, nats; a uniform draw of an entry gives each item with its `p`."""

_Choice = TypeVar("_Choice")
_NONE_RECENT: Final = ("", 0.0, "", 0.0)


def make_table(items: Sequence[Item]) -> Table:
    """Make a table in which every item is as probable as it is frequent in `items`."""
    counts = Counter(items)
    return tuple((item, log(len(items) / counts[item])) for item in items)


def read_rules(text: str) -> dict[str, list[Item]]:
    """Read a text of rules.

    Returns:
        For each symbol, after its context if it has one, its alternatives. An alternative is
        repeated as often as its weight says.
    """
    rules: dict[str, list[Item]] = {}
    for rule in re.split(r"\n(?! )", text.strip()):
        symbol, _, right = " ".join(rule.split()).partition(" = ")
        alternatives = right.split(" | ") if "|" in right or "{" in right else right.split()
        rules[symbol] = [item for text in alternatives for item in _read_alternative(text)]
    return rules


def _read_alternative(text: str) -> list[Item]:
    """Read a word or pattern; repeat it as often as its weight says."""
    number, space, rest = text.partition(" ")
    weight, text = (int(number), rest) if space and number.isdigit() else (1, text)
    head, *pieces = re.split(r"\{([^}]+)\}", text.replace("/", "\n"))
    if not pieces:
        return [head] * weight
    return [Pattern(head, tuple(zip(pieces[::2], pieces[1::2], strict=True)))] * weight


class Grammar:
    """Tables for all symbols of a set of rules, context by context.

    Args:
        common: Rules that hold in every context.
        local: Rules of single contexts; the keys are `context symbol`.

    Attributes:
        contexts: The tables of each context by symbol; those that always hold are under `""`.
        open_class: Symbols with so many words that none need be repeated soon.
    """

    def __init__(
        self, common: Mapping[str, Sequence[Item]], local: Mapping[str, Sequence[Item]]
    ) -> None:
        tables: dict[str, dict[str, Table]] = {"": {s: make_table(i) for s, i in common.items()}}
        for key, items in local.items():
            context, symbol = key.split(" ")
            shared = list(common.get(symbol, ()))
            weight = _CONTEXT_WEIGHT if shared else 1
            own = tables.setdefault(context, {})
            own[symbol] = make_table(shared + list(items) * weight)
        self.contexts: dict[str, dict[str, Table]] = {
            context: own | _variants(own) for context, own in tables.items()
        }
        self.open_class: frozenset[str] = frozenset(
            symbol
            for symbol, table in self.contexts[""].items()
            if len({item for item, _ in table if isinstance(item, str)}) >= _OPEN_CLASS_SIZE
        )


def _variants(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Return the tables of words once more, for each prefix that a symbol may have."""
    words = {s: t for s, t in tables.items() if all(isinstance(item, str) for item, _ in t)}
    return {
        prefix + symbol: tuple((change(str(item)), nats) for item, nats in table)
        for symbol, table in words.items()
        for prefix, change in (("^", capitalised), ("a:", with_article))
    }


def capitalised(word: str) -> str:
    """Return `word` with a capital at its beginning."""
    return word[:1].upper() + word[1:]


def with_article(word: str) -> str:
    """Return `word` after `a` or `an`, as it sounds."""
    vowel = (word[0] in "aeiou" and not word.startswith("use")) or word.startswith("honest")
    return f"{'an' if vowel else 'a'} {word}"


class Voice:
    """Draws texts from a grammar.

    Args:
        grammar: Where the rules are from.
        seed: Of the draws, at least 0. They are made with `random.Random.random` alone, which
            gives the same numbers in every version of Python.

    Attributes:
        nats: `-log p` of all draws so far, added up.
        last_word: For each symbol the last word that it gave.
    """

    def __init__(self, grammar: Grammar, seed: int) -> None:
        self.nats: float = 0.0
        self.last_word: dict[str, str] = {}
        self._random = random.Random(seed).random
        self._contexts = grammar.contexts
        self._open_class = grammar.open_class
        self._tables: dict[str, Table] = dict(grammar.contexts[""])
        self._recent: dict[str, tuple[str, float, str, float]] = {}
        self._consequences: dict[str, Mapping[str, Mapping[str, str]]] = {}
        self._pieces: list[str] = []

    def choose(self, items: Sequence[_Choice]) -> _Choice:
        """Draw one of `items`; what is listed twice is twice as probable."""
        item = items[int(self._random() * len(items))]
        self.nats += log(len(items) / items.count(item))
        return item

    def enter(self, *contexts: str) -> None:
        """Let the rules of some contexts hold, in place of other rules for the same symbols."""
        for context in contexts:
            self._tables.update(self._contexts[context])

    def define(self, **words: str) -> None:
        """Let each symbol stand for one word."""
        for symbol, word in words.items():
            self._tables[symbol] = ((word, 0.0),)
            self._tables[f"^{symbol}"] = ((capitalised(word), 0.0),)

    def define_with(self, symbol: str, consequences: Mapping[str, Mapping[str, str]]) -> None:
        """Let `symbol` stand for any of some words that give other symbols their meaning.

        Args:
            symbol: The symbol.
            consequences: For each word what `define` is called with when it is drawn.
        """
        self._consequences[symbol] = consequences
        self._tables[symbol] = make_table(list(consequences))

    def write(self, symbol: str) -> str:
        """Draw a text that `symbol` stands for."""
        self._pieces.clear()
        self._recent.clear()
        self._expand(symbol)
        return "".join(self._pieces)

    def _expand(self, symbol: str) -> None:
        table = self._tables[symbol]
        item, nats = table[int(self._random() * len(table))]
        if isinstance(item, str):
            if symbol in self._open_class:
                item, nats = self._fresh(symbol, item, nats)
            self.nats += nats
            self.last_word[symbol] = item
            self._pieces.append(item)
            if symbol in self._consequences:
                self.define(**self._consequences[symbol][item])
            return
        self.nats += nats
        self._pieces.append(item.head)
        for part, text in item.rest:
            self._expand(part)
            self._pieces.append(text)

    def _fresh(self, symbol: str, word: str, nats: float) -> tuple[str, float]:
        """Draw again until `word` is none of the last two; return it with its surprisal.

        Given that it is neither of them, a word of probability p has p / (1 - p_1 - p_2).
        """
        table = self._tables[symbol]
        first, p_first, second, p_second = self._recent.get(symbol, _NONE_RECENT)
        while word in (first, second):
            item, nats = table[int(self._random() * len(table))]
            word = str(item)
        self._recent[symbol] = (word, exp(-nats), first, p_first)
        return word, nats + log1p(-p_first - p_second)
