"""Modules in core space, as a fit needs them: bases, and what each adapter is in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coremerge import linalg
from coremerge.learning.leastsquares import Metric, metric
from coremerge.lowrank import LowRank, ThinSVD, thin_svd
from coremerge.merging import read_updates
from coremerge.plan import Plan
from coremerge.recipe import Recipe
from coremerge.spaces import Coordinates


@dataclass(frozen=True)
class Core:
    """A module in core space.

    Attributes:
        coordinates: of the adapters that have it.
        left: U (m, p), float64.
        right: Vᵀ (q, n), and behind it e more rows: see :mod:`coremerge.learning.beyond`. What is fitted is (p, q + e).
        own: q.
        holders: adapter → its factors (p, r), (r, q).
    """

    coordinates: Coordinates
    left: Tensor
    right: Tensor
    own: int
    holders: Mapping[str, LowRank]

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q + e)."""
        return self.left.shape[-1], len(self.right)

    def of(self, update: LowRank) -> Tensor:
        """``update`` (m, n) in these coordinates (p, q + e)."""
        return (self.left.mT @ update.left) @ (update.right @ self.right.mT)

    def lifted(self, found: Tensor) -> LowRank:
        """The update (m, n) that ``found`` (p, q + e) stands for."""
        small = thin_svd(found).cut().lowrank()
        return LowRank(self.left @ small.left, small.right @ self.right)

    def placed(self, found: Tensor) -> tuple[Coordinates, ThinSVD]:
        """``found`` (p, q + e) and the coordinates that it is in: where there are more rows, the rows themselves."""
        svd = thin_svd(found).cut()
        if self.own == len(self.right):
            return self.coordinates, svd
        lift = replace(self.coordinates.lift, right=None)
        return replace(self.coordinates, lift=lift), replace(svd, right=svd.right @ self.right)

    def metric(self, task: str, moments: Mapping[str, Tensor], aside: float) -> Metric:
        """How errors count for the task: by what its adapter adds to the outputs, on its own inputs."""
        held = self.holders.get(task)
        if held is None or task not in moments:
            return Metric.plain(self.shape[0])
        values, vectors = linalg.eigh(held.right @ moments[task] @ held.right.mT)
        return metric(held.left @ (vectors * values.clamp_min(0).sqrt()), aside)


class Cores:
    """Module name → its :class:`Core`; those that are asked for again and again are kept until others are.

    Args:
        plan: the adapters.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parts = Recipe(method="sum", steps=[]).parts()
        self._held: dict[str, Core] = {}

    def __getitem__(self, name: str) -> Core:
        return self._held.get(name) or self._made(name)

    def widen(self, rows: Mapping[str, Tensor]) -> None:
        """Let modules that are kept read these (e, n) beside their adapters' rows, until others are kept."""
        for name, beyond in rows.items():
            core = self[name]
            self._held[name] = replace(core, right=torch.cat([core.right[: core.own], beyond]))

    def hold(self, names: Collection[str]) -> None:
        """Keep these, and no others."""
        if names != self._held.keys():
            self._held = {name: self[name] for name in names}

    def _made(self, name: str) -> Core:
        updates = read_updates((name,), self.plan, self.parts)
        coordinates = self.parts.space(updates)
        p, q = coordinates.cores[0].shape
        wide, high = torch.eye(p, q, dtype=torch.float64), torch.eye(q, dtype=torch.float64)
        left = coordinates.lift(LowRank(torch.eye(p, dtype=torch.float64), wide), updates).left
        right = coordinates.lift(LowRank(wide, high), updates).right
        named = zip(self.plan.adapters, coordinates.cores, strict=True)
        return Core(coordinates, left, right, q, {key: core for key, core in named if core.rank})
