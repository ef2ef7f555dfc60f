"""An operation on a stored model, given by coefficients or read from a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from agents.cli import Refusal
from agents.cli.parsing import read_json, refusing, run_settings
from agents.tracking.schema import read_rows
from avatarl_env.surgery import SurgicalTheater, find_targets, make_operator

DEFAULT_OPERATOR = "head_gain"
_PREFIXES = ("", "surgeon/", "commit/")  # of the names in a run's metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operator with its coefficients.

    Attributes:
        operator: name of the operator.
        coefficients: (A,).
        options: keyword arguments of the operator.
        layers: the attention layers it acts on; None for all.
    """

    operator: str
    coefficients: Sequence[float]
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[int | str] | None = None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Operate on a model while the body runs.

        Raises:
            Refusal: if the operator does not fit the model, or the coefficients are too few, too
                many or not finite.
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
        path: a JSON object with `coefficients` and optionally `operator`, `operator_options` and
            `layers`; or a run's `summary.json`, for the last operation tested for a commit; or its
            `metrics.jsonl`, for the last operation.
        operator: name of the operator if the file has none; by default that of the file's run.

    Raises:
        Refusal: if the file holds no operation.
    """
    found = next((o for o in map(_coefficients, reversed(_records(path))) if o is not None), None)
    if found is None:
        raise Refusal(f"file {str(path)!r} must hold coefficients, a list of numbers; got none")
    record, coefficients = found
    if any(record.get(f"{prefix}kept") is True for prefix in _PREFIXES):
        warnings.warn(
            "this operation was committed, so the weights of its run already contain it; it is "
            "applied a second time",
            stacklevel=2,
        )
    settings = run_settings(path.parent) or {}
    options = record.get("operator_options") or {}
    layers = record.get("layers") or settings.get("layers")
    for name, value, kind in (("operator_options", options, dict), ("layers", layers, list)):
        if value is not None and not isinstance(value, kind):
            raise Refusal(f"{name} must be a {kind.__name__} in {str(path)!r}, got {value!r}")
    name = record.get("operator") or operator or settings.get("operator") or DEFAULT_OPERATOR
    return Operation(operator=str(name), coefficients=coefficients, options=options, layers=layers)


def _records(path: Path) -> list[Any]:
    """Return the objects in a file that may be operations, oldest first."""
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise Refusal(f"file {str(path)!r} must be a run's metrics.jsonl, got no regular file")
        return [row for _, row in read_rows(path) if row is not None]
    content = read_json(path)
    commits = content.get("commits") if isinstance(content, dict) else None
    tried = commits.get("operations") if isinstance(commits, dict) else None
    return list(tried) if isinstance(tried, list) else [content]


def _coefficients(record: Any) -> tuple[dict[str, Any], list[float]] | None:
    """Return a record with its coefficients, or None if it has none."""
    if not isinstance(record, dict):
        return None
    for prefix in _PREFIXES:
        values = record.get(f"{prefix}coefficients")
        if isinstance(values, list) and values and all(type(x) in (int, float) for x in values):
            return record, [float(value) for value in values]
    return None
