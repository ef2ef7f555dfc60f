"""Which operation is meant: from the command line, from a file, or from the record of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from agents.cli.parsing import Refusal, read_json, refusing, run_settings
from avatarl_env.files import parse_json, read_regular
from avatarl_env.surgery import SurgicalTheater, find_targets, make_operator

DEFAULT_OPERATOR = "head_gain"
_PREFIXES = ("", "surgeon/", "commit/")  # of the names in a run's metrics.jsonl

MOST_BYTES = 2**32  # of a run's metrics; more is no run's, or a device that never ends


class Operation(NamedTuple):
    """What is done to a model."""

    operator: str
    """Its name."""
    options: Mapping[str, Any]
    """Keyword arguments of the operator."""
    coefficients: Sequence[float]
    """(A,)."""
    layers: Sequence[int | str] | None = None
    """Attention layers that it acts on; None: all."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Operate on a model while the body runs.

        Raises:
            Refusal: if there is no such operator for the model, or the coefficients are not finite
                or not as many as it has.
        """
        with refusing(ValueError, TypeError):
            targets = find_targets(model, self.layers)
            operator = make_operator(self.operator, targets, **self.options)
        n_given, labels = len(self.coefficients), operator.labels
        if n_given != len(labels):
            raise Refusal(
                f"coefficients must be {len(labels)} numbers for {self.operator} on this model "
                f"({labels[0]}, ...), got {n_given}"
            )
        with SurgicalTheater(model, [operator]) as theater:
            with refusing(ValueError):
                operator.apply(theater, self.coefficients)
            yield


def read_operation(path: Path, operator: str | None = None) -> Operation:
    """Read an operation from a file.

    Args:
        path: a JSON object with `coefficients` and, if need be, `operator`,
            `operator_options` and `layers`; or a run's `summary.json`, for the operation that
            was last judged; or its `metrics.jsonl`, for the last one.
        operator: name of the operator, where the file has none; default that of the run that the
            file lies in.

    Raises:
        Refusal: if there is no operation in the file.
    """
    records = read_json_lines(path) if path.suffix == ".jsonl" else _candidates(read_json(path))
    found = next((o for o in map(_as_operation, reversed(records)) if o is not None), None)
    if found is None:
        raise Refusal(f"file {str(path)!r} must hold coefficients, a list of numbers; got none")
    record, coefficients = found
    if any(record.get(f"{prefix}kept") is True for prefix in _PREFIXES):
        warnings.warn(
            "this operation was kept, so it is in its run's weights already; what follows is "
            "written with it performed once more",
            stacklevel=2,
        )
    settings = run_settings(path.parent) or {}
    name = record.get("operator") or operator or settings.get("operator") or DEFAULT_OPERATOR
    options = record.get("operator_options") or {}
    if not isinstance(options, dict):
        raise Refusal(f"operator_options must be an object in {str(path)!r}, got {options!r}")
    layers = record.get("layers") or settings.get("layers")
    if layers is not None and not isinstance(layers, list):
        raise Refusal(f"layers must be a list in {str(path)!r}, got {layers!r}")
    return Operation(str(name), options, coefficients, layers)


def read_json_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value a line; a last line that was cut short is left out.

    Raises:
        Refusal: if there is no such file, or another line is no JSON.
    """
    try:
        content = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise Refusal(f"file {str(path)!r} must be readable: {error.strerror}") from error
    except ValueError as error:
        raise Refusal(f"file {str(path)!r} cannot be read: {error}") from error
    lines = content.split(b"\n")  # a text in a line may hold other separators
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            if number < len(lines):
                raise Refusal(f"file {str(path)!r} must hold JSON in line {number}") from error
    return values


def _candidates(content: Any) -> list[Any]:
    """Return the objects that may be the operation: a run's commits, or the file as a whole."""
    commits = content.get("commits") if isinstance(content, dict) else None
    judged = commits.get("operations") if isinstance(commits, dict) else None
    return list(judged) if isinstance(judged, list) else [content]


def _as_operation(record: Any) -> tuple[dict[str, Any], list[float]] | None:
    """Return a record with its coefficients, or None if it has none."""
    if not isinstance(record, dict):
        return None
    for prefix in _PREFIXES:
        values = record.get(f"{prefix}coefficients")
        if isinstance(values, list) and values and all(map(_is_number, values)):
            return record, [float(value) for value in values]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
