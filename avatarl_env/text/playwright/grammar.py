"""Weighted grammars: text drawn rule by rule, and the surprisal of every draw.

Rules have the form `symbol = alternatives`; continuation lines are indented. The alternatives are
single words, or, if the right side has a `|` or a brace, the patterns between the bars: text with
symbols in braces and `/` for a line break, optionally preceded by a weight (default 1). Two
prefixes change the word that a symbol gives: `{^X}` capitalises it, `{a:X}` puts the indefinite
article before it.

A rule `context symbol = ...` applies only after `Voice.enter` was called with the context. If the
symbol also has a rule without a context, the alternatives of the context are added to it with a
greater weight.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import exp, log, log1p
from typing import Final, NamedTuple, TypeAlias, TypeVar

_CONTEXT_WEIGHT = 4
"""Frequency of a word of the context, relative to a word of all contexts."""
_OPEN_CLASS_SIZE = 20
"""A symbol with at least this many words never repeats one of its last two."""


class Pattern(NamedTuple):
    """Text with symbols in it."""

    head: str
    """The text before the first symbol."""
    rest: tuple[tuple[str, str], ...]
    """Each symbol with the text that follows it."""


Item: TypeAlias = str | Pattern
Table: TypeAlias = tuple[tuple[Item, float], ...]
"""Items with `-log p`, nats; a uniform draw of an entry gives each item with its `p`."""

_Choice = TypeVar("_Choice")
_NONE_RECENT: Final = ("", 0.0, "", 0.0)


def make_table(items: Sequence[Item]) -> Table:
    """Return a table in which the probability of an item is its frequency in `items`."""
    counts = Counter(items)
    return tuple((item, log(len(items) / counts[item])) for item in items)


def read_rules(text: str) -> dict[str, list[Item]]:
    """Parse rules; map each symbol, or `context symbol`, to its alternatives.

    An alternative is repeated by its weight.
    """
    rules: dict[str, list[Item]] = {}
    for rule in re.split(r"\n(?! )", text.strip()):
        symbol, _, right = " ".join(rule.split()).partition(" = ")
        alternatives = right.split(" | ") if "|" in right or "{" in right else right.split()
        rules[symbol] = [item for text in alternatives for item in _read_alternative(text)]
    return rules


def _read_alternative(text: str) -> list[Item]:
    """Parse a word or pattern; repeat it by its weight."""
    number, space, rest = text.partition(" ")
    weight, text = (int(number), rest) if space and number.isdigit() else (1, text)
    head, *pieces = re.split(r"\{([^}]+)\}", text.replace("/", "\n"))
    if not pieces:
        return [head] * weight
    return [Pattern(head, tuple(zip(pieces[::2], pieces[1::2], strict=True)))] * weight


class Grammar:
    """Tables for all symbols of a set of rules, by context.

    Args:
        common: rules that apply in every context.
        local: rules of single contexts; the keys are `context symbol`.

    Attributes:
        contexts: the tables of each context by symbol; those that always apply are under `""`.
        open_class: symbols with enough words to avoid repeating one soon.
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
    """Return the tables of words for each prefix that a symbol may have."""
    words = {s: t for s, t in tables.items() if all(isinstance(item, str) for item, _ in t)}
    return {
        prefix + symbol: tuple((change(str(item)), nats) for item, nats in table)
        for symbol, table in words.items()
        for prefix, change in (("^", capitalised), ("a:", with_article))
    }


def capitalised(word: str) -> str:
    """Return `word` with a capital first letter."""
    return word[:1].upper() + word[1:]


def with_article(word: str) -> str:
    """Return `word` after `a` or `an`, chosen by sound."""
    vowel = (word[0] in "aeiou" and not word.startswith("use")) or word.startswith("honest")
    return f"{'an' if vowel else 'a'} {word}"


class Voice:
    """Draws texts from a grammar.

    Args:
        grammar: the rules.
        seed: of the draws, at least 0. They use `random.Random.random` alone, which returns the
            same numbers in every version of Python.

    Attributes:
        nats: sum of `-log p` of all draws so far.
        last_word: for each symbol its last word.
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
        """Draw one of `items` uniformly; repeated items are more probable."""
        item = items[int(self._random() * len(items))]
        self.nats += log(len(items) / items.count(item))
        return item

    def enter(self, *contexts: str) -> None:
        """Apply the rules of some contexts, replacing other rules for the same symbols."""
        for context in contexts:
            self._tables.update(self._contexts[context])

    def define(self, **words: str) -> None:
        """Give each symbol a single word."""
        for symbol, word in words.items():
            self._tables[symbol] = ((word, 0.0),)
            self._tables[f"^{symbol}"] = ((capitalised(word), 0.0),)

    def define_with(self, symbol: str, consequences: Mapping[str, Mapping[str, str]]) -> None:
        """Give `symbol` several words, each of which defines other symbols.

        Args:
            symbol: the symbol.
            consequences: for each word the arguments of `define` when it is drawn.
        """
        self._consequences[symbol] = consequences
        self._tables[symbol] = make_table(list(consequences))

    def write(self, symbol: str) -> str:
        """Draw a text for `symbol`."""
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
        """Draw again until `word` is not one of the last two; return it with its surprisal.

        Given that, a word of probability p has probability p / (1 - p_1 - p_2).
        """
        table = self._tables[symbol]
        first, p_first, second, p_second = self._recent.get(symbol, _NONE_RECENT)
        while word in (first, second):
            item, nats = table[int(self._random() * len(table))]
            word = str(item)
        self._recent[symbol] = (word, exp(-nats), first, p_first)
        return word, nats + log1p(-p_first - p_second)
