"""Values that differ by layer or by name, in mergekit's spelling: gradients and filters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from coremerge.errors import ConfigError
from coremerge.yamlfile import Number

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
"""A module's layer: the first number in its name."""

V = TypeVar("V")

SOME = Field(min_length=1)
"""Of a list that must not be empty."""

Gradient = Annotated[tuple[Number, ...], SOME]
"""Values from the first layer to the last, evenly apart; in between they are interpolated."""


class Condition(BaseModel, Generic[V]):
    """A value for the modules whose parameters' names have ``filter`` in them; without one, or with ``*``, for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: str | None = None
    value: V | Annotated[tuple[V, ...], SOME]


Layered = Gradient | Annotated[tuple[Condition[Number], ...], SOME]
"""A value as a recipe says it: of the conditions, the first that fits a module counts."""


def by_module(weights: Any, adapters: Mapping[str, Iterable[str]]) -> Any:
    """``weights`` of a recipe with a number for each module in place of what is layered.

    Args:
        weights: in the order of the adapters, or by their names.
        adapters: name → its modules' names.

    Raises:
        ConfigError: no condition fits a module.
    """
    if weights is None or not any(map(is_layered, weights.values() if isinstance(weights, Mapping) else weights)):
        return weights
    if not isinstance(weights, Mapping) and len(weights) != len(adapters):
        return weights  # refused where weights are read
    named = weights if isinstance(weights, Mapping) else dict(zip(adapters, weights, strict=True))
    last = last_layer(module for modules in adapters.values() for module in modules)

    def settled(name: str, said: Any) -> Any:
        if not is_layered(said) or name not in adapters:
            return said
        return {module: at(said, module, last, f"weights.{name}") for module in adapters[name]}

    return {name: settled(name, said) for name, said in named.items()}


def is_layered(said: object) -> bool:
    """Whether it is a gradient, or conditions."""
    return isinstance(said, Sequence) and not isinstance(said, str)


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in.

    Example:
        >>> layer_of("model.layers.12.mlp.up_proj"), layer_of("lm_head")
        (12, None)
    """
    found = LAYER.search(module)
    return int(found[1]) if found else None


def last_layer(modules: Iterable[str]) -> int:
    """The highest number of a layer among ``modules``; 0 where there is none."""
    return max((layer for layer in map(layer_of, modules) if layer is not None), default=0)


def at(said: Sequence[Any], module: str, last: int, key: str) -> float:
    """What is said of ``module``, in a model whose layers end with the number ``last``.

    Raises:
        ConfigError: no condition fits; ``key`` names what was said.
    """
    layer = layer_of(module)
    place = 0.0 if layer is None else layer / last if last else 1.0  # as mergekit counts
    parameter = f"{module}.weight"
    for one in said:
        if not isinstance(one, Condition):
            return interpolated(said, place)
        if one.filter is None or one.filter == "*" or one.filter in parameter:
            return interpolated(one.value, place) if isinstance(one.value, tuple) else float(one.value)
    filters = [one.filter for one in said if isinstance(one, Condition)]
    raise ConfigError(
        f"none of its conditions fits {parameter}", key=key, value=filters,
        remedy="Add one without a filter, for all other modules",
    )  # fmt: skip


def interpolated(values: Sequence[float], place: float) -> float:
    """The value at ``place`` in [0, 1].

    Example:
        >>> [interpolated((0.0, 0.5, 1.0), place) for place in (0, 0.25, 0.5, 1)]
        [0.0, 0.25, 0.5, 1.0]
    """
    scaled = place * (len(values) - 1)
    first = min(int(scaled), len(values) - 1)
    share = scaled - first
    return values[first] if not share else (1 - share) * values[first] + share * values[first + 1]
