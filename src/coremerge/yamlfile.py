"""YAML from people: plain values only, and no more of them than a file can be meant to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from coremerge.errors import ConfigError, SourceError

LARGEST_FILE = 64 * 2**20
"""Bytes: far more than weights for each rank component of a hundred adapters."""

MOST_VALUES = 2_000_000
"""Of a file once its aliases are written out, which a few lines of them would make billions."""

DEEPEST = 50
"""Lists and mappings in one another: a recipe has four."""

LONGEST_NUMBER = 400
"""Characters: float64 needs 330, and Python takes the square of their number to read them."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Safe (no tag makes Python objects), bounded, and a key that is there twice is an error: one would be lost."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) not in self._checked:  # once, before "<<" brings in keys that may be said again
            self._checked.add(id(node))
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        super().flatten_mapping(node)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._count
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias:
            self._count += self._sizes.get(id(node), MOST_VALUES)  # not known yet: it holds itself
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - before
        if self._count > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, aliases written out")
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters")
        return node


def parse_yaml(text: str) -> Any:
    """The plain values of ``text``.

    Raises:
        ValueError: it is no YAML, has tags that stand for objects, or more in it than a file can be meant to hold.
    """
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML raises what its constructors met: a month of 99, !!bool x
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path, *, remedy: str | None = None) -> Any:
    """The plain values of a file.

    Args:
        path: the file.
        remedy: where there is none.

    Raises:
        SourceError: it cannot be read.
        ConfigError: it is no YAML, or absurd.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"larger than {LARGEST_FILE >> 20} MB", file=path, remedy="Give the file that was meant")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", file=path, remedy=remedy) from None
    except ValueError as error:
        raise ConfigError(f"not YAML: {error}", file=path, remedy="Save it as UTF-8") from None
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"not YAML: {error}", file=path) from None


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a file.

    Args:
        path: of the file.
        what: it is, for the message: ``"a recipe"``.

    Raises:
        SourceError: it cannot be read.
        ConfigError: it is no YAML, absurd, or no mapping.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{what} is a mapping of keys to values", file=path, value=data)
    return {str(key): value for key, value in data.items()}


def refusal(error: ValidationError, path: Path) -> ConfigError:
    """What pydantic found wrong, as a refusal that names the file and the key."""
    detail = error.errors()[0]
    missing = detail["type"] == "missing"
    found: dict[str, Any] = {} if missing else {"value": detail["input"]}
    place = detail["loc"][:-2] if detail["loc"][-1:] == ("[key]",) else detail["loc"]  # the key is the value then
    return ConfigError(
        detail["msg"].removeprefix("Value error, "),
        file=path,
        key=".".join(map(str, place)),
        remedy="Add the key" if missing else "Remove or correct it",
        **found,
    )
