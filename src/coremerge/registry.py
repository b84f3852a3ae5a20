"""Names → factories. Parameters, defaults and help come from the factory's signature and docstring."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from coremerge.errors import ConfigError

P = TypeVar("P")

Values = Mapping[str, Any]
"""All parameters of an operator, validated: those that were given, and the others at their defaults."""

Settles = Mapping[str, Callable[[Mapping[str, Any]], tuple[Any, str]]]
"""Parameter → a function of the adapters: its value, and why, in words that go on from it."""


@dataclass(frozen=True)
class Entry(Generic[P]):
    """One registered factory and what it declares of itself: nobody else has to know its name.

    Attributes:
        unitary: f(P Xᵢ Q) = P f(Xᵢ) Q for orthogonal P, Q: the space it works in does not change the result.
        elementwise: works entry by entry, so that the result depends on the basis.
        linear: a weighted sum of its inputs; of a step, what it is given times a number.
        continuous: of a method: a small change of its inputs is a small change of its result.
        settles: of a method: parameter → what gives its value from the adapters, by name, and says why, where it is
            None.
        source: the paper.
        dense: parameters → how many matrices of all p × q entries it holds at once for each of its inputs, or whether
            it works on entries at all (true counts as 1): memory is told by it. By default as ``elementwise`` says.
        spreads: parameters → whether its result can have the rank min(p, q), whatever the inputs' ranks are; by
            default what is not ``unitary`` does.
        keeps: parameters → how many directions it keeps at most: a method of each adapter, a step of what it is given,
            a space on each side of all together; None: all of them.
        cuts: parameters → what it leaves out, in words that go on from its name; by default what ``keeps`` says.
        shape: of a space: (R, (m, n)) → the most that p and q can be, R being the sum of the adapters' ranks; by
            default cores are as large as the updates.
        neutral: of a method: parameters with which it gives a single adapter back as it is, where its own defaults do
            not. They are taken where there is one update to merge, unless a person names one of them.
        surveys: of a method: parameters → the pass over all modules that it needs before it merges any, a
            :class:`~coremerge.methods.Survey`, or None.
        flattens: of a step: its result is flat, all directions equally strong, and loses much when it is cut.
        lifts: of a step: a faint direction may come out stronger beside the others, so that rounding errors must be
            told from directions, even of a sum; by default what ``flattens`` does.
        group: of a method: under which of :data:`coremerge.catalog.GROUPS` it is listed; by default its traits say.
    """

    name: str
    kind: str
    factory: Callable[..., P]
    unitary: bool = False
    elementwise: bool = False
    linear: bool = False
    source: str = ""
    dense: Callable[[Values], float] | None = None
    spreads: Callable[[Values], bool] | None = None
    keeps: Callable[[Values], int | None] | None = None
    cuts: Callable[[Values], Iterable[str]] | None = None
    shape: Callable[[int, tuple[int, int]], tuple[int, int]] | None = None
    neutral: Values = field(default_factory=dict)
    flattens: bool = False
    continuous: bool = False
    settles: Settles = field(default_factory=dict)
    lifts: bool = False
    group: str = ""
    surveys: Callable[[Values], Any] | None = None

    @property
    def help(self) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their defaults."""
        return dict(_defaults(self.factory))

    def validated(self, parameters: Values | None = None) -> dict[str, Any]:
        """``parameters`` as the annotated types (strings are converted); those that are not given are not added.

        Raises:
            ConfigError: an unknown parameter, a missing one, or a value its annotation does not admit.
        """
        known = self.parameters
        values = {key: self._value(key, value) for key, value in (parameters or {}).items()}
        missing = [key for key, default in known.items() if default is inspect.Parameter.empty and key not in values]
        if missing:
            raise ConfigError(
                f"{self.kind} {self.name!r} needs {missing[0]!r}", remedy=f"Write {self.name}:{missing[0]}=value"
            )
        return values

    def make(self, parameters: Values | None = None) -> P:
        """Call the factory with ``parameters``: see :meth:`validated`."""
        return self.factory(**self.validated(parameters))

    def _value(self, key: str, value: object) -> Any:
        if key not in _defaults(self.factory):
            raise ConfigError(
                f"{self.kind} {self.name!r} has no parameter {key!r}",
                remedy=f"It takes: {', '.join(self.parameters) or 'none'}",
            )
        try:
            strict = _has_truth(value) or None  # a truth is no number, though Python takes it for one
            return _type(self.factory, key).validate_python(_null(value), strict=strict)
        except ValidationError as error:
            detail = error.errors()[0]["msg"]
        except TypeError as error:
            detail = str(error)
        raise ConfigError(f"not a value that {self.kind} {self.name!r} takes: {detail}", key=key, value=value)


