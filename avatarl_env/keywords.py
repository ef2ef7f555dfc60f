"""Misspelt keywords are refused as unknown names are: by name, with the closest one there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

from avatarl_env.choices import closest

_NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


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
