"""Libraries that only an extra of the package brings."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """Import a library.

    Args:
        module: its name.
        extra: of this package, that brings it.
        user: who needs it, for the message.

    Raises:
        ImportError: if it is not installed; says which extra has it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # something that the library needs itself
            raise
        raise ImportError(f"{user} needs {module}: pip install 'avatarl-env[{extra}]'") from error