def _has_truth(value: object) -> bool:
    """Whether it is a truth, or a list with one in it; a set has no order.

    Raises:
        TypeError: a set.
    """
    if isinstance(value, (set, frozenset)):
        raise TypeError("a set has no order: give a list")
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_has_truth, value)))


@cache
def _defaults(factory: Callable[..., Any]) -> Mapping[str, Any]:
    """Of its parameters."""
    return MappingProxyType({name: p.default for name, p in inspect.signature(factory).parameters.items()})


@cache
def _type(factory: Callable[..., Any], parameter: str) -> TypeAdapter[Any]:
    """What validates it: made once, as that takes longer than many a merge."""
    return TypeAdapter(get_type_hints(factory, include_extras=True)[parameter])


def _null(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in {"none", "null"} else value


@dataclass(frozen=True)
class Operator(Generic[P]):
    """A registered factory with its parameters, and what it declares of itself with these.

    Attributes:
        entry: the factory.
        given: the parameters that were given, validated.
    """

    entry: Entry[P]
    given: Values = field(default_factory=dict)

    def __str__(self) -> str:
        """``name (key=value, …)``, of what was given."""
        shown = ", ".join(f"{key}={text_of(value)}" for key, value in self.given.items())
        return f"{self.entry.name} ({shown})" if shown else self.entry.name

    @property
    def values(self) -> dict[str, Any]:
        """All parameters."""
        return {**self.entry.parameters, **self.given}

    def make(self) -> P:
        """What the factory makes of them."""
        return self.entry.factory(**self.given)

    @property
    def copies(self) -> float:
        """How many matrices of all entries of cores it holds for each of its inputs."""
        return float(self.entry.elementwise if self.entry.dense is None else self.entry.dense(self.values))

    @property
    def dense(self) -> bool:
        """Whether it works on all entries of cores."""
        return self.copies > 0

    @property
    def spreads(self) -> bool:
        """Whether its result can have more directions than its inputs."""
        return not self.entry.unitary if self.entry.spreads is None else bool(self.entry.spreads(self.values))

    @property
    def keeps(self) -> int | None:
        """How many directions it keeps at most; None: all."""
        return None if self.entry.keeps is None else self.entry.keeps(self.values)

    @property
    def survey(self) -> Any:
        """The pass over all modules that it needs before it merges any; None: it needs none."""
        return None if self.entry.surveys is None else self.entry.surveys(self.values)

    @property
    def cuts(self) -> tuple[str, ...]:
        """What it leaves out, in words that go on from its name."""
        if self.entry.cuts is not None:
            return tuple(self.entry.cuts(self.values))
        of = " of each adapter" if self.entry.kind == "method" else ""
        return () if self.keeps is None else (f"keeps at most {directions(self.keeps)}{of}",)


def directions(count: int) -> str:
    """``4 directions``."""
    return f"{count} direction{'s' if count != 1 else ''}"


def text_of(value: object) -> str:
    """A validated value as it is written: ``none``, ``true``, ``4``.

    Example:
        >>> [text_of(value) for value in (None, True, 4, 0.5, "sum")]
        ['none', 'true', '4', '0.5', 'sum']
        >>> text_of(((1.0, 0.5), 0.3))
        '[[1.0, 0.5], 0.3]'
    """
    if isinstance(value, tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {text_of(own)}" for key, own in value if own is not None) + "}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Registry(Generic[P]):
    """All factories of one ``kind``."""

    kind: str
    entries: dict[str, Entry[P]] = field(default_factory=dict)

    def register(
        self,
        name: str,
        *,
        unitary: bool = False,
        elementwise: bool = False,
        linear: bool = False,
        source: str = "",
        dense: Callable[[Values], float] | None = None,
        spreads: Callable[[Values], bool] | None = None,
        keeps: Callable[[Values], int | None] | None = None,
        cuts: Callable[[Values], Iterable[str]] | None = None,
        shape: Callable[[int, tuple[int, int]], tuple[int, int]] | None = None,
        neutral: Values | None = None,
        flattens: bool = False,
        continuous: bool = False,
        settles: Settles | None = None,
        lifts: bool = False,
        group: str = "",
        surveys: Callable[[Values], Any] | None = None,
    ) -> Callable[[Callable[..., P]], Callable[..., P]]:
        """Decorator: adds the factory under ``name``, with what it declares of itself: see :class:`Entry`.

        Raises:
            ConfigError: the name is taken.
        """

        def add(factory: Callable[..., P]) -> Callable[..., P]:
            if name in self.entries:
                raise ConfigError(f"there is a {self.kind} {name!r} already", remedy="Give this one another name")
            declared = (
                dense,
                spreads,
                keeps,
                cuts,
                shape,
                dict(neutral or {}),
                flattens,
                continuous,
                dict(settles or {}),
                lifts or flattens,
                group,
                surveys,
            )
            self.entries[name] = Entry(name, self.kind, factory, unitary, elementwise, linear, source, *declared)
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

    def resolve(self, spec: Spec) -> Operator[P]:
        """What ``spec`` names, with its parameters validated.

        ``spec``: ``"name"``, ``"name:key=value,key=value"`` or ``{"name": {"key": value}}``.

        Raises:
            ConfigError: an unknown name, or parameters that are not the factory's.
        """
        name, parameters = parse_spec(spec, self.kind)
        entry = self[name]
        return Operator(entry, entry.validated(parameters))

    def build(self, spec: Spec) -> P:
        """Make what ``spec`` asks for: see :meth:`resolve`."""
        return self.resolve(spec).make()

    def canonical(self, spec: Spec) -> Spec:
        """``spec`` as it was spelt, with its values as validated: ``isotropize:span=no`` is ``isotropize:span=false``.

        Raises:
            ConfigError: see :meth:`resolve`.
        """
        found = self.resolve(spec)
        if not isinstance(spec, str):
            return {name: dict(found.given) if given else given for name, given in spec.items()}
        pairs = ",".join(f"{key}={text_of(value)}" for key, value in found.given.items())
        return f"{found.entry.name}:{pairs}" if pairs else found.entry.name


Spec = str | Mapping[str, Mapping[str, Any] | None]


def parse_spec(spec: Spec, kind: str = "step") -> tuple[str, dict[str, Any]]:
    """Name and parameters of ``spec``; see :meth:`Registry.resolve`."""
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if any(not sep for _, sep, _ in pairs):
            raise ConfigError(f"not a {kind}", value=spec, remedy=f"Write {name}:key=value,key=value")
        found = {key.strip(): value.strip() for key, _, value in pairs}
        if len(found) < len(pairs):
            raise ConfigError("a parameter is there twice", value=spec, remedy="Say it once")
        return name, found
    if len(spec) != 1:
        raise ConfigError(f"a {kind} is one name with its parameters", value=dict(spec))
    ((name, parameters),) = spec.items()
    return name, dict(parameters or {})
