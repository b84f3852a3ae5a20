"""The methods, spaces and steps there are, described from their signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from coremerge.errors import ConfigError
from coremerge.registry import Entry

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "none"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

GROUPS = {
    "when in doubt": "with --norms equal it is the default; nothing has to be set, and a small change of an adapter is"
    " a small change of the merge",
    "sums": "exactly what the adapters do, added up: a style at half strength, one adapter minus another, adapters that"
    " hardly overlap",
    "directions": "several tasks in one adapter; what they share is counted once, or kept apart from what is each one's"
    " own; space and basis do not matter",
    "entries": "as published for whole models; of each adapter's numbers some are kept and the others dropped; space"
    " and basis matter",
}
"""What methods are for: the name of a group → when to choose from it. A method says its own when it is registered."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, a space or a step.

    Attributes:
        type: in plain words.
        default: None also where it is required.
        required: whether it has no default.
        help: from the docstring.
    """

    name: str
    type: str
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class Part:
    """A method, a space or a step.

    Attributes:
        kind: "method", "space" or "step".
        help: one line.
        description: the docstring without its arguments.
        source: the paper.
        nature: what it is, in plain words.
        group: of a method: what it is for, a key of :data:`GROUPS`; None: it is no method.
    """

    name: str
    kind: str
    help: str
    description: str
    source: str
    nature: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    group: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**vars(self), "nature": list(self.nature), "parameters": [vars(p) for p in self.parameters]}


def catalog() -> list[Part]:
    """Everything that can be named in a recipe: methods, group by group, then spaces, then steps."""
    return [_part(entry) for entry in _entries()]


def find(name: str) -> Part:
    """The method, space or step of that name.

    Raises:
        ConfigError: there is none.
    """
    for entry in _entries():
        if entry.name == name:
            return _part(entry)
    known = ", ".join(entry.name for entry in _entries())
    raise ConfigError(f"there is no method, space or step {name!r}", remedy=f"Known: {known}")


def _entries() -> Iterator[Entry[Any]]:
    from coremerge.methods import METHODS
    from coremerge.spaces import SPACES
    from coremerge.steps import STEPS

    groups = [*GROUPS, *dict.fromkeys(map(_group, METHODS.entries.values()))]
    yield from sorted(METHODS.entries.values(), key=lambda entry: groups.index(_group(entry)))
    yield from SPACES.entries.values()
    yield from STEPS.entries.values()


def _group(entry: Entry[Any]) -> str:
    """As declared, or as its traits say."""
    return entry.group or ("sums" if entry.linear else "entries" if entry.elementwise else "directions")


def _part(entry: Entry[Any]) -> Part:
    description, helps = _docstring(entry.factory)
    hints = get_type_hints(entry.factory, include_extras=True)
    parameters = tuple(
        Parameter(
            name,
            type_name(hints[name]),
            None if default is inspect.Parameter.empty else default,
            default is inspect.Parameter.empty,
            helps.get(name, ""),
        )
        for name, default in entry.parameters.items()
    )
    return Part(
        entry.name,
        entry.kind,
        description.partition("\n")[0],
        description,
        entry.source,
        tuple(_nature(entry)),
        parameters,
        _group(entry) if entry.kind == "method" else None,
    )


def _nature(entry: Entry[Any]) -> Iterator[str]:
    if entry.kind != "method":
        return
    if entry.linear:
        yield "linear: a weighted sum of the updates, the same in every space"
    elif entry.unitary:
        yield "spectral: does not depend on the choice of an orthonormal basis, nor on the space"
    if entry.continuous:
        yield "continuous: a small change of an adapter is a small change of the merge"
    if entry.elementwise:
        yield "element-wise: works entry by entry, so that space and basis change the result"


def _docstring(function: Any) -> tuple[str, dict[str, str]]:
    """The prose of a docstring, and what it says of each argument."""
    prose, _, rest = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    helps: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            name = match[1]
            helps[name] = match[2]
        elif name and line.strip():
            helps[name] += " " + line.strip()
    return _plain(prose), {key: _plain(text) for key, text in helps.items()}


def _plain(text: str) -> str:
    return text.replace("``", "").strip()


def type_name(hint: Any) -> str:
    """A type in plain words.

    Example:
        >>> from pydantic import Field
        >>> type_name(Annotated[float, Field(gt=0, le=1)]), type_name(int | None), type_name(Literal["mean", "sum"])
        ('number > 0, ≤ 1', 'integer or none', 'mean or sum')
    """
    origin = get_origin(hint)
    if origin is Annotated:
        base, *marks = get_args(hint)
        return " ".join(filter(None, [type_name(base), ", ".join(_bounds(marks))]))
    if origin is Literal:
        return " or ".join(map(str, get_args(hint)))
    if origin is tuple:
        return "one for each adapter"  # or what differs by layer, in its place
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in get_args(hint))
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _bounds(marks: list[Any]) -> Iterator[str]:
    for mark in marks:
        for limit in (mark, *getattr(mark, "metadata", ())):
            for key, sign in _BOUNDS.items():
                value = getattr(limit, key, None)
                if value is not None:
                    yield f"{sign} {value}"
