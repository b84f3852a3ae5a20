"""Adapters of one size: before a merge, so that none of them drowns the others, whatever it was trained at.

The size of an adapter is the geometric mean of its spectral and its Frobenius norm, each over all of its updates: the
same two norms that ``scale="auto"`` goes by. With the Frobenius norm alone a diffuse update (VeRA) would be made too
small to do its task; with the spectral norm alone it would drown the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from coremerge.adapter import Adapter
from coremerge.executors import local
from coremerge.linalg import eigh, eigvalsh, fading
from coremerge.lowrank import LowRank
from coremerge.plan import Plan

GROWTH = 4.0
"""An adapter grows at most so many times: what was hardly trained is not blown up to noise."""

SMALL = 0.1
"""Of the largest size: an adapter as small as this has half a say in the common size, and one that fades none.

A geometric mean would count an adapter of size 1e-9 like any other. Not tuned."""

LISTED = 8
"""With more adapters than this, only the least and the largest factor are said."""


@dataclass(frozen=True)
class Equal:
    """What brings one adapter to the common size.

    Attributes:
        size: of all its updates together, without weights.
        factor: that all of it is multiplied by.
        share: of the common size that it then has: 1, or less where :data:`GROWTH` holds it back.
    """

    size: float
    factor: float
    share: float = 1.0


def equalized(plan: Plan, threads: int | None = None) -> Plan:
    """``plan`` with weights that bring its adapters to one size, as its recipe asks; the recipe's weights come on top.

    All factors are read once, unless it has been done already.
    """
    if plan.recipe.norms == "own" or plan.equal or len(plan.adapters) == 1:
        return plan
    squares = {key: torch.zeros(2, dtype=torch.float64) for key in plan.adapters}
    for found in local.run(partial(_squares, plan), plan.modules, threads):
        for key, square in found.items():
            squares[key] += square
    return weighted(plan, factors({key: float(square.pow(0.25).prod()) for key, square in squares.items()}))


def weighted(plan: Plan, equal: Mapping[str, Equal]) -> Plan:
    """``plan`` with its weights times the factors of ``equal``; as it is, where there are none."""
    if not equal:
        return plan
    weights = {key: {name: w * equal[key].factor for name, w in own.items()} for key, own in plan.weights.items()}
    return replace(plan, weights=weights, equal=equal)


def factors(sizes: Mapping[str, float]) -> dict[str, Equal]:
    """Of adapters of these sizes.

    Example:
        >>> [round(one.factor, 3) for one in factors({"a": 2.0, "b": 0.5, "c": 1.0}).values()]
        [0.516, 2.064, 1.032]
    """
    there = [size for size in sizes.values() if size > 0 and math.isfinite(size)]
    if not there or len(there) < sum(size != 0 for size in sizes.values()):  # infinite: the merge says what is
        return {key: Equal(size, 1.0) for key, size in sizes.items()}
    common = common_size(there)
    return {key: _factor(size, common) for key, size in sizes.items()}


def _factor(size: float, common: float) -> Equal:
    if size == 0:
        return Equal(size, 1.0, 0.0)
    factor = min(GROWTH, common / size)
    return Equal(size, factor, factor * size / common)


def common_size(sizes: list[float]) -> float:
    """The geometric mean of positive sizes, in which a size n counts n² / (n² + (:data:`SMALL` · max)²).

    Example:
        >>> round(common_size([3.0, 3.0]), 6), round(common_size([3.0, 3.0, 1e-30]), 6)
        (3.0, 3.0)
    """
    given = torch.tensor(sizes, dtype=torch.float64)
    says = counting(given)
    logs = torch.where(says > 0, (given / given.max()).log(), 0.0)
    return float(given.max() * ((says * logs).sum() / says.sum()).exp())


def counting(sizes: Tensor) -> Tensor:
    """How much each of ``sizes`` (T,) counts among them: see :data:`SMALL`."""
    return fading(sizes, sizes.max(), SMALL) if sizes.numel() else sizes


def said(factors: Mapping[str, float]) -> str:
    """What was done, in words; with many adapters, the least and the largest factor.

    Example:
        >>> said({"math": 0.5412, "code": 2.0})
        'made equal before merging: math × 0.541, code × 2'
    """
    names = [*factors] if len(factors) <= LISTED else [pick(factors, key=factors.__getitem__) for pick in (min, max)]
    shown = (f"{name} × {factors[name]:.3g}" for name in names)
    return "made equal before merging: " + (", " if len(factors) <= LISTED else " to ").join(shown)


def held_back(equal: Mapping[str, Equal]) -> Iterator[str]:
    """A warning for each adapter that stays smaller than the others."""
    for name, one in equal.items():
        if 0 < one.share < 1 - 1e-9:
            yield (
                f"{name} is much smaller than the others ({one.size:.2g}) and was made {GROWTH:g} times larger, no"
                f" more: it has {one.share:.0%} of their size in the merge; --norms own leaves all as they are"
            )


def _squares(plan: Plan, name: str) -> dict[str, Tensor]:
    """Adapter name → squared norms of its update of the module, where it has a weight there."""
    having = [key for key in plan.modules[name].ranks if plan.weights[key][name]]
    return {key: _norms(plan.sized[key], name) for key in having}


def _norms(adapter: Adapter, name: str) -> Tensor:
    """In float32 where that has the range for it: sizes need no more digits."""
    found = gram_norms(adapter.read(name))
    return found if bool(((found > SHORT) & (found < 1 / SHORT)).all()) else gram_norms(adapter[name])


SHORT = 1e-30
"""Squares of numbers in float32 between this and its inverse have lost nothing."""


def gram_norms(update: LowRank) -> Tensor:
    """(2,): the squared spectral and Frobenius norm, from r × r Gram matrices; infinite where these are not finite."""
    left, right = (update.left.mT @ update.left).double(), (update.right @ update.right.mT).double()
    if not bool(left.isfinite().all() & right.isfinite().all()):
        return torch.full((2,), math.inf, dtype=torch.float64)
    values, vectors = eigh(left)
    root = vectors * values.clamp_min(0).sqrt()
    spectrum = eigvalsh(root.mT @ right @ root).clamp_min(0)
    return torch.stack([spectrum.amax() if len(spectrum) else spectrum.sum(), spectrum.sum()])
