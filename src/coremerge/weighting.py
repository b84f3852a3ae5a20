"""Merge weights: from what a recipe says to a number per adapter and module, and factors that carry finer ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from coremerge.adapter import Adapter, Lazy
from coremerge.errors import ConfigError
from coremerge.lowrank import LowRank
from coremerge.recipe import Weights

Coarse = Sequence[float] | Mapping[str, float | Mapping[str, float]]
"""What is left once weights per rank component are in the factors."""

Table = dict[str, dict[str, float]]
"""adapter name → module name → weight."""


def in_order(weights: Weights | None, names: Iterable[str]) -> Weights | None:
    """``weights`` under ``names``, where these are only labels: if none is the same, one after the other."""
    listed = list(names)
    if not isinstance(weights, Mapping) or len(weights) != len(listed) or set(weights) & set(listed):
        return weights
    return dict(zip(listed, weights.values(), strict=True))


def fold_components(
    weights: Weights | None, adapters: Mapping[str, Adapter]
) -> tuple[Coarse | None, dict[str, Adapter]]:
    """Weights per rank component go into the factors: the other ``weights``, and adapters that carry these.

    Raises:
        ConfigError: not as many weights as the module's rank.
    """
    if not isinstance(weights, Mapping):
        return cast("Coarse | None", weights), dict(adapters)  # gradients are settled before
    left: dict[str, Any] = dict(weights)
    changed = dict(adapters)
    for name, said in weights.items():
        fine = {k: v for k, v in said.items() if isinstance(v, Sequence)} if isinstance(said, Mapping) else {}
        if fine and isinstance(said, Mapping) and name in adapters:
            changed[name] = _reweighted(adapters[name], name, fine)
            left[name] = {module: value for module, value in said.items() if module not in fine}
    return left, changed


def _reweighted(adapter: Adapter, name: str, fine: Mapping[str, Sequence[float]]) -> Adapter:
    for module, values in fine.items():
        rank = adapter.modules[module].rank if module in adapter.modules else None
        if rank != len(values):
            what = "no such module" if rank is None else f"rank {rank} there, and {len(values)} weights are given"
            remedy = _called(list(adapter.modules)) if rank is None else None
            raise ConfigError(f"adapter {name!r} has {what}", key=f"weights.{name}", value=module, remedy=remedy)
        if not all(map(math.isfinite, values)):
            raise ConfigError("a weight must be finite", key=f"weights.{name}", value=module)

    def read(module: str, dtype: torch.dtype | None = torch.float64) -> LowRank:
        update = adapter.read(module, dtype)
        if module not in fine:
            return update
        left = update.left.double() * torch.tensor(fine[module]).double()
        return LowRank(left, update.right.double(), update.rounding).to(dtype or torch.float64)

    def bias(module: str) -> torch.Tensor:
        own = adapter.biases[module]
        return own * (math.fsum(fine[module]) / len(fine[module])) if module in fine else own

    return Adapter(
        adapter.modules,
        read,
        read=read,
        name=adapter.name,
        biases=Lazy(tuple(adapter.biases), bias),
        extras=adapter.extras,
        info=adapter.info,
    )


def _called(modules: Sequence[str]) -> str:
    more = ", ..." if len(modules) > 3 else ""
    return f"Its modules, as they are called in the merge: {', '.join(modules[:3])}{more}"


def weight_table(
    weights: Coarse | None, holders: Mapping[str, Iterable[str]], adapters: Iterable[str], normalize: bool = False
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
                own = [known for known, having in holders.items() if name in having]
                raise ConfigError(
                    f"adapter {name!r} has no such module", key=f"weights.{name}", value=module, remedy=_called(own)
                )
    table: Table = {name: {} for name in names}
    for module, having in holders.items():
        for name in having:
            value = given.get(name, 1.0)
            weight = value.get(module, 1.0) if isinstance(value, Mapping) else value
            if not math.isfinite(weight):
                raise ConfigError("a weight must be finite", key=f"weights.{name}", value=weight)
            table[name][module] = float(weight)
    return _normalized(table, holders) if normalize else table


def _by_name(weights: Coarse | None, names: list[str]) -> Mapping[str, float | Mapping[str, float]]:
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
