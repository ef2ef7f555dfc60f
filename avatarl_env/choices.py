"""One way to refuse an unknown name or keyword, and to say which was probably meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable

_NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``; it names the closest."""
    known = sorted(choices)
    if value not in known:
        hint = closest(str(value), known)
        raise ValueError(f"{argument} must be one of {known}, got {value!r}{hint}")


def closest(value: str, choices: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" with the choice that is like ``value``, or nothing."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


class UnknownKeyword(ValueError, TypeError):
    """A keyword that a function or a class does not have.

    Also a TypeError that says "unexpected keyword argument", as Python's own does, since code that
    tries a keyword and can do without (TorchRL, given an environment's name) goes by that.
    """


def keywords_of(maker: Callable[..., object]) -> list[str]:
    """Return the names that a function or a class takes as keywords, ``**more`` left out."""
    parameters = inspect.signature(maker).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in _NAMED]


def takes_any_keyword(maker: Callable[..., object]) -> bool:
    """Whether a function or a class takes ``**more``."""
    parameters = inspect.signature(maker).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def check_keywords(argument: str, given: Iterable[str], *makers: Callable[..., object]) -> None:
    """Raise an :class:`UnknownKeyword` unless one of ``makers`` takes each keyword.

    Args:
        argument: what the keywords are called in the message.
        given: their names.
        *makers: functions or classes.
    """
    known = sorted({name for maker in makers for name in keywords_of(maker)})
    for name in given:
        if name not in known:
            raise UnknownKeyword(
                f"{argument} must be one of {known}, "
                f"got an unexpected keyword argument {name!r}{closest(name, known)}"
            )
