"""Names → factories. Parameters, defaults and help come from the factory's signature and docstring."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from coremerge.errors import ConfigError

P = TypeVar("P")


@dataclass(frozen=True)
class Entry(Generic[P]):
    """One registered factory and what it declares of itself.

    Attributes:
        unitary: f(P Xᵢ Q) = P f(Xᵢ) Q for orthogonal P, Q: the space it works in does not change the result.
        elementwise: works entry by entry, so that the result depends on the basis.
        linear: a weighted sum of its inputs.
        source: the paper.
    """

    name: str
    kind: str
    factory: Callable[..., P]
    unitary: bool = False
    elementwise: bool = False
    linear: bool = False
    source: str = ""

    @property
    def help(self) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their defaults."""
        return {name: p.default for name, p in inspect.signature(self.factory).parameters.items()}

    def make(self, parameters: Mapping[str, object] | None = None) -> P:
        """Call the factory with validated ``parameters`` (strings are converted to the annotated types).

        Raises:
            ConfigError: an unknown parameter, a missing one, or a value its annotation does not admit.
        """
        hints = get_type_hints(self.factory, include_extras=True)
        known = self.parameters
        values: dict[str, Any] = {}
        for key, value in (parameters or {}).items():
            if key not in known:
                raise ConfigError(
                    f"{self.kind} {self.name!r} has no parameter {key!r}",
                    remedy=f"It takes: {', '.join(known) or 'none'}",
                )
            try:
                values[key] = TypeAdapter(hints[key]).validate_python(_null(value))
            except ValidationError as error:
                detail = error.errors()[0]["msg"]
                raise ConfigError(
                    f"not a value that {self.kind} {self.name!r} takes: {detail}", key=key, value=value
                ) from None
        missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in values]
        if missing:
            raise ConfigError(
                f"{self.kind} {self.name!r} needs {missing[0]!r}", remedy=f"Write {self.name}:{missing[0]}=value"
            )
        return self.factory(**values)


def _null(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in {"none", "null"} else value


@dataclass
class Registry(Generic[P]):
    """All factories of one ``kind``."""

    kind: str
    entries: dict[str, Entry[P]] = field(default_factory=dict)

    def register(
        self, name: str, *, unitary: bool = False, elementwise: bool = False, linear: bool = False, source: str = ""
    ) -> Callable[[Callable[..., P]], Callable[..., P]]:
        """Decorator: adds the factory under ``name``."""

        def add(factory: Callable[..., P]) -> Callable[..., P]:
            self.entries[name] = Entry(name, self.kind, factory, unitary, elementwise, linear, source)
            return factory

        return add

    def __getitem__(self, name: str) -> Entry[P]:
        try:
            return self.entries[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.entries, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"there is no {self.kind} {name!r}", remedy=f"{hint}Known: {', '.join(sorted(self.entries))}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def build(self, spec: Spec) -> P:
        """Make what ``spec`` asks for: ``"name"``, ``"name:key=value,key=value"`` or ``{"name": {"key": value}}``."""
        name, parameters = parse_spec(spec, self.kind)
        return self[name].make(parameters)


Spec = str | Mapping[str, Mapping[str, Any] | None]


def parse_spec(spec: Spec, kind: str = "step") -> tuple[str, dict[str, Any]]:
    """Name and parameters of ``spec``; see :meth:`Registry.build`."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if any(not sep for _, sep, _ in pairs):
            raise ConfigError(f"not a {kind}", value=spec, remedy=f"Write {name}:key=value,key=value")
        return name, {key.strip(): value.strip() for key, _, value in pairs}
    if len(spec) != 1:
        raise ConfigError(f"a {kind} is one name with its parameters", value=dict(spec))
    ((name, parameters),) = spec.items()
    return name, dict(parameters or {})
