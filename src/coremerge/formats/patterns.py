"""PEFT's patterns of module names: regular expressions from a file, matched with care."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from coremerge.errors import ConfigError
from coremerge.formats.config import Config

T = TypeVar("T")

_LONGEST = 1000
_ANYWHERE = ("a.", "zq.7.x_y.", "0.b9.", "no.such.model.12345.", "block.3.cross.")
"""Places in models that an expression which takes a name anywhere must take, whatever is in front of it."""

_MOST_STEPS = 8.5  # powers of ten, for names of a hundred characters: four open repeats


class Patterns(Generic[T]):
    """A table from pattern to value; the first key in the file's order that matches a module's name counts.

    PEFT's rule (``peft.utils.other.get_pattern_key``): ``re.match(rf"(.*\\.)?({key})$", name)``.

    Args:
        config: the adapter's config.
        field: ``rank_pattern`` or ``alpha_pattern``.
        convert: checks and converts a value; called with the config, a key for messages and the value.

    Raises:
        ConfigError: a value that does not convert, or an expression that is invalid or may take forever.
    """

    def __init__(self, config: Config, field: str, convert: Callable[[Config, str, object], T]) -> None:
        self._values: list[T] = []
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        # plain keys by length and the places of their dots, which match anything: a look-up for each such form,
        # however many keys there are (some files name every module)
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        for order, (key, value) in enumerate(config.table(field).items()):
            self._values.append(convert(config, f"{field}.{key}", value))
            if re.fullmatch(r"[\w.-]*", key):
                form = (*(place for place, char in enumerate(key) if char == "."), len(key))
                self._plain.setdefault(form, {})[key] = order
            else:
                self._expressions.append((order, _compile(config, field, key)))

    def get(self, module: str, default: T) -> T:
        """The value for ``module``."""
        found = [order for form, keys in self._plain.items() if (order := _look_up(module, form, keys)) is not None]
        best = min(found, default=len(self._values))
        best = next(
            (order for order, expression in self._expressions if order < best and expression.match(module)), best
        )
        return self._values[best] if best < len(self._values) else default


def _look_up(module: str, form: tuple[int, ...], keys: Mapping[str, int]) -> int | None:
    """The place of the key of this form that ends ``module``, at its start or after a dot."""
    *dots, length = form
    start = len(module) - length
    if start < 0 or (start and module[start - 1] != "."):
        return None
    ends = (0, *(dot + 1 for dot in dots))
    return keys.get(".".join(module[start + a : start + b] for a, b in zip(ends, (*dots, length), strict=True)))


def _compile(config: Config, field: str, key: str) -> re.Pattern[str]:
    problem = _too_costly(key)
    if not problem:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Python's, of sets that may mean more one day
                return re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"is not a regular expression: {error}"
    raise ConfigError(
        f"the key {problem}",
        file=config.path,
        key=f"{field}.{key}",
        value=config.table(field)[key],
        remedy="Write the module names out, one key each",
    )


def ends_of(target: str, modules: Iterable[str]) -> tuple[str, ...]:
    """The shortest ends of the adapted ``modules`` that ``target`` takes wherever they are.

    ``target`` is PEFT's ``target_modules`` as one string: ``all-linear``, or a regular expression for whole names.

    Example:
        >>> ends_of(r".*\\.(q|v)_proj", ["layers.0.attn.q_proj", "layers.0.mlp.up_proj"])
        ('q_proj',)
        >>> ends_of(r"model\\.layers\\..*attn\\.q_proj", ["model.layers.0.attn.q_proj"])
        ()
    """
    takes = _anywhere(target)
    found: dict[str, None] = {}
    for module in modules if takes else ():
        steps = module.partition(".base_layer.")[0].split(".")
        ends = (".".join(steps[-n:]) for n in range(1, 3) if not any(step.isdecimal() for step in steps[-n:]))
        found |= dict.fromkeys(next(([end] for end in ends if takes and takes(end)), []))
    return tuple(found)


def _anywhere(target: str) -> Callable[[str], bool] | None:
    """Whether an end of a name is taken in every place; None where the expression cannot be used."""
    if target.lower() == "all-linear":
        return lambda end: True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            expression = None if _too_costly(target) else re.compile(target)
    except (re.error, RecursionError, OverflowError):
        return None
    return expression and (lambda end: all(expression.fullmatch(place + end) for place in _ANYWHERE))


def _too_costly(key: str) -> str | None:
    """Why ``key`` could backtrack for hours, if it could: repeats in repeats, or too many choices."""
    if len(key) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]])*\]", "a", key)
    branches = 1
    while inner := re.search(r"\(([^()]*)\)(\*|\+|\{[\d,]*\})?", bare):
        body = inner[1].removeprefix("?")  # of (?: and its kin
        if inner[2] and re.search(r"[*+?{|]", body):
            return "repeats a group that itself repeats or branches"
        branches *= body.count("|") + 1
        kept = "".join(re.findall(r"[*+?]|\{[\d,]*\}", body))
        bare = bare[: inner.start()] + "a" + kept + (inner[2] or "") + bare[inner.end() :]
    repeats = re.findall(r"(?:[*+]|\{[\d,]*\})\??", bare)
    optional = bare.count("?") - sum("?" in repeat for repeat in repeats)
    steps = 2 * len(repeats) + 0.3 * optional + math.log10(branches * (bare.count("|") + 1))
    return "has too many repeats and branches" if steps > _MOST_STEPS else None
