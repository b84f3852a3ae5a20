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
        right: Vᵀ (q, n).
        holders: adapter → its factors (p, r), (r, q).
        beyond: (e, n) more rows, see :mod:`coremerge.learning.beyond`; what is fitted has q + e columns.
    """

    coordinates: Coordinates
    left: Tensor
    right: Tensor
    holders: Mapping[str, LowRank]
    beyond: Tensor | None = None

    @property
    def reads(self) -> Tensor:
        """(q + e, n): the directions of the inputs that the result may read."""
        return self.right if self.beyond is None else torch.cat([self.right, self.beyond])

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q + e)."""
        return self.left.shape[-1], len(self.right) + (0 if self.beyond is None else len(self.beyond))

    def of(self, update: LowRank) -> Tensor:
        """``update`` (m, n) in these coordinates (p, q + e)."""
        return (self.left.mT @ update.left) @ (update.right @ self.reads.mT)

    def lifted(self, found: Tensor) -> LowRank:
        """The update (m, n) that ``found`` (p, q + e) stands for."""
        small = thin_svd(found).cut().lowrank()
        return LowRank(self.left @ small.left, small.right @ self.reads)

    def placed(self, found: Tensor) -> tuple[Coordinates, ThinSVD]:
        """``found`` (p, q + e) and the coordinates that it is in: where there are more rows, the rows themselves."""
        svd = thin_svd(found).cut()
        if self.beyond is None:
            return self.coordinates, svd
        lift = replace(self.coordinates.lift, right=None)
        return replace(self.coordinates, lift=lift), replace(svd, right=svd.right @ self.reads)

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
        """Let modules that are kept read more of their inputs, until others are: see :attr:`Core.beyond`."""
        self._held |= {name: replace(self[name], beyond=beyond) for name, beyond in rows.items() if len(beyond)}

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
        return Core(coordinates, left, right, {key: core for key, core in named if core.rank})
