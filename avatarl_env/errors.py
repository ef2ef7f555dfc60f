"""Checks of arguments: a refusal names the argument, the rule, the value and the closest match.

Every bad argument raises a ValueError, even one of the wrong type.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

INTEGER_LIMIT = 2**53
"""Default limit of integers: floats represent them exactly up to here."""
NUMBER_LIMIT = 1e6
"""Default limit of numbers, such as weights: sums of them stay far from overflow."""
MAX_LAYERS = 10_000
"""Largest number of entries of `layers`."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


class UnknownKeyword(ValueError, TypeError):
    """A keyword that a function or a class does not have.

    Also a TypeError with Python's "unexpected keyword argument": TorchRL, given an environment's
    name, tries a keyword and catches that.
    """


def shown(value: object) -> str:
    """Return a value's repr, on one line and cut short."""
    return " ".join(_REPR.repr(value).split())


def closest(value: str, choices: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the choice most like `value`, or ""."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def takes_any_keyword(maker: Callable[..., object]) -> bool:
    """Return whether a function or a class takes `**keywords`."""
    parameters = inspect.signature(maker).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def check_keywords(argument: str, given: Iterable[str], *makers: Callable[..., object]) -> None:
    """Raise an `UnknownKeyword` unless one of `makers` takes each keyword.

    Args:
        argument: name of the keywords in the message.
        given: the keywords.
        *makers: functions or classes that take them.
    """
    parameters = [p for maker in makers for p in inspect.signature(maker).parameters.values()]
    known = sorted({parameter.name for parameter in parameters if parameter.kind in _NAMED})
    for name in given:
        if name not in known:
            raise UnknownKeyword(
                f"{argument} must be one of {known}, "
                f"got an unexpected keyword argument {name!r}{closest(name, known)}"
            )


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of `choices`; the message offers the closest."""
    known = sorted(choices)
    if not isinstance(value, str) or value not in known:
        hint = closest(str(value)[:100], known)
        raise ValueError(f"{argument} must be one of {known}, got {shown(value)}{hint}")


def check_integer(argument: str, value: Any, least: int = 0, most: float = INTEGER_LIMIT) -> int:
    """Return `value` as an int, or raise a ValueError; a bool is not an integer here."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(f"{argument} must be an integer of at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{argument} must be at most {most}, got {shown(value)}")
    return int(value)


def check_number(
    argument: str, value: Any, least: float = -NUMBER_LIMIT, most: float = NUMBER_LIMIT
) -> float:
    """Return `value` as a float, or raise a ValueError; a bool is not a number here."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(_float(value)):
        raise ValueError(f"{argument} must be a finite number, got {shown(value)}")
    if not least <= float(value) <= most:
        raise ValueError(f"{argument} must be in [{least:g}, {most:g}], got {shown(value)}")
    return float(value)


def check_bool(argument: str, value: Any) -> bool:
    """Return `value` as a bool, or raise a ValueError."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{argument} must be True or False, got {shown(value)}")
    return bool(value)


def check_text(argument: str, value: Any) -> str:
    """Return a non-empty string or path as a string, or raise a ValueError."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError(f"{argument} must be a string that is not empty, got {shown(value)}")
    return text


def check_mapping(argument: str, value: Any) -> dict[str, Any]:
    """Return a mapping with strings as keys as a dict, or raise a ValueError."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{argument} must be a dict with names as keys, got {shown(value)}")
    return dict(value)


def check_layers(layers: Any) -> tuple[int | str, ...]:
    """Return a selection of attention layers as a tuple, for `find_targets`.

    Args:
        layers: a number, a name or a glob; or several in a list, tuple, set, range or array.

    Raises:
        ValueError: if it is anything else, or there are none or more than `MAX_LAYERS`.
    """
    given = layers.tolist() if isinstance(layers, np.ndarray) else layers
    entries = [given] if isinstance(given, Integral | str) else given
    if not isinstance(entries, list | tuple | set | frozenset | range):
        raise ValueError(f"layers must be numbers, names or globs in a list, got {shown(layers)}")
    found: list[int | str] = []
    for entry in itertools.islice(entries, MAX_LAYERS + 1):  # a range has no len() above 2^63
        is_number = isinstance(entry, Integral) and not isinstance(entry, bool)
        if not is_number and not isinstance(entry, str):
            raise ValueError(f"layers must be numbers, names or globs, got {shown(entry)}")
        found.append(int(entry) if is_number else entry)
    if not 1 <= len(found) <= MAX_LAYERS:
        raise ValueError(f"layers must have 1 to {MAX_LAYERS} entries, got {shown(layers)}")
    return tuple(found)


def check_seed(argument: str, value: Any) -> int | None:
    """Return a seed as an int of any size, or None; or raise a ValueError."""
    return None if value is None else check_integer(argument, value, most=math.inf)


def check_seeds(argument: str, value: Any, n: int) -> list[int | None]:
    """Return one seed for each of n rows, `value + row` for an integer; or raise a ValueError."""
    if not isinstance(value, list | tuple | np.ndarray):
        first = check_seed(argument, value)
        return [None if first is None else first + row for row in range(n)]
    seeds = [check_seed(argument, seed) for seed in value]
    if len(seeds) != n:
        raise ValueError(f"{argument} must have one entry for each of {n} rows, got {shown(value)}")
    return seeds


def check_mask(argument: str, value: Any, n: int) -> NDArray[np.bool_]:
    """Return a mask of n rows, all True for None; or raise a ValueError."""
    if value is None:
        return np.ones(n, dtype=np.bool_)
    rule = f"{argument} must be ({n},) of bool with at least one True, got {shown(value)}"
    try:
        rows = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(rule) from error
    if rows.shape != (n,) or rows.dtype != np.bool_ or not rows.any():
        raise ValueError(rule)
    return rows


def check_options(options: Any, known: Collection[str]) -> dict[str, Any]:
    """Return the options of a `reset`, {} for None; raise a ValueError for unknown keys."""
    given = {} if options is None else check_mapping("options", options)
    for name in given:
        if name not in known:
            rule = f"have no keys but {sorted(known)}" if known else "have no keys"
            raise ValueError(f"options must {rule}, got {name!r}{closest(name, known)}")
    return given


def as_numbers(argument: str, value: Any) -> NDArray[np.float64]:
    """Return a number, numbers in lists, an array or a tensor as a float64 array.

    A tensor may be on another device, in half precision, or require a gradient.

    Raises:
        ValueError: if it is anything else; booleans, strings and None are not numbers.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value
        numbers = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{argument} must be numbers, got {shown(value)}: {reason}") from error
    if numbers.dtype.kind not in "fiu":
        raise ValueError(f"{argument} must be numbers, got {shown(value)}")
    with np.errstate(over="ignore"):  # larger numbers become infinite
        return numbers.astype(np.float64)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (OverflowError, ValueError):
        return math.inf
