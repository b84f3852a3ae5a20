"""Merge weights: from what a recipe says to a number per adapter and module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from coremerge.errors import ConfigError
from coremerge.recipe import Weights

Table = dict[str, dict[str, float]]
"""adapter name → module name → weight."""


def weight_table(
    weights: Weights | None, holders: Mapping[str, Iterable[str]], adapters: Iterable[str], normalize: bool = False
) -> Table:
    """A weight for each adapter and module.

    Args:
        weights: see :class:`~coremerge.recipe.Recipe`.
        holders: module name → names of the adapters that have it.
        adapters: all adapters' names, in order.
        normalize: divide by the sum over the holders of each module.

    Raises:
        ConfigError: a wrong count, an unknown adapter or module, a weight that is not finite, a sum of zero.
    """
    names = list(adapters)
    given = _by_name(weights, names)
    for name, value in given.items():
        for module in value if isinstance(value, Mapping) else ():
            if name not in holders.get(module, ()):
                raise ConfigError(f"adapter {name!r} has no such module", key=f"weights.{name}", value=module)
    table: Table = {name: {} for name in names}
    for module, having in holders.items():
        for name in having:
            value = given.get(name, 1.0)
            weight = value.get(module, 1.0) if isinstance(value, Mapping) else value
            if not math.isfinite(weight):
                raise ConfigError("a weight must be finite", key=f"weights.{name}", value=weight)
            table[name][module] = float(weight)
    return _normalized(table, holders) if normalize else table


def _by_name(weights: Weights | None, names: list[str]) -> Mapping[str, float | Mapping[str, float]]:
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise ConfigError(
                "no adapter of that name", key="weights", value=unknown[0], remedy=f"Adapters: {', '.join(names)}"
            )
        return weights
    if len(weights) != len(names):
        raise ConfigError(f"{len(weights)} weights for {len(names)} adapters", key="weights", value=list(weights))
    return dict(zip(names, weights, strict=True))


def _normalized(table: Table, holders: Mapping[str, Iterable[str]]) -> Table:
    result: Table = {name: {} for name in table}
    for module, having in {module: list(names) for module, names in holders.items()}.items():
        sum_ = math.fsum(table[name][module] for name in having)
        if sum_ == 0:
            raise ConfigError("weights that sum to zero cannot be normalised", key="weights", value=module)
        for name in having:
            result[name][module] = table[name][module] / sum_
    return result
