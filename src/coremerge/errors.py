"""Every refusal is one of these.

::

    CoremergeError
    ├── InputError              something that was handed in cannot be used
    │   ├── SourceError         a file, folder or hub id cannot be found or read
    │   ├── ConfigError         a config, recipe or option has a wrong key or value
    │   ├── UnsupportedError    a well-formed adapter whose update cannot be merged exactly
    │   ├── TensorError         missing, misshapen or non-finite numbers
    │   └── MismatchError       adapters (or an adapter and a base) that do not fit together
    ├── OutputError             the result cannot be written
    └── MissingExtraError       an optional dependency is not installed
"""

from __future__ import annotations

import json
from typing import Any

from coremerge.text import redacted, visible

_UNSET: Any = object()


class CoremergeError(Exception):
    """A refusal that names the file, the key, the value and the remedy.

    Its message is one line that can be printed: what a terminal would obey is spelt out, and secrets are left out.

    Args:
        what: what is wrong, as a sentence without its full stop.
        file: the file or folder it is about.
        key: the key or tensor within that file.
        value: the value found there (omit when there is none to show).
        remedy: what the person can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        key: str | None = None,
        value: object = _UNSET,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.key = key
        self.value = None if value is _UNSET else value
        self._has_value = value is not _UNSET
        self.remedy = remedy
        where = [part for part in (self.file, _key_value(key, value)) if part]
        message = ": ".join([*where, what])
        super().__init__(visible(redacted(f"{message}. {remedy}" if remedy else message)))

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process raised is raised here as it was."""
        told = {"file": self.file, "key": self.key, "remedy": self.remedy}
        return _again, (type(self), self.what, told | ({"value": self.value} if self._has_value else {}))


def _again(kind: type[CoremergeError], what: str, told: dict[str, Any]) -> CoremergeError:
    return kind(what, **told)


def _key_value(key: str | None, value: object) -> str | None:
    if value is _UNSET:
        return key
    try:
        shown = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that JSON does not know; a list that holds itself
        shown = repr(value)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    return f"{key} = {shown}" if key else shown


class InputError(CoremergeError):
    """Something that was handed in cannot be used."""


class SourceError(InputError):
    """A file, folder or hub id cannot be found or read."""


class ConfigError(InputError):
    """A config, recipe or option has a wrong key or value."""


class UnsupportedError(InputError):
    """A well-formed adapter whose update cannot be merged exactly."""


class TensorError(InputError):
    """Missing, misshapen or non-finite numbers."""


class MismatchError(InputError):
    """Adapters (or an adapter and a base) that do not fit together."""


class OutputError(CoremergeError):
    """The result cannot be written."""


class MissingExtraError(CoremergeError):
    """An optional dependency is not installed."""
