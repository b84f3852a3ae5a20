"""Libraries that only some inputs need."""

from __future__ import annotations

import importlib
from typing import Any

from coremerge.errors import MissingExtraError
from coremerge.installing import install


def optional(module: str, needing: str = "such inputs need", extra: str = "learn") -> Any:
    """A module of an optional dependency, what is ``needing`` it, and the ``extra`` of this package that brings it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        name = "pillow" if module.startswith("PIL") else module
        raise MissingExtraError(f"{needing} {name}", remedy=install(extra)) from None


def first_line(error: Exception) -> str:
    """Of what it says, without its full stop."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
