"""How alike adapters are, module by module: norms, cosines and the subspace alignment ratio.

All of it is computed on cores, which are isometric to the updates and small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coremerge.executors import local
from coremerge.lowrank import LowRank, ThinSVD
from coremerge.spaces.core import core

ENERGY = 0.95
"""A subspace holds the fewest singular directions whose cumulative energy has a square root above this."""


@dataclass(frozen=True)
class ModuleAlignment:
    """Of the T adapters that have one module.

    Attributes:
        names: their names.
        norms: Frobenius norms of their updates (T).
        inner: Frobenius inner products (T, T).
        ratio: ``ratio[i, j]`` is the subspace alignment ratio of update i in the span of update j (T, T).
    """

    names: tuple[str, ...]
    norms: Tensor
    inner: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class Alignment:
    """How alike adapters are.

    Attributes:
        names: of the adapters, T of them.
        norms: adapter name → Frobenius norm of all its updates together.
        cosine: (T, T), of the modules that both have, taken as one long vector; NaN where they share none.
        ratio: (T, T), the mean over the shared modules; NaN where they share none.
        shared: (T, T) numbers of modules that both have.
        modules: module name → :class:`ModuleAlignment`.
    """

    names: tuple[str, ...]
    norms: Mapping[str, float]
    cosine: Tensor
    ratio: Tensor
    shared: Tensor
    modules: Mapping[str, ModuleAlignment]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: a list of pairs, ``from`` i ``to`` j; None where two adapters share no module."""
        pairs = [
            {
                "from": one,
                "to": other,
                "shared_modules": int(self.shared[i, j]),
                "cosine": _number(self.cosine[i, j]),
                "subspace_alignment_ratio": _number(self.ratio[i, j]),
            }
            for i, one in enumerate(self.names)
            for j, other in enumerate(self.names)
            if i != j
        ]
        return {"norms": dict(self.norms), "pairs": pairs}


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def align(
    adapters: Mapping[str, Mapping[str, LowRank]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Alignment:
    """Compare ``adapters`` (name → module name → update) pair by pair.

    Modules whose shapes differ between adapters are compared among those that agree with the first one.
    """
    names = tuple(adapters)
    modules = sorted({module for adapter in adapters.values() for module in adapter})
    found: dict[str, ModuleAlignment] = {}

    def one(module: str) -> ModuleAlignment:
        held = {name: adapter[module] for name, adapter in adapters.items() if module in adapter}
        shape = next(iter(held.values())).shape
        return align_module({name: update for name, update in held.items() if update.shape == shape})

    for module, aligned in zip(modules, local.run(one, modules, threads), strict=True):
        found[module] = aligned
        if progress:
            progress(len(found), len(modules))
    return _collect(names, found)


def align_module(updates: Mapping[str, LowRank]) -> ModuleAlignment:
    """Norms, inner products and alignment ratios of one module's updates, all of one shape."""
    cores = _cores(list(updates.values()))
    inner = torch.stack([torch.stack([a.inner(b) for b in cores]) for a in cores])
    spans = [subspace(c.svd) for c in cores]
    ratio = torch.stack([torch.stack([_share(a, span) for span in spans]) for a in cores])
    return ModuleAlignment(tuple(updates), inner.diagonal().clamp(min=0).sqrt(), inner, ratio)


def _cores(updates: Sequence[LowRank]) -> tuple[LowRank, ...]:
    """The updates in Core Space: an isometry, so all numbers stay the same."""
    return core()(updates).cores


def subspace(svd: ThinSVD, energy: float = ENERGY) -> Tensor:
    """The fewest left singular vectors (m, k) such that √(Σ_{i≤k} σ_i² / Σ σ_i²) exceeds ``energy``."""
    best = svd.descending
    squares = best.values.square()
    if not bool((squares > 0).any()):
        return best.left[:, :0]
    reached = (squares.cumsum(0) / squares.sum()).sqrt() > energy
    return best.left[:, : int(reached.int().argmax()) + 1]


def _share(update: LowRank, span: Tensor) -> Tensor:
    """‖U Uᵀ Δ‖_F / ‖Δ‖_F; 0 for a zero update."""
    norm = update.norm()
    return LowRank(span.mT @ update.left, update.right).norm() / norm if norm > 0 else norm


def _collect(names: tuple[str, ...], modules: Mapping[str, ModuleAlignment]) -> Alignment:
    count = len(names)
    inner, own, ratio, shared = (torch.zeros(count, count, dtype=torch.float64) for _ in range(4))
    squares = torch.zeros(count, dtype=torch.float64)
    for found in modules.values():
        at = torch.tensor([names.index(name) for name in found.names])
        grid = at[:, None], at
        inner[grid] += found.inner
        own[grid] += found.norms.square()[:, None]
        ratio[grid] += found.ratio
        shared[grid] += 1
        squares[at] += found.norms.square()
    norms = dict(zip(names, squares.sqrt().tolist(), strict=True))
    return Alignment(names, norms, inner / (own * own.mT).sqrt(), ratio / shared, shared.int(), modules)
